"""Outages: how each inference server stands for the daemon as a whole, and the log lines of its outages.

Each worker judges a server by its own requests, so several workers find the same outage, each at a time of its own. The
parent hears all of them and decides: the newest evidence counts, a good answer or a failure, in whichever worker. So an
outage is told once, and a server is back for all with the first answer that any worker gets. The workers are told the
verdicts in return (daemon/upstream_reports.py), and /status and /metrics show them.

    upstream out          WARNING, with the last error
    upstream back         INFO
    no upstream left      ERROR: models that no server answers for any more
    models served again   INFO

A server that comes and goes would fill the log. So of each server OUT_LINES_MAX outages are told at once and further
ones once in OUT_LINE_EVERY_S; the next line counts the outages in between. A server that is out when its time comes is
told then: the log's last word is true. Rejected: a worker that writes the line and shows the others that it has done so
(the line would be lost with the worker's death between the two), and waiting for a second failure (an idle daemon would
tell of a dead server an hour late).

The parent imports this module, so it imports nothing of the data path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from streamd.config import UpstreamSettings
from streamd.daemon import logs
from streamd.server_state import ServerState, ServerView

# An on-call person takes note of the first outages; an hour of a server that comes and goes is 60 pairs of lines more.
OUT_LINES_MAX: Final = 3
OUT_LINE_EVERY_S: Final = 60.0

# Names in a line or in the status of the unit; the rest is counted.
NAMES_SHOWN_MAX: Final = 8

Tell = Callable[..., None]


class _Server:
    """A server, the workers' views of it, and the part of its story that the log has."""

    def __init__(self, settings: UpstreamSettings, now: float) -> None:
        self.settings = settings
        self.views: dict[int, ServerView] = {}  # by slot
        self.verdict = ServerView(since=now)
        self.is_told_out = False  # whether the log's last line about it says that it is out
        self.untold = 0  # outages without a line since the last that has one
        self._lines = float(OUT_LINES_MAX)
        self._refilled_at = now

    def judge(self, now: float) -> None:
        """Make the verdict of all views."""
        newest = max(self.views.values(), key=lambda view: view.judged_at, default=self.verdict)
        before = self.verdict
        since = before.since
        if _phase(newest.state) != _phase(before.state):
            since = newest.since if newest.since > before.since else newest.judged_at or now
            self.untold += newest.state.is_down
        answered_at = max((each.judged_at for each in self.views.values() if not each.failures), default=0.0)
        failing = [each for each in self.views.values() if each.failures and each.judged_at >= answered_at]
        last = newest if newest.failures else before
        self.verdict = ServerView(
            newest.state,
            newest.judged_at,
            since,
            sum(each.failures for each in failing) if newest.failures else 0,
            last.reason,
            last.error,
            newest.listed or next((each.listed for each in self.views.values() if each.listed), ()),
        )

    def may_tell_outage(self, now: float) -> bool:
        """Whether an outage may have its line now; takes it if so."""
        self._lines = min(OUT_LINES_MAX, self._lines + (now - self._refilled_at) / OUT_LINE_EVERY_S)
        self._refilled_at = now
        if self._lines < 1.0:
            return False
        self._lines -= 1.0
        return True

    def lists(self, model: str) -> bool:
        """Whether the model, by the server's own name for it, is in its list."""
        return self.settings.aliases.get(model, model) in self.verdict.listed

    def names(self, model: str) -> bool:
        """Whether the settings name the model for this server."""
        return model in self.settings.models or model in self.settings.aliases


def _phase(state: ServerState) -> ServerState:
    """The state, with that of a probe a part of the outage."""
    return ServerState.OUT if state.is_down else state


class Outages:
    """All servers of the daemon's settings. `tell` writes a log line."""

    def __init__(self, upstreams: Iterable[UpstreamSettings], now: float, tell: Tell = logs.event) -> None:
        self._servers: dict[str, _Server] = {}
        self._tell = tell
        self._lost: frozenset[str] = frozenset()  # models that no server answers for, as the log has it
        self.version = 0  # grows with each change of a verdict
        self.take(upstreams, now)

    def take(self, upstreams: Iterable[UpstreamSettings], now: float) -> None:
        """These are the servers from now on. Those with other settings than before are new, and up."""
        known, self._servers = self._servers, {}
        for each in upstreams:
            before = known.get(each.name)
            is_same = before is not None and before.settings == each
            self._servers[each.name] = before if before is not None and is_same else _Server(each, now)
        self.version += 1
        self._tell_models()

    # -- evidence

    def report(self, slot: int, name: str, view: ServerView, now: float) -> None:
        """A worker's view of a server has changed. A server that the settings no longer name is passed over."""
        server = self._servers.get(name)
        if server is None:
            return
        server.views[slot] = view
        self._judge(server, now)

    def worker_gone(self, slot: int, now: float) -> None:
        """A worker has ended: its evidence stays, but the time for which it left a server out is over."""
        for server in self._servers.values():
            view = server.views.get(slot)
            if view is not None and view.state is ServerState.OUT:
                server.views[slot] = view._replace(state=ServerState.PROBING)
                self._judge(server, now)

    def _judge(self, server: _Server, now: float) -> None:
        before = server.verdict
        server.judge(now)
        self.version += server.verdict != before
        self._tell_of(server, now)

    # -- the log

    def tick(self, now: float) -> None:
        """From time to time: tell of the outages that had to wait for their line."""
        for server in self._servers.values():
            self._tell_of(server, now)

    def _tell_of(self, server: _Server, now: float) -> None:
        verdict = server.verdict
        is_out = verdict.state.is_down
        if is_out == server.is_told_out or (is_out and not server.may_tell_outage(now)):
            return
        server.is_told_out = is_out
        name = server.settings.name
        if is_out:
            outages, server.untold = server.untold, 0
            self._tell(
                logs.WARNING,
                "upstream out",
                upstream=name,
                reason=verdict.reason or None,
                error=verdict.error or None,
                failures=verdict.failures,
                outages=outages if outages > 1 else None,
            )
        else:
            self._tell(logs.INFO, "upstream back", upstream=name, last_error=verdict.error or None)
        self._tell_models()

    def _tell_models(self) -> None:
        """Tell of models that have lost their last server, or have a server again."""
        if not self._lost and not any(each.is_told_out for each in self._servers.values()):
            return
        able = {model: self._able(model) for model in self._models()}
        lost = frozenset(model for model, servers in able.items() if all(each.is_told_out for each in servers))
        before, self._lost = self._lost, lost
        if fresh := lost - before:
            names = dict.fromkeys(each.settings.name for model in sorted(fresh) for each in able[model])
            self._tell(logs.ERROR, "no upstream left", models=_shown(sorted(fresh)), upstreams=_shown(names))
        if again := before & able.keys() - lost:
            self._tell(logs.INFO, "models served again", models=_shown(sorted(again)))

    def _models(self) -> Iterator[str]:
        """All models that the settings name, `*` among them, and those that servers have listed."""
        for server in self._servers.values():
            yield from server.settings.models
            yield from server.settings.aliases
            yield from server.verdict.listed

    def _able(self, model: str) -> list[_Server]:
        """The servers that requests for the model go to while all of them are up (net/upstreams.py)."""
        servers = self._servers.values()
        able = [each for each in servers if each.names(model)] or [each for each in servers if each.names("*")]
        return [each for each in able if each.lists(model)] or able

    # -- for others

    def verdicts(self) -> list[tuple[str, ServerView]]:
        """The verdict on each server, by name."""
        return [(name, server.verdict) for name, server in self._servers.items()]

    def summary(self) -> str:
        """The servers that are out, for the status of the unit: "1 of 2 upstreams out: gpu2"; "" if none is."""
        out = [name for name, server in self._servers.items() if server.verdict.state.is_down]
        return f"{len(out)} of {len(self._servers)} upstreams out: {', '.join(_shown(out))}" if out else ""


def _shown(names: Iterable[str]) -> tuple[str, ...]:
    """The first of the names, and the number of the others."""
    several = tuple(names)
    rest = len(several) - NAMES_SHOWN_MAX
    return several if rest <= 0 else (*several[:NAMES_SHOWN_MAX], f"and {rest} more")
