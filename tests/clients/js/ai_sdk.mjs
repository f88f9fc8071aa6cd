// The AI SDK with its provider for OpenAI-compatible servers: text, tools, errors, and a retry that joins.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";
import * as told from "./told.mjs";

const model = (url, headers) =>
  createOpenAICompatible({ name: "streamd", baseURL: `${url}/v1`, apiKey: told.KEY, headers })(told.MODEL);
const common = { prompt: told.PROMPT, maxRetries: 0, onError: () => {} };

async function* pieces(url, headers) {
  for await (const part of streamText({ ...common, model: model(url, headers) }).fullStream) {
    if (part.type === "text-delta") yield part.text;
    if (part.type === "error") throw part.error;
  }
}

async function all(url, headers) {
  let said = "";
  for await (const piece of pieces(url, headers)) said += piece;
  return said;
}

const url = told.URL_OF_STREAMD;
told.tellVersion("ai", "@ai-sdk/openai-compatible");
told.tell("whole", (await generateText({ prompt: told.PROMPT, model: model(url) })).text);
told.tell("stream", await all(url));
const tools = { look_up: tool({ inputSchema: jsonSchema(told.PARAMETERS) }) };
const calls = await streamText({ ...common, model: model(url), tools, toolChoice: "required" }).toolCalls;
told.tell("tools", `${calls[0].toolName} ${JSON.stringify(calls[0].input)}`);
await told.tellError("refused", () => all(url, told.REFUSED));
await told.tellError("cut", () => all(url, told.BROKEN));
await told.tellResumed((headers) => pieces(told.CUT_URL, headers));
