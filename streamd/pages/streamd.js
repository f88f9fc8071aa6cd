// Reading streams from streamd in a browser, without a library: copy what you need.
//
//   generate(…)  starts a generation with fetch, and comes back by itself to where it was when the connection is lost
//   read(…)      reads a stream by its id, from any event on, in the same way: after a reload, or in a second tab
//   watch(…)     reads a stream that somebody else started, with EventSource, which does all that by itself
//   stop(…)      ends a generation for everybody
//
// What streamd promises and this relies on: every event has an id, `Last-Event-ID` gets everything after it, the same
// request sent again with the same Idempotency-Key never starts a second generation, and 204 means that there is nothing
// more.

// Cuts text into server-sent events (WHATWG HTML 9.2.6). Any split of the input gives the same events.
export class EventParser {
  lastEventId = "";
  retryMs = null;
  #rest = "";
  #data = [];
  #event = "";

  // Returns the events that are complete with this piece: {id, event, data}.
  feed(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/); // a CR at the very end may be half of CR LF
    this.#rest = lines.pop();
    return lines.map((line) => this.#line(line)).filter((event) => event !== null);
  }

  #line(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
    else if (field === "id" && !value.includes("\0")) this.lastEventId = value;
    else if (field === "retry" && /^\d+$/.test(value)) this.retryMs = Number(value);
    return null; // a comment (": hb", the heartbeat) has an empty field name
  }

  #dispatch() {
    const event = { id: this.lastEventId, event: this.#event || "message", data: this.#data.join("\n") };
    const isEmpty = this.#data.length === 0;
    this.#data = [];
    this.#event = "";
    return isEmpty ? null : event;
  }
}

// The text in one event's JSON, whatever of the four dialects it is.
export function textOf(body) {
  if (body.type === "content_block_delta") return body.delta?.text ?? ""; // /v1/messages
  if (typeof body.delta === "string") return body.delta; // /v1/responses, published text
  return (body.choices ?? []).map((choice) => choice.delta?.content ?? choice.text ?? "").join("");
}

const TERMINAL = new Set(["response.completed", "response.failed", "response.incomplete", "message_stop"]);

// What one event means: {text}, {gap}, {done}, {failed} or {reconnect}.
export function meaningOf({ event, data }) {
  if (data.startsWith("[DONE]")) return { done: true };
  let body;
  try {
    body = JSON.parse(data);
  } catch {
    return { text: data };
  }
  const error = body.error ?? (body.type === "error" ? body : null);
  if (error?.code === "reconnect" || body.retry_ms !== undefined) return { reconnect: body.retry_ms ?? 1000 };
  if (error) return { failed: error.message ?? "the stream failed" };
  if (TERMINAL.has(body.type)) return { done: true };
  if (body.gap) return { gap: body.gap };
  return { text: textOf(body) };
}

class Refused extends Error {}
class HttpFailure extends Error {} // for now: the same request may succeed soon

// Tries without any answer before the address counts as wrong. A server that has answered once is only away for now.
const TRIES_UNANSWERED_MAX = 3;

const unanswered = (server) =>
  `Nothing answers at ${server}: is the address right, and does streamd allow this page (cors_origins)?`;

const RETRY_MS = 1000; // until the server has said otherwise with a `retry:` line
const RETRY_MS_MAX = 30_000;

// Starts a generation and yields {text}, {gap} and {state} until it is complete. Throws what ended it otherwise.
//
// options: headers (Authorization …); graceS: how long the generation may go on while nobody reads, so that a lost
// connection costs nothing; signal: an AbortSignal that ends the reading; onConnect: gets a function that drops the
// connection, to try the resuming out; onEvent: gets each event as it is, {id, event, data}; bytesOf: makes the pieces
// of a response's body, to read at a pace of one's own.
export function generate(server, path, body, { graceS = 60, ...options } = {}) {
  const key = randomKey();
  // Before an id was seen the same POST starts the generation or gets its stream, because of its Idempotency-Key.
  const begin = (more) =>
    fetch(server + path, {
      ...more,
      method: "POST",
      headers: {
        ...more.headers,
        "Content-Type": "application/json",
        "Idempotency-Key": key,
        "X-Stream-Detach-Grace": String(graceS),
      },
      body: JSON.stringify({ ...body, stream: true }),
    });
  return follow(server, { streamId: "", lastEventId: "", begin }, options);
}

// Reads the stream of that id: all of it, or what comes after the event `after`. Yields and throws as generate() does.
export function read(server, streamId, { after = "", ...options } = {}) {
  return follow(server, { streamId, lastEventId: after, begin: null }, options);
}

async function* follow(server, { streamId, lastEventId, begin }, options) {
  const { headers = {}, signal, onConnect } = options;
  const parser = { lastEventId, retryMs: RETRY_MS };
  let isAnswered = false;
  for (let tries = 0; ; tries++) {
    const before = parser.lastEventId;
    const connection = new AbortController();
    const abort = () => connection.abort();
    signal?.addEventListener("abort", abort);
    onConnect?.(abort);
    let isLeft = true; // the caller left its loop (break, return)
    try {
      signal?.throwIfAborted();
      const response = await ask(server, { streamId, parser, begin, headers, signal: connection.signal });
      isAnswered = true;
      if (response.status === 204) return; // the end was reached before the connection was lost
      const type = response.headers.get("Content-Type") ?? "nothing";
      if (!type.startsWith("text/event-stream")) throw new Refused(`${server} answers with ${type}: is that streamd?`);
      streamId = response.headers.get("X-Stream-Id") ?? streamId;
      yield { state: "streaming", streamId };
      const isWhole = yield* readAnswer(response, parser, options);
      isLeft = false;
      if (isWhole) return;
    } catch (error) {
      isLeft = false;
      if (signal?.aborted || error instanceof Refused) throw error;
      if (error instanceof HttpFailure) isAnswered = true;
      if (!isAnswered && tries + 1 >= TRIES_UNANSWERED_MAX) throw new Refused(unanswered(server));
      // Everything else is a lost connection: come back.
    } finally {
      signal?.removeEventListener("abort", abort);
      if (isLeft) abort(); // else streamd would count a reader until the page is closed
    }
    if (parser.lastEventId !== before) tries = 0;
    const waitMs = Math.min(RETRY_MS_MAX, parser.retryMs * 2 ** tries);
    yield { state: "reconnecting", streamId, waitMs };
    await sleep(waitMs, signal);
  }
}

// One request: the generation itself, or a stream from a place on.
async function ask(server, { streamId, parser, begin, headers, signal }) {
  const begins = begin !== null && (streamId === "" || parser.lastEventId === "");
  const place = parser.lastEventId ? { "Last-Event-ID": parser.lastEventId } : {};
  const response = begins
    ? await begin({ headers, signal })
    : await fetch(`${server}/v1/streams/${encodeURIComponent(streamId)}`, {
        headers: { ...headers, ...place, Accept: "text/event-stream" },
        cache: "no-store",
        signal,
      });
  const passing = [408, 429, 502, 503, 504].includes(response.status);
  if (passing && (!begins || response.headers.get("x-should-retry") === "true")) {
    parser.retryMs = 1000 * (Number(response.headers.get("Retry-After")) || 1);
    throw new HttpFailure(`HTTP ${response.status}`);
  }
  if (!response.ok) throw new Refused(await refusalOf(response));
  return response;
}

async function refusalOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `HTTP ${response.status} ${text.slice(0, 200)}`;
  }
}

async function* piecesOf(body) {
  const reader = body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

// Yields what the answer says. Returns true when it came to its end, false when that isn't sure, throws when it broke off.
async function* readAnswer(response, parser, { onEvent, bytesOf = piecesOf }) {
  const fresh = new EventParser();
  // Why not pipeThrough(new TextDecoderStream()): when the connection breaks, a pipe drops what is still in it.
  const decoder = new TextDecoder();
  for await (const piece of bytesOf(response.body)) {
    for (const event of fresh.feed(decoder.decode(piece, { stream: true }))) {
      const meaning = meaningOf(event);
      onEvent?.(event);
      parser.lastEventId = event.id || parser.lastEventId;
      parser.retryMs = fresh.retryMs ?? parser.retryMs;
      if (meaning.done) return true;
      if (meaning.failed) throw new Refused(meaning.failed);
      if (meaning.reconnect !== undefined) {
        parser.retryMs = meaning.reconnect;
        return false;
      }
      yield { ...meaning, id: event.id };
    }
  }
  // Why not true: some proxies end an answer properly whose server broke off, and some models never send a terminal
  // event. Asking for the rest tells which: 204 means that this was all.
  return false;
}

// Reads the stream of that id from its beginning with an EventSource. Calls listener({text | gap | state | failed}).
// Returns a function that ends the reading (and nothing else).
export function watch(server, streamId, listener) {
  const source = new EventSource(`${server}/v1/streams/${encodeURIComponent(streamId)}`);
  let unansweredTries = 0; // -1: it has answered
  const end = (said) => {
    source.close();
    listener(said);
  };
  const take = (event) => {
    if (event.data === undefined) {
      // The connection was lost. CONNECTING: the browser comes back by itself with Last-Event-ID. CLOSED: it was answered
      // 204 (nothing more: the stream is over) or an error.
      const isOver = source.readyState === EventSource.CLOSED;
      if (!isOver && unansweredTries >= 0 && ++unansweredTries >= TRIES_UNANSWERED_MAX) {
        end({ failed: unanswered(server) });
        return;
      }
      listener({ state: isOver ? "finished" : "reconnecting" });
      return;
    }
    const meaning = meaningOf({ event: event.type, data: event.data });
    if (meaning.done) end({ state: "finished" }); // without this the 204 of the next attempt ends it, a moment later
    else if (meaning.failed) end({ failed: meaning.failed });
    else if (meaning.reconnect === undefined) listener({ ...meaning, id: event.lastEventId });
  };
  source.onopen = () => {
    unansweredTries = -1;
    listener({ state: "streaming", streamId });
  };
  for (const type of ["message", "gap", "reconnect", "error", ...NAMED]) source.addEventListener(type, take);
  return () => end({ state: "stopped" });
}

// EventSource hands out events with a name only to those who listen to that name: those with text, of /v1/responses and
// /v1/messages.
const NAMED = ["response.output_text.delta", "response.completed", "content_block_delta", "message_stop"];

// Ends a generation now, for all its readers. Closing a connection doesn't: that may be a tunnel.
export async function stop(server, streamId, headers = {}) {
  const response = await fetch(`${server}/v1/streams/${encodeURIComponent(streamId)}`, { method: "DELETE", headers });
  if (!response.ok && response.status !== 404) throw new Error(await refusalOf(response));
}

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const cancel = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", cancel);
      resolve();
    }, ms);
    signal?.addEventListener("abort", cancel, { once: true });
  });
}

// Why not crypto.randomUUID(): it is missing on pages that came over plain http from another machine.
function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
