// The eventsource package: a stream that breaks in mid-answer and goes on by itself, and the 204 at its end.

import { EventSource } from "eventsource";
import * as told from "./told.mjs";
import { readAll, startGeneration } from "./stream_by_id.mjs";

told.tellVersion("eventsource");
const id = await startGeneration();
await readAll(new EventSource(`${told.CUT_URL}/v1/streams/${id}`), id);
