// The chat page of `streamd demo`. What talks to streamd is in streamd.js, which pages of your own can copy.
import { generate, read, stop } from "./streamd.js";

const at = (id) => document.getElementById(id);
const server = location.origin;
const number = (value) => value.toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

// The place of an event in its stream: the number behind the last colon of its id.
const seqOf = (id) => Number(id.slice(id.lastIndexOf(":") + 1)) || 0;

function make(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// Keeps a box at its end while its reader is there.
function follow(box, change) {
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

function say(id, state, words) {
  at(id).dataset.state = state;
  at(id).textContent = words;
}

// The events as they come

const EVENTS_SHOWN_MAX = 200;
const EVENT_CHARS_MAX = 600;
let eventsSeen = 0;

function showEvent({ id, event, data }) {
  eventsSeen += 1;
  at("events-count").textContent = `${plural(eventsSeen, "event")}, the last ${EVENTS_SHOWN_MAX} are shown`;
  if (at("hold").checked) return;
  const lines = [`id: ${id}`, ...(event === "message" ? [] : [`event: ${event}`]), `data: ${data.slice(0, EVENT_CHARS_MAX)}`];
  follow(at("events-box"), () => {
    at("events").append(make("li", "", lines.join("\n")));
    if (at("events").childElementCount > EVENTS_SHOWN_MAX) at("events").firstElementChild.remove();
  });
}

// The chat. `talk` is what is said; the last answer may still be running: {streamId, lastEventId}.

const MEMORY = "streamd-chat"; // of this tab alone, and until it is closed
const GRACE_S = 60; // a reload of the page takes a second or two
let talk = [];
let running = null; // {streamId, lastEventId, reading: AbortController, isStopped, losses}

function showMessage({ role, text }) {
  const shown = make("li", role, "");
  const said = make("span", "said", text);
  shown.append(make("span", "speaker", role === "user" ? "You" : "Model"), said);
  follow(at("talk-box"), () => at("talk").append(shown));
  return said;
}

function remember() {
  const { streamId = "", lastEventId = "" } = running ?? {};
  sessionStorage.setItem(MEMORY, JSON.stringify({ talk, streamId, lastEventId }));
}

function run(events, answer, losses = 0) {
  const mine = running;
  mine.losses = losses;
  const said = showMessage(answer);
  at("talk-box").setAttribute("aria-busy", "true"); // a screen reader waits for the end instead of reading each token
  at("send").disabled = at("clear").disabled = true;
  at("drop").disabled = at("stop").disabled = false;
  return take(events, answer, said, mine).then(
    () => end("finished", "Finished"),
    (error) => end(mine.isStopped ? "stopped" : "failed", mine.isStopped ? "Stopped" : error.message),
  );
}

async function take(events, answer, said, mine) {
  for await (const step of events) {
    if (step.streamId && step.streamId !== mine.streamId) share((mine.streamId = step.streamId));
    if (step.text) follow(at("talk-box"), () => said.append(step.text));
    if (step.gap) said.append(make("span", "gap", ` [${plural(step.gap.to - step.gap.from + 1, "event")} missing] `));
    if (step.id) {
      answer.text += step.text ?? "";
      mine.lastEventId = step.id;
    }
    if (step.state === "streaming") say("status", "streaming", `Reading ${mine.streamId}${madeGood(mine.losses)}`);
    if (step.state === "reconnecting") {
      mine.losses += 1;
      say("status", "reconnecting", "Connection lost; coming back …");
    }
  }
}

const madeGood = (losses) => (losses ? `, ${plural(losses, "lost connection")} made good` : "");

function end(state, words) {
  say("status", state, `${words}${madeGood(running.losses)}`);
  running = null;
  at("talk-box").setAttribute("aria-busy", "false");
  at("send").disabled = at("clear").disabled = false;
  at("drop").disabled = at("stop").disabled = true;
  remember();
}

const options = () => ({
  signal: running.reading.signal,
  onConnect: (drop) => (at("drop").onclick = drop),
  onEvent: showEvent,
});

const begin = (streamId, lastEventId) =>
  (running = { streamId, lastEventId, reading: new AbortController(), isStopped: false, losses: 0 });

at("ask").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  if (running !== null) return;
  const messages = [...talk, { role: "user", text: at("prompt").value }];
  const body = { model: "mock-llm", messages: messages.map(({ role, text }) => ({ role, content: text })) };
  showMessage(messages.at(-1));
  const answer = { role: "assistant", text: "" };
  talk = [...messages, answer];
  say("status", "connecting", "Asking …");
  begin("", "");
  run(generate(server, "/v1/chat/completions", body, { graceS: GRACE_S, ...options() }), answer);
});

at("prompt").addEventListener("keydown", (pressed) => {
  if (pressed.key === "Enter" && (pressed.ctrlKey || pressed.metaKey)) at("ask").requestSubmit();
});

at("stop").addEventListener("click", async () => {
  const mine = running;
  mine.isStopped = true;
  if (mine.streamId) await stop(server, mine.streamId).catch(() => {});
  mine.reading.abort();
});

at("clear").addEventListener("click", () => {
  talk = [];
  at("talk").replaceChildren();
  at("share").hidden = true;
  say("status", "idle", "Nothing asked yet.");
  remember();
  at("prompt").focus();
});

function share(streamId) {
  at("second-tab").href = `/?${new URLSearchParams({ watch: streamId })}`;
  at("share").hidden = false;
}

// A second tab reads an answer from its beginning; a reloaded tab goes on where it was.
function restore() {
  const watched = new URLSearchParams(location.search).get("watch");
  if (watched !== null) {
    begin(watched, "");
    say("status", "connecting", `Reading ${watched} …`);
    share(watched);
    run(read(server, watched, options()), { role: "assistant", text: "" });
    return;
  }
  const kept = JSON.parse(sessionStorage.getItem(MEMORY) ?? "null");
  if (kept === null) return;
  talk = kept.talk;
  const isRunning = kept.streamId !== "";
  for (const message of isRunning ? talk.slice(0, -1) : talk) showMessage(message);
  if (!isRunning) return;
  begin(kept.streamId, kept.lastEventId);
  share(kept.streamId);
  run(read(server, kept.streamId, { after: kept.lastEventId, ...options() }), talk.at(-1), 1);
}

addEventListener("pagehide", () => {
  if (!new URLSearchParams(location.search).has("watch")) remember();
});

// The slow reader: a long and fast answer of its own, read at the chosen pace.

const SLOW_TOKENS = 40_000;
const SLOW_CHOICES = 8; // the synthetic model makes 200 tokens a second at most of each
const PIECE_BYTES = 20_000;
const PIECE_EVERY_MS = 100;
const LOOK_EVERY_MS = 500;
const NOTES_MAX = 50;
const NOTED_TOKENS_MIN = 50; // an event of more tokens is worth a note

let slow = null; // {reading, isStopped, streamId, made, seq, events, largest}
let paceChanged = () => {};

at("pace").addEventListener("change", () => paceChanged());

async function mayRead(signal) {
  while (at("pace").value === "none" && !signal.aborted) {
    await new Promise((resolve) => (paceChanged = resolve));
  }
  if (at("pace").value === "slow") await new Promise((resolve) => setTimeout(resolve, PIECE_EVERY_MS));
}

async function* pacedPieces(body) {
  const { signal } = slow.reading;
  // Why "byob": only so a page decides how many bytes it takes. Without it (Safari) a piece is what the browser has.
  const takesViews = "ReadableStreamBYOBReader" in globalThis;
  const reader = takesViews ? body.getReader({ mode: "byob" }) : body.getReader();
  let buffer = new ArrayBuffer(PIECE_BYTES);
  for (;;) {
    await mayRead(signal);
    const { done, value } = takesViews ? await reader.read(new Uint8Array(buffer)) : await reader.read();
    if (done) return;
    yield value;
    buffer = value.buffer;
  }
}

function note(words) {
  follow(at("notes-box"), () => {
    at("notes").append(make("li", "", words));
    if (at("notes").childElementCount > NOTES_MAX) at("notes").firstElementChild.remove();
  });
}

function showSlow() {
  const { made, seq, events, largest } = slow;
  const last = Math.max(made, seq);
  at("made").max = at("got").max = Math.max(SLOW_TOKENS, last);
  at("made").value = last;
  at("got").value = seq;
  at("behind").textContent = plural(last - seq, "event");
  at("received").textContent = plural(events, "event");
  at("largest").textContent = plural(largest, "token");
}

function takeSlow(step) {
  if (step.streamId) slow.streamId = step.streamId;
  if (step.state === "streaming") say("slow-status", "streaming", `Reading ${slow.streamId}`);
  if (step.state === "reconnecting") {
    say("slow-status", "reconnecting", "streamd closed the connection; coming back …");
    note(`closed after event ${number(slow.seq)}; the reader comes back there`);
  }
  if (step.gap) note(`gap: events ${number(step.gap.from)} to ${number(step.gap.to)} are missing`);
  if (!step.id) return;
  const seq = seqOf(step.id);
  const tokens = step.gap ? 0 : seq - slow.seq;
  if (tokens >= NOTED_TOKENS_MIN) note(`event ${number(seq)} holds the text of ${number(tokens)} tokens`);
  slow.events += 1;
  slow.largest = Math.max(slow.largest, tokens);
  slow.seq = seq;
}

async function lookAtStream() {
  const mine = slow;
  if (mine === null || !mine.streamId) return;
  const headers = { Accept: "application/json" };
  const response = await fetch(`${server}/v1/streams/${encodeURIComponent(mine.streamId)}`, { headers });
  if (response.ok) mine.made = (await response.json()).last_seq;
  if (slow === mine) showSlow();
}

at("slow").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  if (slow !== null) return;
  slow = { reading: new AbortController(), isStopped: false, streamId: "", made: 0, seq: 0, events: 0, largest: 1 };
  const looking = setInterval(() => lookAtStream().catch(() => {}), LOOK_EVERY_MS);
  at("slow-start").disabled = at("policy").disabled = true;
  at("slow-stop").disabled = false;
  at("notes").replaceChildren();
  const asked = { model: "mock-llm", n: SLOW_CHOICES, messages: [{ role: "user", content: "Tell me a long story." }] };
  const headers = {
    "X-Stream-Policy": at("policy").value,
    "X-Mock-Tokens": String(SLOW_TOKENS / SLOW_CHOICES),
    "X-Mock-Interval-Ms": "5",
    "X-Mock-Jitter-Ms": "0",
  };
  const how = { graceS: GRACE_S, headers, signal: slow.reading.signal, bytesOf: pacedPieces };
  try {
    for await (const step of generate(server, "/v1/chat/completions", asked, how)) takeSlow(step);
    say("slow-status", "finished", "Finished");
  } catch (error) {
    const { isStopped } = slow;
    say("slow-status", isStopped ? "stopped" : "failed", isStopped ? "Stopped" : error.message);
  }
  showSlow();
  clearInterval(looking);
  slow = null;
  at("slow-start").disabled = at("policy").disabled = false;
  at("slow-stop").disabled = true;
});

at("slow-stop").addEventListener("click", async () => {
  const mine = slow;
  mine.isStopped = true;
  if (mine.streamId) await stop(server, mine.streamId).catch(() => {});
  mine.reading.abort();
  paceChanged();
});

restore();
