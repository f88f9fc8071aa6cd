"""The page of long searches: parts add up, and a page that was written is read back."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from sim_page import Part, add, commit, read, written

SITUATIONS = ("a farewell", "a reader ends: stalled", "a pause")
FIRST = Part("0123abc", 7, 26, 100_000, 2_439_502, 1.57)
SECOND = Part("0123abc-dirty", 900, 900, 5_000, 5_810, 0.25)


def test_parts_add_up_over_several_searches(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    add(page, "sim-nodes", FIRST, Counter({"a farewell": 1_200, "a reader ends: stalled": 3}), SITUATIONS)
    add(page, "sim-nodes", SECOND, Counter({"a farewell": 34}), SITUATIONS)
    text = page.read_text(encoding="utf-8")
    assert read(text) == ([FIRST, SECOND], Counter({"a farewell": 1_234, "a reader ends: stalled": 3}))
    assert "2,445,312 steps of 21 seeds in 2 parts" in text
    assert "1.34 million steps a minute" in text
    assert "`make sim-nodes ARGS='--page tests/sim/RESULTS-NODES.md'` adds a part" in text
    assert "streamd at 0123abc to 0123abc-dirty" in text


def test_the_page_names_the_situations_that_were_never_reached() -> None:
    text = written("sim", [FIRST], Counter({"a farewell": 2}), SITUATIONS)
    assert "- 1 of 3 situations were reached: not a reader ends: stalled; a pause" in text
    assert "3 of 3 situations were reached\n" in written("sim", [FIRST], Counter(SITUATIONS), SITUATIONS)


def test_the_commit_of_the_simulated_code_is_named() -> None:
    assert re.fullmatch("[0-9a-f]{7,}(-dirty)?", commit())
