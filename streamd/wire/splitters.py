"""The splitters of an upstream's events, told to another process and made again there: by the class of their state."""

from __future__ import annotations

from streamd.wire.dialects.api import Api
from streamd.wire.inner import InnerSplitter, InnerState
from streamd.wire.json_lines import JsonLines, LinesState
from streamd.wire.sse import EventSplitter, SplitterState, StrayTaker


def state_of(splitter: EventSplitter) -> SplitterState | InnerState | LinesState:
    """The argument of splitter_of()."""
    if isinstance(splitter, JsonLines):
        return splitter.lines_state
    if isinstance(splitter, InnerSplitter):
        return splitter.inner_state
    return splitter.state()


def splitter_of(
    state: SplitterState | InnerState | LinesState, api: Api, *, event_bytes_max: int, strays: StrayTaker
) -> EventSplitter:
    """A splitter that goes on where that with this state has stopped. Raises ValueError for an impossible state."""
    if isinstance(state, LinesState):
        lines = JsonLines(api, event_bytes_max=event_bytes_max, strays=strays)
        lines.go_on_from_lines(state)
        return lines
    if isinstance(state, InnerState):
        inner = InnerSplitter(api.heartbeat, event_bytes_max=event_bytes_max, strays=strays)
        inner.go_on_from_inner(state)
        return inner
    splitter = EventSplitter(event_bytes_max=event_bytes_max, strays=strays)
    splitter.go_on_from(state)
    return splitter
