"""A scenario's report: the figures, their targets, and whether each target was met.

Each figure is printed as soon as it is known; `line` is the report as a line of JSON. Standard library only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """An entry of headline.py: `flags` adds its flags to a parser, `run` measures."""

    name: str
    promise: str  # the claim to be shown, in a line
    flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Report], None]


@dataclass
class Report:
    """Figures by name, and whether each target was met."""

    scenario: str
    figures: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    holds: dict[str, bool] = field(default_factory=dict)

    def tell(self, name: str, figure: Any) -> None:
        """Report a figure without a target."""
        self.figures[name] = figure
        print(f"        {name} = {_shown(figure)}", flush=True)

    def at_most(self, name: str, figure: float | None, bound: float) -> None:
        """Report a figure with an upper bound. A missing figure (None) meets no target."""
        self._judge(name, figure, f"at most {bound:g}", figure is not None and figure <= bound)

    def at_least(self, name: str, figure: float | None, bound: float) -> None:
        """Report a figure with a lower bound."""
        self._judge(name, figure, f"at least {bound:g}", figure is not None and figure >= bound)

    def between(self, name: str, figure: float | None, least: float, most: float) -> None:
        """Report a figure with both bounds."""
        holds = figure is not None and least <= figure <= most
        self._judge(name, figure, f"{least:g} to {most:g}", holds)

    def exactly(self, name: str, figure: float, wanted: float) -> None:
        """Report a count that must have a certain value."""
        self._judge(name, figure, f"{wanted:g}", figure == wanted)

    def _judge(self, name: str, figure: float | None, target: str, holds: bool) -> None:
        self.figures[name] = figure
        self.targets[name] = target
        self.holds[name] = holds
        print(f"{'ok     ' if holds else 'FAILED '} {name} = {_shown(figure)} (target: {target})", flush=True)

    @property
    def all_hold(self) -> bool:
        """Whether every target was met."""
        return all(self.holds.values())

    def line(self, **more: object) -> str:
        """The whole report as a line of JSON."""
        mine = {
            "scenario": self.scenario,
            "holds": self.all_hold,
            "missed": [n for n, ok in self.holds.items() if not ok],
        }
        return json.dumps({**mine, "figures": self.figures, "targets": self.targets, **more})


def quantile(values: list[float], q: float) -> float | None:
    """The smallest value that at least a share q of the values doesn't exceed; None without a value."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]


def spread_of(name: str, values_ms: list[float]) -> dict[str, float | int]:
    """The usual figures of a list of milliseconds: count, p50, p99 and maximum, by name."""
    if not values_ms:
        return {f"{name}_count": 0}
    quantiles = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {f"{name}_count": len(values_ms)} | {
        f"{name}_{key}_ms": round(quantile(values_ms, q) or 0.0, 2) for key, q in quantiles.items()
    }


def _shown(figure: Any) -> str:
    return f"{figure:.4g}" if isinstance(figure, float) else str(figure)
