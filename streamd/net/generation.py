"""The figures of a generation: those of its firsts, which are observed as they come, and those of its end. Between the
two a token costs no figure anything.

The mean between tokens comes from the times of the first token and of the last event, and the number of tokens. The
longest silence is the longest that a sweep of the hub has found, so it may be shorter than the true one by the time
between two sweeps, 250 ms, and is never below the mean. A comment of the upstream ends a silence as an event does.
"""

from __future__ import annotations

from collections.abc import Callable

from streamd.core.stream import Stream
from streamd.core.usage import Tally
from streamd.counters import Counters, bump, observe
from streamd.net.collected import coding_of
from streamd.net.request import Request
from streamd.net.served import Served
from streamd.reasons import CloseReason
from streamd.wire.dialect import generates
from streamd.wire.http1 import ResponseHead


class GenerationWatch:
    """Observes a request that is carried upstream. `served` names the upstream and the model for metrics."""

    __slots__ = ("_counters", "_request", "_served", "_tally")

    def __init__(self, counters: Counters, served: Callable[[str, str], Served], request: Request) -> None:
        self._counters = counters
        self._served = served
        self._request = request
        self._tally: Tally | None = None  # of a whole answer that is a generation

    def first_event(self, now: float) -> None:
        """The reader's wait is over, as far as the answer is concerned."""
        self._counters.first_event_s.observe(now - self._request.started_at)

    def first_token(self, now: float) -> None:
        """The wait for a token is over, too."""
        observe(self._counters.first_token_s, self._pair(), now - self._request.started_at)

    def whole_answer(self, head: ResponseHead) -> None:
        """The answer passes as bytes: if they are a generation's, the tokens that they state are counted."""
        if generates(self._request.method, self._request.path) and _is_json(head):
            trace = self._request.trace
            self._tally = trace.whole_answer() if trace is not None and trace.is_recorded else Tally()

    def passed(self, piece: bytes) -> None:
        """The next bytes of a whole answer."""
        if self._tally is not None:
            self._tally.passed(piece)

    def over(self) -> None:
        """The answer is over. Acts once. A stream's tokens are counted at its seal."""
        tally, self._tally = self._tally, None
        if tally is None:
            return
        read, made = tally.over()
        if read or made:
            pair = self._pair()
            bump(self._counters.prompt_tokens, pair, read)
            bump(self._counters.generation_tokens, pair, made)

    def _pair(self) -> Served:
        return self._served(self._request.upstream, self._request.model)


def _is_json(head: ResponseHead) -> bool:
    """Whether an answer says that it is JSON, and isn't encoded."""
    media_type = (head.get(b"content-type") or b"").split(b";")[0].strip().lower()
    return media_type == b"application/json" and coding_of(head) is None


def observe_end(counters: Counters, pair: Served, stream: Stream) -> None:
    """Observe a sealed generation. Tokens that were paid for once already (Terms.pays_tokens) aren't counted again."""
    made = stream.progress.tokens(stream.text_events)
    if stream.terms.pays_tokens:
        usage = stream.progress.usage
        bump(counters.prompt_tokens, pair, usage[0] if usage else 0)
        bump(counters.generation_tokens, pair, made)
    ledger = stream.ledger
    if not ledger.first_token_at or made < 2:
        return
    mean_s = max(0.0, stream.touched_at - ledger.first_token_at) / (made - 1)
    if stream.reason is CloseReason.COMPLETE:  # an error event that ends it came later than its last token
        observe(counters.token_gap_s, pair, mean_s)
        observe(counters.longest_gap_s, pair, max(mean_s, ledger.longest_gap_s))
    else:
        observe(counters.longest_gap_s, pair, ledger.longest_gap_s)
