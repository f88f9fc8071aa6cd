// useChat of the AI SDK in a page: an answer that an application publishes through streamd, read on mount (`resume`), once
// while it goes on, once behind its end, and once where there is none.

import { openPage } from "./page.mjs";
import * as told from "./told.mjs";

openPage();
const React = (await import("react")).default;
const { createRoot } = await import("react-dom/client");
const { useChat } = await import("@ai-sdk/react");
const { DefaultChatTransport } = await import("ai");

const url = told.URL_OF_STREAMD;
const words = ["The ", "river ", "began ", "in ", "the ", "mountains."];
const event = (body) => `data: ${JSON.stringify(body)}\n\n`;
const opening = event({ type: "start" }) + event({ type: "text-start", id: "t" });
const closing = event({ type: "text-end", id: "t" }) + event({ type: "finish" }) + "data: [DONE]\n\n";

async function publish(id, body) {
  const answer = await fetch(`${url}/v1/streams/${id}/events`, {
    method: "POST",
    headers: { "content-type": "text/event-stream" },
    body,
  });
  if (!answer.ok) throw new Error(`publish: ${answer.status}`);
}

/** Mount a chat that resumes; until(chat) ends it. Gives the text of the assistant, or the error. */
function mounted(id, path, until) {
  const transport = new DefaultChatTransport({
    prepareReconnectToStreamRequest: () => ({ api: `${url}${path}` }),
  });
  return new Promise((resolve) => {
    const root = createRoot(document.body.appendChild(document.createElement("div")));
    function Page() {
      const chat = useChat({ id, transport, resume: true });
      const said = chat.messages.flatMap((message) => message.parts).map((part) => part.text ?? "").join("");
      if (chat.error) resolve(`${chat.error}`);
      else if (until(said, chat.status)) resolve(said);
      return React.createElement("p", null, said);
    }
    root.render(React.createElement(Page));
  });
}

told.tellVersion("ai", "@ai-sdk/react", "react", "happy-dom");
await fetch(`${url}/v1/streams/chat-1`, { method: "PUT" });
await publish("chat-1", opening + words.slice(0, 3).map((delta) => event({ type: "text-delta", id: "t", delta })).join(""));
const page = mounted("chat-1", "/v1/streams/chat-1", (said, status) => status === "ready" && said.length > 0);
await publish("chat-1", words.slice(3).map((delta) => event({ type: "text-delta", id: "t", delta })).join("") + closing);
told.tell("published", words.join(""));
told.tell("resume", await page);
told.tell("resume behind the end", await mounted("chat-2", "/v1/streams/chat-1", (said, status) => status === "ready" && said.length > 0));
const unknown = await fetch(`${url}/v1/stream?conv_id=nobodys`);
told.tell("resume of nothing", unknown.status);
const nothing = mounted("chat-3", "/v1/stream?conv_id=nobodys", (said, status) => status === "ready" && rested);
let rested = false;
setTimeout(() => (rested = true), 0);
told.tell("useChat, nothing to resume", `"${await nothing}"`);
process.exit(0);
