// event-source-polyfill in a page: the same as eventsource.mjs. Its fetch fails on a 204, which has no body, so it asks again
// with growing waits until the stream is forgotten; the 404 closes it.

import { openPage } from "./page.mjs";
import * as told from "./told.mjs";
import { readAll, startGeneration } from "./stream_by_id.mjs";

Object.assign(openPage(), { fetch, AbortController, TextDecoder });
const { EventSourcePolyfill } = await import("event-source-polyfill");

told.tellVersion("event-source-polyfill");
const id = await startGeneration();
await readAll(new EventSourcePolyfill(`${told.CUT_URL}/v1/streams/${id}`), id);
process.exit(0);
