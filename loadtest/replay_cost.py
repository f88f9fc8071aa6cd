"""The cost of a replay log: memory of 500 tokens, time of an append, of reading back, of a coalesced catch-up.

    python loadtest/replay_cost.py [--logs 1000] [--json]

Several shapes of stream, since each takes another path: see SHAPES. Memory is the sum of sys.getsizeof over all objects
reachable from a log, with headers of the garbage collector, and beside it the memory that the allocator really handed
out for `--logs` logs (tracemalloc). Times are of an append to a log in the CPU's caches ("hot": the least of several
rounds), and of appends in turn over all logs ("cold"). Targets: ordinary chat 5.5 KB, append 1 us.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator

from streamd.core.replay import ReplayLog

TOKENS = 500
BYTES_HELD_MAX = 5_500  # the contract, for ordinary chat
APPEND_US_MAX = 1.0
WORDS = """
    the of and to a in is that for it as was with be by on not he his but at are this have from or had an they
    which one you were all her she there would their we him been has when who will no more if out so said what up
    its about than into them can only other time new some could these two may first then do any like my now over
    such our man even most made after also did many off before must well back through years much where your way
    down should because long each just state those people too mr how little good world make very year still see
    own work men day get here
"""
_WORDS = WORDS.split()


def english(rng: random.Random) -> str:
    """A token as tokenizers cut them: mostly a short word with its space, sometimes a piece or a sign."""
    draw = rng.random()
    if draw < 0.1:
        return rng.choice([",", ".", "\n\n", ":", " -"])
    return ("" if draw < 0.3 else " ") + rng.choice(_WORDS)


def chinese(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(rng.randrange(1, 3)))


def _event(parsed: object, name: str = "") -> bytes:
    text = json.dumps(parsed, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def _chunk(ident: str, created: int, choices: list[object], **more: object) -> bytes:
    chunk = {"id": ident, "object": "chat.completion.chunk", "created": created, "model": "meta-llama/Llama-3.1-8B"}
    return _event(chunk | {"choices": choices} | more)


def _choice(text: str, index: int = 0) -> object:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}


def chat(rng: random.Random, word: Callable[[random.Random], str] = english) -> Iterator[bytes]:
    ident = f"chatcmpl-{rng.getrandbits(128):032x}"
    yield _chunk(ident, 1_800_000_000, [{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    for _ in range(TOKENS):
        yield _chunk(ident, 1_800_000_000, [_choice(word(rng))])
    yield _chunk(ident, 1_800_000_000, [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}])
    yield _chunk(ident, 1_800_000_000, [], usage={"prompt_tokens": 50, "completion_tokens": TOKENS})
    yield b"data: [DONE]\n\n"


def chat_chinese(rng: random.Random) -> Iterator[bytes]:
    return chat(rng, chinese)


def chat_dated(rng: random.Random) -> Iterator[bytes]:
    ident = f"chatcmpl-{rng.getrandbits(128):032x}"
    for token in range(TOKENS):
        yield _chunk(ident, 1_800_000_000 + token // 30, [_choice(english(rng))])


def chat_two_choices(rng: random.Random) -> Iterator[bytes]:
    ident = f"chatcmpl-{rng.getrandbits(128):032x}"
    for token in range(TOKENS):
        yield _chunk(ident, 1_800_000_000, [_choice(english(rng), token % 2)])


def chat_padded(rng: random.Random) -> Iterator[bytes]:
    ident = f"chatcmpl-{rng.getrandbits(128):032x}"
    for _ in range(TOKENS):
        pad = f"{rng.getrandbits(64):x}"[: rng.randrange(1, 14)]
        yield _chunk(ident, 1_800_000_000, [_choice(english(rng))], obfuscation=pad)


def chat_usage(rng: random.Random) -> Iterator[bytes]:
    ident = f"chatcmpl-{rng.getrandbits(128):032x}"
    for token in range(TOKENS):
        yield _chunk(ident, 1_800_000_000, [_choice(english(rng))], usage={"completion_tokens": token})


def chat_token_ids(rng: random.Random) -> Iterator[bytes]:
    """vLLM with `return_token_ids`."""
    ident = f"chatcmpl-{rng.getrandbits(128):032x}"
    for _ in range(TOKENS):
        choice = {"index": 0, "delta": {"content": english(rng)}, "logprobs": None, "finish_reason": None}
        yield _chunk(ident, 1_800_000_000, [choice | {"token_ids": [rng.randrange(128_000)]}])


def chat_logprobs(rng: random.Random) -> Iterator[bytes]:
    ident = f"chatcmpl-{rng.getrandbits(128):032x}"
    for _ in range(TOKENS):
        text = english(rng)
        entry = {"token": text, "logprob": -rng.expovariate(2), "bytes": list(text.encode()), "top_logprobs": []}
        choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [entry]}, "finish_reason": None}
        yield _chunk(ident, 1_800_000_000, [choice])


def responses(rng: random.Random) -> Iterator[bytes]:
    kind, ident = "response.output_text.delta", f"msg_{rng.getrandbits(128):032x}"
    for token in range(TOKENS):
        head = {"type": kind, "sequence_number": token + 4, "item_id": ident, "output_index": 0, "content_index": 0}
        yield _event(head | {"delta": english(rng), "logprobs": []}, kind)


def messages(rng: random.Random) -> Iterator[bytes]:
    kind = "content_block_delta"
    for _ in range(TOKENS):
        yield _event({"type": kind, "index": 0, "delta": {"type": "text_delta", "text": english(rng)}}, kind)


def gemini(rng: random.Random) -> Iterator[bytes]:
    """Counts grow with each event, as Google's do; its servers put several tokens into one."""
    for made in range(1, TOKENS + 1):
        content = {"parts": [{"text": english(rng)}], "role": "model"}
        usage = {
            "promptTokenCount": 8,
            "candidatesTokenCount": 4 * made,
            "totalTokenCount": 4 * made + 8,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 8}],
        }
        candidates = [{"content": content, "index": 0}]
        rest = {"usageMetadata": usage, "modelVersion": "gemini-2.5-flash", "responseId": "Hq3naLWHMMv_xN8P1_S5mAM"}
        yield _event({"candidates": candidates} | rest)


SHAPES = [
    chat,
    chat_chinese,
    chat_dated,
    chat_two_choices,
    chat_padded,
    chat_usage,
    chat_token_ids,
    chat_logprobs,
    responses,
    messages,
    gemini,
]


def held_bytes(log: ReplayLog) -> int:
    """sys.getsizeof of all objects reachable from the log, each object once, with the collector's 16 bytes."""
    seen: dict[int, object] = {}
    ahead: list[object] = [log]
    while ahead:
        found = ahead.pop()
        if id(found) in seen or isinstance(found, type) or (isinstance(found, int) and -5 <= found <= 256):
            continue
        seen[id(found)] = found
        ahead += gc.get_referents(found)
    return sum(sys.getsizeof(found) for found in seen.values())


def new_log() -> ReplayLog:
    return ReplayLog(bytes_max=1 << 20, events_max=1 << 20)


def fill(log: ReplayLog, events: list[bytes]) -> ReplayLog:
    for event in events:
        log.append(event)
    return log


def us(work: Callable[[], object], times: int, rounds: int = 5) -> float:
    """Microseconds of a single operation in the best round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best / times * 1e6


def cold_append_us(streams: list[list[bytes]], logs: list[ReplayLog]) -> float:
    start = time.perf_counter()
    for turn in zip(*streams, strict=True):
        for log, event in zip(logs, turn, strict=True):
            log.append(event)
    return (time.perf_counter() - start) / sum(map(len, streams)) * 1e6


def read_all(log: ReplayLog, bytes_max: int = 1 << 30) -> list[tuple[int, bytes]]:
    cursor, out = log.seek(log.seq_first), []
    while events := log.read(cursor, bytes_max=bytes_max):
        out += events
    return out


def cost(shape: Callable[[random.Random], Iterator[bytes]], logs_count: int) -> dict[str, float]:
    events = list(shape(random.Random(1)))
    log = fill(new_log(), events)
    assert [event for _, event in read_all(log)] == events
    # Every log gets its own stream, as in production (a shared stream would share the caches).
    streams = [list(shape(random.Random(seed))) for seed in range(min(logs_count, 200))]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    logs = [fill(new_log(), stream) for stream in streams]
    allocated = (tracemalloc.get_traced_memory()[0] - before) / len(logs)
    tracemalloc.stop()
    cold = [new_log() for _ in streams]
    return {
        "event_bytes": round(sum(map(len, events)) / len(events)),
        "text_bytes": log.text_bytes,
        "held_bytes": held_bytes(log),
        "claimed_bytes": log.bytes_held,
        "allocated_bytes": round(allocated),
        "append_hot_us": round(us(lambda: fill(new_log(), events), len(events), rounds=20), 3),
        "append_cold_us": round(cold_append_us(streams, cold), 3),
        "read_all_us": round(us(lambda: read_all(log), 1, rounds=10), 1),
        **coalescing(events[:401]),
    }


def coalescing(events: list[bytes]) -> dict[str, float]:
    """A reader that stopped before the last 300 events reads on from its cursor."""
    log = fill(new_log(), events[:-300])
    cursors = [log.cursor_at_end() for _ in range(20)]
    fill(log, events[-300:])
    out: list[tuple[int, bytes]] = []

    def catch_up() -> None:
        out.clear()
        cursor = cursors.pop()
        while more := log.read_coalesced(cursor):
            out.extend(more)

    took = us(catch_up, 1, rounds=len(cursors))
    return {"coalesce_300_us": round(took, 1), "coalesced_events": len(out)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=100, help="logs that take turns in the cold figures (at most 200)")
    parser.add_argument("--json", action="store_true", help="only the JSON")
    args = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        result[shape.__name__] = figures = cost(shape, args.logs)
        if not args.json:
            print(f"{shape.__name__:17}", *(f"{name} {value}" for name, value in figures.items()), sep="  ")
    ordinary = result["chat"]
    met = ordinary["held_bytes"] <= BYTES_HELD_MAX and ordinary["append_hot_us"] <= APPEND_US_MAX
    empty = held_bytes(new_log())
    print(json.dumps({"tokens": TOKENS, "empty_log_bytes": empty, "targets_met": met, "shapes": result}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
