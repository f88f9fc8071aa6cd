"""Upstream reports: a worker's views of the inference servers for the parent, and the parent's verdicts.

A change of a state is reported with the next tick, further failures of a server once a second. An answer is reported
only if it refutes the daemon's verdict that the server is out: a healthy daemon reports nothing. A worker without a
parent, as tests and tools run it, judges by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from streamd.config import Settings
from streamd.daemon.outages import Outages
from streamd.net.runtime import Runtime
from streamd.net.upstream import Upstream
from streamd.net.upstreams import Upstreams
from streamd.server_state import LISTED_MAX, MODEL_CHARS_MAX, ServerState, ServerView

# Time between two reports of a server in the same state: /status shows the number of its failures.
AGAIN_EVERY_S: Final = 1.0

Say = Callable[[str, ServerView], bool]


class UpstreamReports:
    """The reports of a worker. The sweep calls `tick`."""

    def __init__(self, runtime: Runtime, upstreams: Upstreams, say: Say | None) -> None:
        """`say` tells the parent a server's name and view; False: it takes no more now. None: there is no parent."""
        self._runtime = runtime
        self._upstreams = upstreams
        self._own = Outages(runtime.settings.upstreams, runtime.time()) if say is None else None
        self._say = say or self._judge
        self._told: dict[Upstream, tuple[ServerView, float]] = {}  # the last report of each server, and its time
        self._listed: dict[Upstream, tuple[frozenset[str], tuple[str, ...]]] = {}  # a list, and its names in order
        self.verdicts: dict[str, ServerView] = dict(self._own.verdicts()) if self._own is not None else {}

    def reload(self, settings: Settings) -> None:
        """The settings have changed; the upstreams have them already."""
        if self._own is not None:
            self._own.take(settings.upstreams, self._runtime.time())
            self.hear(self._own.verdicts())
        names = {each.settings.name for each in self._upstreams}
        self.verdicts = {name: verdict for name, verdict in self.verdicts.items() if name in names}
        self.hear([])
        self._told = {each: self._told[each] for each in self._upstreams if each in self._told}
        self._listed = {each: self._listed[each] for each in self._upstreams if each in self._listed}

    def hear(self, verdicts: Sequence[tuple[str, ServerView]]) -> None:
        """The parent tells its verdicts on some of the servers."""
        self.verdicts.update(verdicts)
        for upstream in self._upstreams:
            upstream.is_up = not self.verdicts.get(upstream.settings.name, ServerView()).state.is_down

    def tick(self, now: float, lag_s: float) -> None:
        """Report what the parent doesn't know yet."""
        for upstream in self._upstreams:
            view = upstream.health.view(now, self._listed_by(upstream))
            before, told_at = self._told.get(upstream, (ServerView(), 0.0))
            if not self._is_news(upstream.settings.name, view, before):
                continue
            if view.state is before.state and now < told_at + AGAIN_EVERY_S:
                continue
            if self._say(upstream.settings.name, view):
                self._told[upstream] = (view, now)
        if self._own is not None:
            self._own.tick(now)

    def _listed_by(self, upstream: Upstream) -> tuple[str, ...]:
        """The models that the server has listed, as far as they are told by name."""
        names, shown = self._listed.get(upstream, (frozenset(), ()))
        if names is not upstream.listed:
            names = upstream.listed
            few = names if len(names) <= LISTED_MAX else ()
            shown = tuple(sorted(name for name in few if len(name) <= MODEL_CHARS_MAX))
            self._listed[upstream] = (names, shown)
        return shown

    def _is_news(self, name: str, view: ServerView, before: ServerView) -> bool:
        if view == before:
            return False
        if view.state is not ServerState.UP or before.state is not ServerState.UP or view.listed != before.listed:
            return True
        verdict = self.verdicts.get(name)
        return verdict is not None and verdict.failures > 0 and view.judged_at > verdict.judged_at

    def _judge(self, name: str, view: ServerView) -> bool:
        assert self._own is not None
        self._own.report(0, name, view, self._runtime.time())
        self.hear(self._own.verdicts())
        return True

    # -- for /status and /metrics

    def shown(self, name: str) -> dict[str, Any]:
        """The verdict on a server, for /status."""
        verdict, runtime = self.verdicts.get(name, ServerView()), self._runtime
        now = runtime.time()
        return {
            "state": verdict.state.value,
            "since_s": round(max(0.0, now - verdict.since), 1),
            "failures": verdict.failures,
            "last_error": verdict.error or None,
            "last_reason": verdict.reason or None,
        }
