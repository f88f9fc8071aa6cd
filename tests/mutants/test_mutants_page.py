"""The page of the mutants' runs: rows that were written are read back, and the page says what is missing."""

from __future__ import annotations

from pathlib import Path

from mutants_page import NOT_ASKED, Row, read, written

KILLED = Row("core/a.py", "a token is lost", "core/test_a.py::test_tokens", "", "0123abc", "seed 5, 2 s")
EXCUSED = Row("core/a.py", "a line is longer", "", "readers can't see it", "4567def", "not found")
SURVIVED = Row("net/b.py", "a reader hangs", "", "", "0123abc", NOT_ASKED)
HARMS = [(row.file, row.harm) for row in (KILLED, EXCUSED, SURVIVED)]


def test_rows_are_read_back_and_the_page_counts_them(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    assert read(page) == {}
    rows = {row.harm: row for row in (SURVIVED, KILLED, EXCUSED)}
    text = written(rows, [*HARMS, ("net/b.py", "a reader waits")], "a machine")
    page.write_text(text, encoding="utf-8")
    assert read(page) == rows
    assert "4 mutants: 1 killed by their module's tests, 2 survived, 1 of these without a reason; 1 not run" in text
    assert "rows of 2 commits: 0123abc, 4567def" in text
    assert "asked about 2 and found 1" in text


def test_rows_of_mutants_that_are_gone_leave_the_page(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text(written({row.harm: row for row in (KILLED, SURVIVED)}, HARMS[:1], "a machine"), encoding="utf-8")
    assert list(read(page)) == [KILLED.harm]
