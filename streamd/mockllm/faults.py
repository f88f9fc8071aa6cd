"""Faults: failures and oddities of the mock, on demand. Flag, request header and help derive from a single table.

A fault is a word or `word=number`; several are joined with `;` or `,`. `--fault` sets faults for all requests,
`X-Mock-Fault` for a single request. Behind a relay a reader must not notice an oddity (cuts, crlf, comments, …), and
must be told of a failure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Final


def _number(doc: str) -> int | None:
    return field(default=None, metadata={"doc": doc, "takes": "number"})


def _word(doc: str) -> bool:
    return field(default=False, metadata={"doc": doc, "takes": "nothing"})


@dataclass(frozen=True, slots=True)
class Faults:
    """All faults; most can be combined. K counts tokens; in an answer that isn't streamed, any K is its middle."""

    # failures
    status: int | None = _number("answer with this status and the dialect's error object")
    break_fin: int | None = _number("end the connection (FIN) after K tokens, in mid-body")
    break_rst: int | None = _number("reset the connection (RST) after K tokens")
    stall: int | None = _number("fall silent forever after K tokens; 0: take the request and never answer")
    bad_chunk: int | None = _number("send an invalid chunk size after K tokens, then nothing")
    half: bool = _word("with break, stall or bad-chunk: send half of the next event first")
    no_done: bool = _word("end without the stream's terminal ([DONE], response.completed, message_stop)")
    no_finish: bool = _word("end without terminal, finish_reason and usage, though the framing ends properly")
    garbage_status: bool = _word("answer with an invalid status line")
    reset_in_head: bool = _word("reset the connection in the middle of the response head")
    close_on_reuse: bool = _word("close without a byte at the second request of a connection")
    first: int | None = _number("limit the faults to the server's first K faulty requests")
    # oddities
    early_head: bool = _word("send the head at once, not with the first event; with stall=0: the head, then silence")
    cuts: int | None = _number("cut chunks and writes at odd places, drawn from this seed")
    bytewise: bool = _word("send each byte of the body in a chunk and a write of its own")
    crlf: bool = _word("end lines with CR LF")
    cr: bool = _word("end lines with CR")
    content_length: bool = _word("send a stream with Content-Length in place of chunks")
    until_close: bool = _word("end a stream by closing the connection")
    comments: bool = _word("add comments, in blocks of their own and inside of events")
    ids: bool = _word("add id: lines of the upstream's own")
    retry: bool = _word("add retry: lines, in a block of their own and inside of events")
    bom: bool = _word("begin with a byte order mark")
    no_blank: bool = _word("leave out the blank line of the last event")

    def stops_after(self) -> int | None:
        """The number of tokens after which a failure ends the answer; None without such a failure."""
        asked = [k for k in (self.break_fin, self.break_rst, self.stall, self.bad_chunk) if k is not None]
        return min(asked, default=None)


NO_FAULTS: Final = Faults()


class BadOption(ValueError):
    """An option's value is wrong; the text says which values are allowed."""


def parse_faults(words: str, base: Faults = NO_FAULTS) -> Faults:
    """`break-fin=3; crlf` → Faults. `break=K` is `break-fin=K`. Raises BadOption."""
    chosen: dict[str, int | bool] = {}
    for word in filter(None, re.split(r"[;,\s]+", words)):
        name, equals, value = word.partition("=")
        key = "break_fin" if name == "break" else name.replace("-", "_")
        takes = _TAKES.get(key)
        if takes is None:
            raise BadOption(f"no fault is called {name!r}; there are {', '.join(sorted(_TAKES)).replace('_', '-')}")
        if takes == "nothing" and equals:
            raise BadOption(f"{name} takes no value")
        if takes == "number" and not value.isdecimal():
            raise BadOption(f"{name} takes a number: {name}=3")
        chosen[key] = int(value) if takes == "number" else True
    return replace(base, **chosen)  # type: ignore[arg-type]


_TAKES: Final = {each.name: str(each.metadata["takes"]) for each in fields(Faults)}


def describe() -> str:
    """The table for --help, with a fault per line."""
    suffixes = {"number": "=K", "nothing": ""}
    words = [each.name.replace("_", "-") + suffixes[each.metadata["takes"]] for each in fields(Faults)]
    return "\n".join(f"  {word:<17}{each.metadata['doc']}" for word, each in zip(words, fields(Faults), strict=True))
