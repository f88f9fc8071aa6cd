// What every client program shares: the addresses that run.py gives it, and the lines that it prints for run.py.

import { readFileSync } from "node:fs";

export const URL_OF_STREAMD = process.env.STREAMD_URL;
export const CUT_URL = process.env.CUT_URL; // the same streamd behind a relay that resets the first connection
export const KEY = "sk-none";
export const MODEL = process.env.MODEL ?? "mock-llm";
export const PROMPT = "Tell me about rivers.";
export const REFUSED = { "X-Mock-Fault": "status=429" };
export const BROKEN = { "X-Mock-Fault": "break-fin=3" };
export const PARAMETERS = {
  type: "object",
  properties: { place: { type: "string" }, depth: { type: "integer" } },
  required: ["place", "depth"],
};

export function tell(step, value) {
  console.log(JSON.stringify([step, String(value)]));
}

export function tellVersion(...names) {
  const version = (name) => JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;
  tell("version", names.map((name) => `${name} ${version(name)}`).join(", "));
}

export async function tellError(step, call) {
  try {
    await call();
    tell(step, "no error");
  } catch (error) {
    tell(step, `${error.name} ${error.status ?? error.statusCode ?? ""} ${String(error.message).slice(0, 200)}`);
  }
}

/** Read by ask(headers) until the connection breaks, then ask again with the same Idempotency-Key. */
export async function tellResumed(ask) {
  const headers = { "Idempotency-Key": crypto.randomUUID(), "X-Stream-Detach-Grace": "60" };
  let said = "";
  try {
    for await (const piece of ask(headers)) said += piece;
    tell("resume", `nothing broke: ${said}`);
  } catch (error) {
    let again = "";
    for await (const piece of ask(headers)) again += piece;
    tell("resume", again.startsWith(said) ? again : `${said} is no beginning of ${again}`);
    tell("broken by", error.name);
  }
}
