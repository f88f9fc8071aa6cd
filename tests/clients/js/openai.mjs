// The openai SDK: chat, Responses, tools, errors, and a retry that joins.

import OpenAI from "openai";
import * as told from "./told.mjs";

const client = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: told.KEY, maxRetries: 0 });
const messages = [{ role: "user", content: told.PROMPT }];

async function* pieces(sdk, headers) {
  const stream = await sdk.chat.completions.create({ model: told.MODEL, messages, stream: true }, { headers });
  for await (const chunk of stream) yield chunk.choices[0]?.delta?.content ?? "";
}

async function all(sdk, headers) {
  let said = "";
  for await (const piece of pieces(sdk, headers)) said += piece;
  return said;
}

told.tellVersion("openai");
const sdk = client(told.URL_OF_STREAMD);
told.tell("whole", (await sdk.chat.completions.create({ model: told.MODEL, messages })).choices[0].message.content);
told.tell("stream", await all(sdk));
const response = sdk.responses.stream({ model: told.MODEL, input: told.PROMPT });
told.tell("responses", (await response.finalResponse()).output_text.slice(0, 20));
const tools = [{ type: "function", function: { name: "look_up", parameters: told.PARAMETERS } }];
const calling = sdk.chat.completions.stream({ model: told.MODEL, messages, tools, tool_choice: "required" });
const called = (await calling.finalChatCompletion()).choices[0].message.tool_calls[0].function;
told.tell("tools", `${called.name} ${called.arguments}`);
await told.tellError("refused", () => all(sdk, told.REFUSED));
await told.tellError("cut", () => all(sdk, told.BROKEN));
const behind = client(told.CUT_URL);
await told.tellResumed((headers) => pieces(behind, headers));
