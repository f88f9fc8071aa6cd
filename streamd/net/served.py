"""Served: the pairs of an upstream and a model that requests are counted under, in a list that is bounded.

A client writes any model into a request, so a metric names those alone that an operator has configured or an upstream
lists, at most MODELS_MAX; all others are `other`. The workers of a daemon share the list, because a place in a row of
counts (net/totals.py) is found by a pair's index. It only grows: a count that loses its name would fall.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

# Models that metrics name; a server that runs models itself has a few.
MODELS_MAX: Final = 100

# Pairs that metrics name: each of 100 models at two upstreams, and `other` at each of 56 (net/totals.py names 64).
PAIRS_MAX: Final = 256

# Places that pairs of known models leave to the pairs of `other`.
OTHERS_MIN: Final = 64

# Longest name, in bytes. An upstream's has at most 128, Hugging Face's names of models 96.
NAME_BYTES_MAX: Final = 160

OTHER: Final = "other"


class Served(NamedTuple):
    """An upstream and a model: the labels of a measure."""

    upstream: str
    model: str


class ServedBoard(Protocol):
    """The list that all workers share."""

    def pairs(self) -> list[Served]:
        """The pairs by index."""

    def add_pair(self, pair: Served) -> bool:
        """Append a pair, unless another worker has done it. False: the list is full."""


class OwnBoard:
    """The list of a worker that is alone."""

    def __init__(self) -> None:
        self._pairs: list[Served] = []

    def pairs(self) -> list[Served]:
        return self._pairs

    def add_pair(self, pair: Served) -> bool:
        if len(self._pairs) >= PAIRS_MAX:
            return False
        self._pairs.append(pair)
        return True


class ServedPairs:
    """Finds the pair under which a request is counted; the first request of a pair adds it to the list."""

    def __init__(self) -> None:
        self.board: ServedBoard = OwnBoard()
        self._known: dict[tuple[str, str], Served] = {}  # at most PAIRS_MAX

    def of(self, upstream: str, model: str, *, is_named: bool) -> Served:
        """The pair of a request; `is_named`: the settings or an upstream's list have the model."""
        if is_named:
            known = self._known.get((upstream, model))
            if known is not None:
                return known
        other = Served(upstream, OTHER)
        pair = Served(upstream, model) if is_named and 0 < len(model.encode()) <= NAME_BYTES_MAX else other
        found = self._known.get(pair)
        if found is None:
            found = self._enter(pair, other)
            if found == pair:
                self._known[pair] = found
        return found

    def _enter(self, pair: Served, other: Served) -> Served:
        pairs = self.board.pairs()
        if pair in pairs:
            return pair
        named = [each for each in pairs if each.model != OTHER]
        models = {each.model for each in named}
        is_full = len(named) >= PAIRS_MAX - OTHERS_MIN or (pair.model not in models and len(models) >= MODELS_MAX)
        if pair.model != OTHER and is_full:
            return self.of(other.upstream, OTHER, is_named=False)
        if self.board.add_pair(pair):
            return pair
        return pairs[-1] if pairs else pair
