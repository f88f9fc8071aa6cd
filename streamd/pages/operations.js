// The operations page: numbers, curves and tables of a daemon, from the snapshots of GET /live.
import { Curve } from "./curve.js";

const at = (id) => document.getElementById(id);

// Values as people read them

const number = (value) => (value === null || value === undefined ? "–" : Number(value).toLocaleString("en", { maximumFractionDigits: 1 }));
const plural = (value, word) => `${number(value)} ${word}${value === 1 ? "" : "s"}`;
const text = (value) => (value === null || value === undefined || value === "" ? "–" : String(value));

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 10) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}

function size(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KB", "MB", "GB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${value >= 10 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

const of = (used, limit) => (limit === null || limit === undefined ? number(used) : `${number(used)} of ${number(limit)}`);

// The tables: columns of {head, cell, sort, kind}. `sort` is the word of the admin surface, which sorts: the highest first.

const words = (head, member, more = {}) => ({ head, cell: (row) => text(row[member]), ...more });
const count = (head, member, more = {}) => ({ head, cell: (row) => number(row[member]), kind: "number", ...more });
const time = (head, member, more = {}) => ({ head, cell: (row) => seconds(row[member]), kind: "number", ...more });
const word = (head, member) => words(head, member, { kind: "word" });
const wide = (head, member) => words(head, member, { kind: "wide" });
const key = { head: "Key", cell: (row) => text(row.key_name ?? row.key), kind: "wide" };

const TABLES = {
  upstreams: {
    id: "name",
    filters: ["name"],
    sort: "state",
    columns: [
      wide("Upstream", "name"),
      { ...word("State", "state"), sort: "state" },
      time("Since", "since_s"),
      count("Requests", "in_flight", { sort: "in_flight" }),
      count("Idle connections", "idle"),
      count("Failures in a row", "failures", { sort: "failures" }),
      words("Last error", "last_error"),
    ],
  },
  streams: {
    id: "id",
    filters: ["key", "upstream", "model", "stream", "state"],
    sort: "lag",
    end: "Its upstream is aborted, and its readers are told that it was stopped.",
    columns: [
      words("Stream", "id"),
      key,
      wide("Model", "model"),
      wide("Upstream", "upstream"),
      word("State", "state"),
      count("Readers", "subscribers", { sort: "readers" }),
      count("Events", "last_seq"),
      count("Tokens", "tokens", { sort: "tokens" }),
      count("Tokens/s", "tokens_per_s"),
      count("Lag", "lag_max", { sort: "lag" }),
      time("First", "first_s"),
      time("Idle", "idle_s", { sort: "idle" }),
      time("Age", "age_s", { sort: "age" }),
    ],
  },
  readers: {
    id: "id",
    filters: ["key", "upstream", "model", "stream"],
    sort: "lag",
    end: "It is sent away with its position, and may come back there.",
    columns: [
      words("Reader", "id"),
      key,
      words("Peer", "peer"),
      word("State", "state"),
      count("Lag", "lag_events", { sort: "lag" }),
      time("Behind", "lag_s"),
      time("Paused", "paused_s", { sort: "paused" }),
      { head: "Unsent", cell: (row) => size(row.unsent_bytes), kind: "number" },
      { head: "Position", cell: (row) => of(row.position, row.last_seq), kind: "number" },
      wide("Model", "model"),
      wide("Upstream", "upstream"),
      words("Stream", "stream"),
      time("First", "first_s"),
      time("Age", "age_s", { sort: "age" }),
    ],
  },
  keys: {
    id: "key",
    filters: ["key"],
    sort: "tokens",
    end: "All streams that it opened, all that it reads and its waiting requests end. Its next request is served: `streamd keys revoke` shuts it out.",
    columns: [
      wide("Key", "key"),
      wide("Name", "key_name"),
      { head: "Streams", cell: (row) => of(row.streams, row.streams_max), kind: "number", sort: "streams" },
      count("Readers", "readers", { sort: "readers" }),
      count("Requests", "requests", { sort: "requests" }),
      count("Tokens/s", "tokens_per_s", { sort: "tokens" }),
      { head: "Requests left", cell: (row) => of(row.requests_left, row.requests_per_minute), kind: "number" },
      { head: "Tokens left", cell: (row) => of(row.tokens_left, row.tokens_per_minute), kind: "number" },
      count("Tokens ever", "tokens_total"),
    ],
  },
};
const SINGULAR = { streams: "stream", readers: "reader", keys: "key" };
// States of upstreams, the worst first.
const BADNESS = ["out", "probing", "failing", "up"];

// What the page shows, and the snapshots for it

let shown = "streams";
const chosen = Object.fromEntries(Object.entries(TABLES).map(([name, { sort }]) => [name, { sort, filter: null }]));
let source = null;
let again = null; // a timer, after a refusal

function address() {
  if (shown === "upstreams") return "/live";
  const { sort, filter } = chosen[shown];
  return `/live?${new URLSearchParams({ table: shown, sort, ...(filter ? { [filter.by]: filter.value } : {}) })}`;
}

function sayConnection(state, words) {
  if (at("connection").dataset.state === state && at("connection").textContent === words) return;
  at("connection").dataset.state = state;
  at("connection").textContent = words;
}

function look() {
  source?.close();
  clearTimeout(again);
  source = new EventSource(address());
  source.addEventListener("snapshot", (event) => {
    sayConnection("live", "Live");
    take(JSON.parse(event.data));
  });
  source.onerror = () => {
    sayConnection("failed", "No connection to the daemon; trying again …");
    if (source.readyState === EventSource.CLOSED) sayWhy();
  };
}

// An EventSource doesn't tell why it was refused, and doesn't come back after it.
async function sayWhy() {
  again = setTimeout(look, 5000);
  const asking = new AbortController();
  const response = await fetch(address(), { signal: asking.signal }).catch(() => null);
  if (response !== null && !response.ok) {
    const refusal = await response.json().catch(() => null);
    sayConnection("failed", refusal?.error?.message ?? `HTTP ${response.status}`);
  }
  asking.abort();
}

// The daemon computes nothing for a page that is hidden.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    source?.close();
    clearTimeout(again);
  } else {
    look();
  }
});

function take({ unix_s: now, status, table }) {
  if (status !== null) {
    showDaemon(status);
    showCurves(now, status);
    showDrain(status.drain);
    upstreams = Object.entries(status.upstreams).map(([name, numbers]) => ({ name, ...numbers }));
    upstreamsTotal = status.upstreams_total;
  }
  if (shown === "upstreams") showUpstreams();
  else if (table !== null && table.name === shown && table.sort === chosen[shown].sort) {
    showRows(table.data, table.total, table.workers_missing);
  }
}

// The head and the curves

function showDaemon(status) {
  const { streams } = status;
  const parts = status.admission.saturation;
  const fullest = Object.keys(parts).reduce((a, b) => (parts[a] >= parts[b] ? a : b));
  const facts = [
    `${status.version}, ${status.state} for ${seconds(status.uptime_s)}`,
    plural(status.workers, "worker"),
    plural(status.connections, "connection"),
    `${plural(streams.live, "live stream")}, ${number(streams.detached)} without a reader`,
    `saturation ${parts[fullest].toFixed(2)} (${fullest})`,
  ];
  at("daemon").textContent = facts.join(" · ");
}

const HISTORY = "streamd-curves";
const kept = JSON.parse(sessionStorage.getItem(HISTORY) ?? "{}");
const curve = (name, label, show) => new Curve(at("curves"), label, show, (kept[name] ??= []));
const curves = {
  tokens: curve("tokens", "Tokens/s", number),
  readers: curve("readers", "Readers", number),
  lag: curve("lag", "Largest lag, events", number),
  memory: curve("memory", "Memory", size),
};
addEventListener("pagehide", () => sessionStorage.setItem(HISTORY, JSON.stringify(kept)));

// The daemon counts tokens once a second, and so does a snapshot look: over three seconds the beat of the two is gone.
const RATE_OVER_S = 3;
let counted = []; // [seconds, tokens since the start]

function showCurves(now, status) {
  counted.push([now, status.tokens_total]);
  while (counted.length > 2 && counted[1][0] <= now - RATE_OVER_S) counted.shift();
  const [before, tokens] = counted[0];
  if (status.tokens_total < tokens) counted = [[now, status.tokens_total]]; // a worker was replaced
  if (now > before) curves.tokens.add(now, Math.max(0, status.tokens_total - tokens) / (now - before));
  curves.readers.add(now, status.subscribers);
  curves.lag.add(now, status.lag_events);
  curves.memory.add(now, status.admission.resident_bytes);
}

// The table. While a pointer or a keyboard's focus is in it its rows stay where they are: a click must not hit another.

let upstreams = [];
let upstreamsTotal = 0;
let isPointedAt = false;

at("rows").addEventListener("pointerenter", (event) => (isPointedAt = event.pointerType === "mouse"));
at("rows").addEventListener("pointerleave", () => (isPointedAt = false));

function showUpstreams() {
  const { sort, filter } = chosen.upstreams;
  const rows = upstreams.filter(({ name }) => filter === null || name.includes(filter.value));
  rows.sort((a, b) => (sort === "state" ? BADNESS.indexOf(a.state) - BADNESS.indexOf(b.state) : b[sort] - a[sort]));
  showRows(rows, filter === null ? upstreamsTotal : rows.length, 0);
}

function showHeads() {
  const { columns, end } = TABLES[shown];
  const heads = columns.map(({ head, sort, kind }) => {
    const made = document.createElement("th");
    made.scope = "col";
    made.className = kind === "number" ? "number" : "";
    if (sort === undefined) {
      made.textContent = head;
      return made;
    }
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head;
    button.dataset.sort = sort;
    button.addEventListener("click", () => {
      chosen[shown].sort = sort;
      markSort();
      refresh();
    });
    made.append(button);
    return made;
  });
  if (end !== undefined) {
    const made = document.createElement("th");
    made.scope = "col";
    made.textContent = "Action";
    heads.push(made);
  }
  at("heads").replaceChildren(...heads);
  at("rows").replaceChildren();
  markSort();
}

function markSort() {
  for (const button of at("heads").querySelectorAll("button")) {
    const isSorted = button.dataset.sort === chosen[shown].sort;
    if (isSorted) button.parentElement.setAttribute("aria-sort", "descending");
    else button.parentElement.removeAttribute("aria-sort");
  }
}

function makeRow(id) {
  const { columns, end } = TABLES[shown];
  const row = document.createElement("tr");
  row.dataset.id = id;
  for (const { kind } of columns) {
    const cell = row.insertCell();
    if (kind === "number" || kind === "wide") cell.className = kind;
  }
  if (end !== undefined) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "grave";
    button.textContent = "End …";
    button.setAttribute("aria-label", `End ${SINGULAR[shown]} ${id} …`);
    const kind = shown;
    button.addEventListener("click", () => askToEnd(kind, id));
    row.insertCell().append(button);
  }
  return row;
}

function fill(row, values) {
  row.classList.remove("gone");
  TABLES[shown].columns.forEach(({ cell, kind }, k) => {
    const place = row.cells[k];
    const value = cell(values);
    if (place.textContent === value) return;
    place.textContent = value;
    if (kind === "word") place.dataset.word = value;
    if (kind === "wide") place.title = value;
  });
}

function showRows(rows, total, missing) {
  const body = at("rows");
  const { id } = TABLES[shown];
  const before = new Map(Array.from(body.rows, (row) => [row.dataset.id, row]));
  const holds = before.size > 0 && (isPointedAt || body.querySelector(":focus-visible") !== null);
  const now = new Set(rows.map((values) => String(values[id])));
  rows.forEach((values, k) => {
    const name = String(values[id]);
    const row = before.get(name) ?? (holds ? null : makeRow(name));
    if (row === null) return;
    fill(row, values);
    if (!holds && body.rows[k] !== row) body.insertBefore(row, body.rows[k] ?? null);
  });
  for (const [name, row] of before) {
    if (now.has(name)) continue;
    if (holds) row.classList.add("gone");
    else row.remove();
  }
  const late = missing ? `; ${plural(missing, "worker")} didn't answer in time` : "";
  const held = holds ? "; rows stay in place while you point at them" : "";
  at("count").textContent = `${number(rows.length)} of ${number(total)}${late}${held}`;
}

// Tabs, filter

const tabs = Array.from(at("tabs").children);
const nameOf = (tab) => tab.id.slice("tab-".length);

function choose(name) {
  shown = name;
  for (const tab of tabs) {
    const isChosen = nameOf(tab) === name;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    if (isChosen) at("panel").setAttribute("aria-labelledby", tab.id);
  }
  const options = TABLES[name].filters.map((word) => new Option(word, word));
  at("filter-by").replaceChildren(...options);
  const { filter } = chosen[name];
  at("filter-by").value = filter?.by ?? options[0].value;
  at("filter-value").value = filter?.value ?? "";
  at("filter-clear").disabled = filter === null;
  at("count").textContent = "";
  showHeads();
  refresh();
}

function refresh() {
  if (shown === "upstreams") showUpstreams();
  look();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => choose(nameOf(tab)));
  tab.addEventListener("keydown", ({ key: pressed }) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[pressed];
    if (step === undefined) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    choose(nameOf(next));
    next.focus();
  });
}

at("filter").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  const value = at("filter-value").value.trim();
  chosen[shown].filter = value ? { by: at("filter-by").value, value } : null;
  at("filter-clear").disabled = !value;
  refresh();
});
at("filter-clear").addEventListener("click", () => {
  at("filter-value").value = "";
  at("filter-value").focus();
  at("filter").requestSubmit();
});

// Ends, after a confirmation

let confirmed = () => {};

function ask(title, words, yes, work) {
  at("confirm-title").textContent = title;
  at("confirm-text").textContent = words;
  at("confirm-yes").textContent = yes;
  confirmed = work;
  at("confirm").showModal();
}

at("confirm-no").addEventListener("click", () => at("confirm").close());
at("confirm-yes").addEventListener("click", () => {
  at("confirm").close();
  confirmed();
});

// Does a request of an operator's, and says what became of it.
async function order(method, path, say) {
  at("done").textContent = "";
  try {
    const response = await fetch(path, { method });
    const body = await response.json();
    at("done").textContent = response.ok ? say(body) : body.error.message;
  } catch {
    at("done").textContent = "The daemon didn't answer.";
  }
}

function askToEnd(kind, id) {
  const title = `End ${SINGULAR[kind]} ${id}?`;
  const say = ({ streams, readers, requests }) =>
    `Ended: ${plural(streams, "stream")}, ${plural(readers, "reader")}, ${plural(requests, "waiting request")}.`;
  ask(title, TABLES[kind].end, `End this ${SINGULAR[kind]}`, () => order("DELETE", `/${kind}/${encodeURIComponent(id)}`, say));
}

// The same request begins a drain and hurries one. It isn't sent where another operator was faster than the confirmation.
function postDrain(isToBegin, said) {
  const isDraining = at("drain").hidden;
  if (isToBegin === isDraining) at("done").textContent = "Another operator was faster, and nothing was done: look at the drain again.";
  else order("POST", "/drain", () => said);
}

at("drain").addEventListener("click", () => {
  const words = "The daemon takes no new work, lets its generations finish, and stops, as at SIGTERM.";
  ask("Drain this daemon?", words, "Drain", () => postDrain(true, "The drain has begun."));
});
at("drain-now").addEventListener("click", () => {
  const words = "Generations that still run are cut: their readers are told their position.";
  ask("End the drain now?", words, "End now", () => postDrain(false, "The drain ends now."));
});
at("drain-undo").addEventListener("click", () => order("DELETE", "/drain", () => "The drain was taken back."));

function showDrain(drain) {
  at("drain").hidden = drain !== null;
  at("drain-now").hidden = drain === null;
  at("drain-undo").hidden = !drain?.may_be_taken_back;
  at("drain-state").textContent =
    drain === null
      ? "Serving."
      : `Draining for ${seconds(drain.since_s)}, at most ${seconds(drain.deadline_s)} more: ${plural(drain.left, "generation")} left, ` +
        `${number(drain.finished)} finished, ${plural(drain.sent_away, "reader")} sent away.`;
}

choose(shown);
