"""Upstreams: chooses the inference server for a request."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

from streamd.config import Settings
from streamd.core.refusal import Refusal, Retry
from streamd.net.catalogue import Catalogue, sharing
from streamd.net.checks import Checks
from streamd.net.http_error import HttpError
from streamd.net.knocks import Knocks
from streamd.net.runtime import Runtime
from streamd.net.served import MODELS_MAX, Served, ServedBoard, ServedPairs
from streamd.net.upstream import InFlightBoard, Upstream
from streamd.reasons import CloseReason


class SharedBoard(InFlightBoard, ServedBoard, Protocol):
    """What the workers share about upstreams."""


NONE_AVAILABLE = Refusal(
    CloseReason.NO_UPSTREAM,
    "no_upstream_available",
    "No upstream can take this request now: all are at their limit or failing. Try again shortly.",
    retry=Retry.SOON,
)


# Upstreams that a line of the log can hold.
EXPLAINED_MAX = 16


class Upstreams:
    """All configured upstreams. Choice: by the request's model (named before `*`), health, the least in flight."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self._runtime = runtime
        self._all = [Upstream(runtime, each) for each in settings.upstreams]
        self._board: SharedBoard | None = None
        self._checks = Checks(runtime)
        self._knocks = Knocks(runtime)
        self._catalogue = Catalogue(runtime)
        self.pairs = ServedPairs()  # the labels of requests in metrics
        self._take_all()

    def _take_all(self) -> None:
        self._checks.take(self._all)
        self._knocks.take(sharing(self._all))
        self._catalogue.take(self._all)

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def reload(self, settings: Settings) -> None:
        """Apply new settings: unchanged upstreams keep their connections, removed upstreams finish their requests."""
        self.take(self.prepare(settings))

    def prepare(self, settings: Settings) -> list[Upstream]:
        """The upstreams of new settings, not in use yet. Raises OSError for certificates that can't be used."""
        by_settings: dict[str, Upstream] = {up.settings.name: up for up in self._all}
        fresh = []
        for each in settings.upstreams:
            known = by_settings.get(each.name)
            fresh.append(known if known is not None and known.settings == each else Upstream(self._runtime, each))
        return fresh

    def take(self, fresh: list[Upstream]) -> None:
        """Use these upstreams, which prepare() made, from now on."""
        for upstream in self._all:
            if upstream not in fresh:
                upstream.removed = True
                upstream.close_idle()
        self._all = fresh
        self._take_all()
        if self._board is not None:
            self.share(self._board)

    def served(self, upstream: str, model: str) -> Served:
        """The upstream and model under which a request is counted: names of the settings and of lists alone."""
        return self.pairs.of(upstream, model, is_named=self._is_named(model))

    def _is_named(self, model: str) -> bool:
        if model == "*":
            return False
        return bool([up for up in self._all if model in up.listed or up.names(model)])

    def named_models(self) -> tuple[Served, ...]:
        """The models that settings and lists name, each with its upstreams: at most MODELS_MAX models."""
        named = [(up.settings.name, up.models_named()) for up in self._all]
        models = dict.fromkeys(model for _, names in named for model in names)
        shown = set(itertools.islice(models, MODELS_MAX))
        return tuple(Served(upstream, model) for upstream, names in named for model in names if model in shown)

    def share(self, board: SharedBoard) -> None:
        """Publish the number of requests under way to the other workers, and name requests in metrics as they do."""
        self._board = self.pairs.board = board
        for upstream in self._all:
            upstream.board = board

    def tick(self, now: float, lag_s: float) -> None:
        """Every sweep: close connections that have been idle too long, and ask what is due to be asked."""
        for upstream in self._all:
            upstream.trim(now)
        self._checks.tick(now)
        self._knocks.tick(now)
        self._catalogue.tick(now)

    def start(self) -> None:
        """The worker begins to serve: learn which upstream has which model."""
        self._catalogue.tick(self._runtime.time())

    def close(self) -> None:
        self._checks.stop()
        self._knocks.take(())
        self._catalogue.stop()
        for upstream in self._all:
            upstream.close_idle()

    def has(self, name: str) -> bool:
        """Whether an upstream of that name is configured."""
        return any(up.settings.name == name for up in self._all)

    def choose(
        self, model: str, now: float, *, principal: str = "", at: str = "", without: tuple[Upstream, ...] = ()
    ) -> Upstream:
        """The upstream for a request; `at` as in Ask. Raises HttpError: 404 for an unknown model, 503 if none can take
        it now.

        Where all are left out, an upstream that answers with errors is asked all the same: its own error says more.
        Without such an upstream the request is the probe of another, if that is due for it.
        """
        candidates = self._candidates(model, at)
        if not candidates:
            raise self._unserved(model)
        chosen = _free(candidates, model, now, principal, without)
        if chosen is not None:
            return chosen
        if any(up not in without and up.health.takes(principal, now) for up in candidates):
            raise self._runtime.refused(NONE_AVAILABLE)  # only full
        left = [up for up in candidates if up not in without and not up.full()]
        able = [up for up in left if up.health.is_reachable()]
        able = able or [up for up in left if up.health.takes_last(principal, now)]
        if not able:
            raise self._runtime.refused(NONE_AVAILABLE)
        return min(able, key=lambda up: _order(up, model, principal, now))

    def free(
        self, model: str, now: float, *, principal: str = "", at: str = "", without: tuple[Upstream, ...] = ()
    ) -> Upstream | None:
        """The least busy upstream that serves the model, isn't full, and isn't left out for its failures.

        Upstreams that list the model come before others. Of equally busy upstreams the one that failed most recently
        comes last, and behind all others an upstream at which a connection has been awaited for long. A model's only
        upstream is never left out: trying it is the only way to serve at all.
        """
        return _free(self._candidates(model, at), model, now, principal, without)

    def explain(self, chosen: Upstream, model: str, now: float, principal: str, at: str) -> tuple[str, ...]:
        """The other upstreams for a request and why each wasn't chosen, as `name:reason`, for the story of a request.

        At most EXPLAINED_MAX.
        """
        others = [up for up in self._candidates(model, at) if up is not chosen]
        return tuple(f"{up.settings.name}:{_why_not(up, model, principal, now)}" for up in others[:EXPLAINED_MAX])

    def names_for(self, model: str, at: str = "") -> tuple[str, ...]:
        """The names of the upstreams that serve the model, busy or not."""
        return tuple(up.settings.name for up in self._candidates(model, at))

    def _candidates(self, model: str, at: str) -> list[Upstream]:
        """The upstreams that name the model, else those with `*`. Without a model: the first of the configuration."""
        if at:
            return [up for up in self._all if up.settings.name == at and (not model or up.serves(model))]
        if not model:
            return self._all[:1]
        named = [up for up in self._all if up.names(model)]
        return named or [up for up in self._all if up.serves(model)]

    def _unserved(self, model: str) -> HttpError:
        if not self._all:
            return HttpError(
                503,
                "No upstream is configured: start streamd with --upstream URL.",
                code="no_upstream",
                reason=CloseReason.NO_UPSTREAM,
            )
        return HttpError(
            404,
            f"The model {model[:200]!r} is not served here; GET /v1/models lists those that are.",
            code="model_not_found",
            param="model",
            reason=CloseReason.NOT_FOUND,
        )


def _why_not(upstream: Upstream, model: str, principal: str, now: float) -> str:
    """Why an upstream that serves the model isn't chosen."""
    if not upstream.health.takes(principal, now):
        return "left_out"
    if upstream.full():
        return "full"
    if upstream.health.is_awaited(now):
        return "slow_to_connect"
    listed = "" if upstream.lists(model) or not upstream.listed else "_not_listed"
    return f"{upstream.in_flight}_in_flight{listed}"


def _free(
    candidates: list[Upstream], model: str, now: float, principal: str, without: tuple[Upstream, ...]
) -> Upstream | None:
    if len(candidates) == 1:
        only = candidates[0]
        return None if only in without or only.full() else only
    able = [up for up in candidates if up not in without and not up.full() and up.health.takes(principal, now)]
    return min(able, key=lambda up: _order(up, model, principal, now), default=None)


def _order(upstream: Upstream, model: str, principal: str, now: float) -> tuple[bool, bool, int, float]:
    """The least comes first."""
    health = upstream.health
    return (health.is_awaited(now), not upstream.lists(model), upstream.in_flight, health.failed_at(principal))
