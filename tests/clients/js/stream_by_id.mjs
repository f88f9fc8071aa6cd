// A generation that is started by fetch and read by an EventSource, by its id.

import * as told from "./told.mjs";

/** Start a chat without reading it; gives its id. */
export async function startGeneration() {
  const answer = await fetch(`${told.URL_OF_STREAMD}/v1/chat/completions`, {
    method: "POST",
    headers: {
      "content-type": "application/json",
      prefer: "respond-async",
      "x-stream-detach-grace": "60", // its only reader loses the connection
      "x-mock-interval-ms": "25",
    },
    body: JSON.stringify({ model: told.MODEL, stream: true, messages: [{ role: "user", content: told.PROMPT }] }),
  });
  return (await answer.json()).id;
}

/** The whole text of a stream that has ended. */
async function textOfStream(id) {
  const body = await (await fetch(`${told.URL_OF_STREAMD}/v1/streams/${id}`)).text();
  const datas = body.split("\n").filter((line) => line.startsWith("data: "));
  return datas.map((line) => textOf(line.slice(6))).join("");
}

/** Read by an EventSource until it gives up for good (a `[DONE]` doesn't close it here), and tell the steps. */
export async function readAll(source, id) {
  let text = "";
  let opened = 0;
  let whole;
  source.onopen = () => (opened += 1);
  source.onmessage = (event) => {
    text += textOf(event.data);
    if (event.data === "[DONE]") whole = textOfStream(id);
  };
  await new Promise((resolve) => {
    source.onerror = () => source.readyState === 2 && resolve();
  });
  told.tell("stream", await whole);
  told.tell("resume", text);
  told.tell("connections", opened);
  told.tell("closed for good", "yes");
}

function textOf(data) {
  return data.startsWith("{") ? (JSON.parse(data).choices?.[0]?.delta?.content ?? "") : "";
}
