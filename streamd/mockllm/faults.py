"""Faults: what the mock does wrong, or oddly, on demand. One table; flag, request header and help derive from it.

A fault is a word or `word=number`; several are joined with `;` or `,`. `--fault` sets them for all requests,
`X-Mock-Fault` for one. Behind a relay a reader must not notice an oddity (cuts, crlf, comments, …), and must be told of
a failure.
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
    """Everything that can go wrong, each on its own and most of it together. K counts tokens; of an answer that is not
    streamed, any K means its middle."""

    # failures
    status: int | None = _number("answer with this status and the dialect's error object")
    break_fin: int | None = _number("end the connection (FIN) after K tokens, in mid-body")
    break_rst: int | None = _number("reset the connection (RST) after K tokens")
    stall: int | None = _number("forever silent after K tokens; 0: the request is taken and never answered")
    bad_chunk: int | None = _number("send a chunk size that is none after K tokens, then nothing")
    half: bool = _word("with break, stall or bad-chunk: half of the next event still goes out")
    no_done: bool = _word("end without the stream's terminal ([DONE], response.completed, message_stop)")
    no_finish: bool = _word("end without terminal, finish_reason and usage: a clean end that is none")
    garbage_status: bool = _word("answer with a status line that is none")
    reset_in_head: bool = _word("reset the connection in the middle of the response head")
    close_on_reuse: bool = _word("close without a byte at the second request of a connection")
    first: int | None = _number("the faults hold for the server's first K faulty requests only")
    # oddities
    early_head: bool = _word("send the head at once, not with the first event; with stall=0: the head, then silence")
    cuts: int | None = _number("cut chunks and writes at odd places, drawn from this seed")
    bytewise: bool = _word("each byte of the body its own chunk and its own write")
    crlf: bool = _word("lines end with CR LF")
    cr: bool = _word("lines end with CR")
    content_length: bool = _word("a stream with Content-Length in place of chunks")
    until_close: bool = _word("a stream that ends with the connection")
    comments: bool = _word("comments, in blocks of their own and inside of events")
    ids: bool = _word("an upstream's own id: lines")
    retry: bool = _word("retry: lines, in a block of their own and inside of events")
    bom: bool = _word("a byte order mark first")
    no_blank: bool = _word("leave out the blank line of the last event")

    def stops_after(self) -> int | None:
        """The token after which the answer goes wrong for good, if it does."""
        asked = [k for k in (self.break_fin, self.break_rst, self.stall, self.bad_chunk) if k is not None]
        return min(asked, default=None)


NO_FAULTS: Final = Faults()


class BadOption(ValueError):
    """An option's value is no good; the text says what is allowed."""


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
    """The table for --help, one fault a line."""
    suffixes = {"number": "=K", "nothing": ""}
    words = [each.name.replace("_", "-") + suffixes[each.metadata["takes"]] for each in fields(Faults)]
    return "\n".join(f"  {word:<17}{each.metadata['doc']}" for word, each in zip(words, fields(Faults), strict=True))
