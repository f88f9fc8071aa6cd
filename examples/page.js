// The page: a form, two texts and their states. What talks to streamd is in streamd.js.
import { generate, stop, watch } from "./streamd.js";

const at = (id) => document.getElementById(id);
const server = () => (at("server").value.trim() || location.origin).replace(/\/+$/, "").replace(/\/v1$/, "");
const headers = () => (at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {});

// Shows one text and what is known of its stream.
class Panel {
  constructor(text, status) {
    this.text = text;
    this.status = status;
  }

  begin() {
    this.text.replaceChildren();
    this.text.setAttribute("aria-busy", "true"); // a screen reader waits for the end instead of reading each token
    this.events = 0;
    this.losses = 0;
  }

  add(text) {
    this.events += 1;
    const isAtEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    this.text.append(text);
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  addGap({ from, to }) {
    const mark = document.createElement("span");
    mark.className = "gap";
    mark.textContent = ` [${to - from + 1} events missing] `;
    this.text.append(mark);
  }

  say(state, words) {
    this.status.dataset.state = state;
    this.status.textContent = words;
  }

  end(state, words) {
    this.text.setAttribute("aria-busy", "false");
    const losses = this.losses ? `, ${this.losses} lost connection${this.losses > 1 ? "s" : ""} made good` : "";
    this.say(state, `${words} ${this.events} event${this.events === 1 ? "" : "s"}${losses}.`);
  }

  take(said) {
    if (said.text) this.add(said.text);
    if (said.gap) this.addGap(said.gap);
    if (said.state === "streaming") this.say("streaming", `Streaming ${said.streamId}`);
    if (said.state === "reconnecting") {
      this.losses += 1;
      const wait = said.waitMs ? ` in ${(said.waitMs / 1000).toFixed(1)} s` : "";
      this.say("reconnecting", `Connection lost; coming back${wait} …`);
    }
  }
}

// Ask

const answer = new Panel(at("answer"), at("status"));
let running = null; // {streamId, reading: AbortController, stopped}

function bodyOf(path, model, prompt) {
  if (path === "/v1/responses") return { model, input: prompt };
  if (path === "/v1/completions") return { model, prompt, max_tokens: 400 };
  return { model, messages: [{ role: "user", content: prompt }] };
}

at("ask").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  running?.reading.abort();
  const mine = (running = { streamId: "", reading: new AbortController(), stopped: false });
  const path = at("path").value;
  const onConnect = (drop) => (at("drop").onclick = drop);
  answer.begin();
  answer.say("connecting", "Asking …");
  at("drop").disabled = at("stop").disabled = false;
  try {
    const body = bodyOf(path, at("model").value, at("prompt").value);
    const options = { headers: headers(), signal: mine.reading.signal, onConnect };
    for await (const said of generate(server(), path, body, options)) {
      if (said.streamId && !mine.streamId) share((mine.streamId = said.streamId));
      answer.take(said);
    }
    answer.end("finished", "Finished:");
  } catch (error) {
    if (running !== mine) return; // another was asked meanwhile
    if (mine.stopped) answer.end("stopped", "Stopped after");
    else answer.end("failed", `${error.message} After`);
  } finally {
    if (running === mine) at("drop").disabled = at("stop").disabled = true;
  }
});

at("stop").addEventListener("click", async () => {
  const { streamId, reading } = running;
  running.stopped = true;
  // A stream that has no id yet is stopped by leaving it.
  if (streamId) await stop(server(), streamId, headers()).catch(() => {});
  reading.abort();
});

function share(streamId) {
  const link = new URL(location.href);
  link.search = new URLSearchParams({ watch: streamId, ...(at("server").value ? { server: server() } : {}) });
  at("watch-link").href = link;
  at("watch-link").textContent = link;
  at("share").hidden = false;
}

// Watch

const watched = new Panel(at("watched"), at("watch-status"));
let leave = null;

function over() {
  leave = null;
  at("watch-end").disabled = true;
}

function begin(streamId) {
  leave?.();
  watched.begin();
  watched.say("connecting", "Connecting …");
  at("watch-end").disabled = false;
  leave = watch(server(), streamId, (said) => {
    watched.take(said);
    if (said.failed) watched.end("failed", `${said.failed} After`);
    if (said.state === "finished") watched.end("finished", watched.events ? "Finished:" : "There is no such stream at that address, or no more of it:");
    if (said.state === "stopped") watched.end("stopped", "Left after");
    if (said.failed || said.state === "finished" || said.state === "stopped") over();
  });
}

at("watch").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  begin(at("stream").value.trim());
});
at("watch-end").addEventListener("click", () => leave?.());

// Start

async function listModels() {
  const response = await fetch(`${server()}/v1/models`, { headers: headers() });
  if (!response.ok) return;
  const names = (await response.json()).data.map((model) => model.id);
  at("models").replaceChildren(...names.map((name) => Object.assign(document.createElement("option"), { value: name })));
  if (names.length && !names.includes(at("model").value)) at("model").value = names[0];
}

const asked = new URLSearchParams(location.search);
at("server").value = asked.get("server") ?? "";
at("settings").open = asked.has("server"); // a link chose where the prompt and the key go: show it
at("server").addEventListener("change", () => listModels().catch(() => {}));
listModels().catch(() => {});
if (asked.has("watch")) {
  at("stream").value = asked.get("watch");
  begin(asked.get("watch"));
  at("watch-title").scrollIntoView();
}
