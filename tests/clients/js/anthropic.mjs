// The Anthropic SDK: Messages, tools, errors, and a retry that joins.

import Anthropic from "@anthropic-ai/sdk";
import * as told from "./told.mjs";

const client = (url) => new Anthropic({ baseURL: url, apiKey: told.KEY, maxRetries: 0 });
const ask = { model: told.MODEL, max_tokens: 1000, messages: [{ role: "user", content: told.PROMPT }] };

async function* pieces(sdk, headers) {
  for await (const event of await sdk.messages.create({ ...ask, stream: true }, { headers })) {
    if (event.type === "content_block_delta") yield event.delta.text;
  }
}

async function all(sdk, headers) {
  let said = "";
  for await (const piece of pieces(sdk, headers)) said += piece;
  return said;
}

told.tellVersion("@anthropic-ai/sdk");
const sdk = client(told.URL_OF_STREAMD);
told.tell("whole", (await sdk.messages.create(ask)).content[0].text);
told.tell("stream", await all(sdk));
const tools = [{ name: "look_up", input_schema: told.PARAMETERS }];
const used = (await sdk.messages.stream({ ...ask, tools, tool_choice: { type: "any" } }).finalMessage()).content[0];
told.tell("tools", `${used.name} ${JSON.stringify(used.input)}`);
await told.tellError("refused", () => all(sdk, told.REFUSED));
await told.tellError("cut", () => all(sdk, told.BROKEN));
const behind = client(told.CUT_URL);
await told.tellResumed((headers) => pieces(behind, headers));
