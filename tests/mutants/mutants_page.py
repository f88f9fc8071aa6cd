"""The page of the mutants' runs: each run with `--page` renews its mutants' rows, so that parts make a whole run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_ROW = re.compile(r"^\| (\S+\.py) \| (.+?) \| (.+?) \| (\S+) \| (.+?) \|$", re.MULTILINE)
_KILLER = re.compile(r"`([^`]+)`")
NOT_ASKED = "–"


class Row(NamedTuple):
    """The last run of a mutant."""

    file: str
    harm: str
    killed_by: str  # the first test that failed, below tests/; "": survived
    reason: str  # why no test kills it
    commit: str  # of the code that was run
    simulator: str  # the seed that found it, in words

    def line(self) -> str:
        """The row as Markdown."""
        killed = f"`{self.killed_by}`" if self.killed_by else f"**survived** {self.reason}".rstrip()
        return f"| {self.file} | {self.harm} | {killed} | {self.commit} | {self.simulator} |"


def read(page: Path) -> dict[str, Row]:
    """The rows of a page by their mutants' harms; none if there is no page."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    rows = {}
    for file, harm, killed, commit, simulator in _ROW.findall(text):
        killer = _KILLER.fullmatch(killed)
        reason = "" if killer else killed.removeprefix("**survived**").strip()
        if commit != NOT_ASKED:
            rows[harm] = Row(file, harm, killer[1] if killer else "", reason, commit, simulator)
    return rows


def written(rows: Mapping[str, Row], harms: Sequence[tuple[str, str]], machine: str) -> str:
    """The page as Markdown. `harms`: file and harm of all mutants, in the order of the table."""
    known = [rows[harm] for _, harm in harms if harm in rows]
    survived = [row for row in known if not row.killed_by]
    commits = list(dict.fromkeys(row.commit for row in known))
    asked = [row for row in known if row.simulator != NOT_ASKED]
    found = sum(row.simulator != "not found" for row in asked)
    unexplained = sum(not row.reason for row in survived)
    lines = [
        "# Mutants",
        "",
        "`make mutants ARGS=--page` runs all of them and renews this page; ONLY=pattern renews some rows, and",
        f"ARGS='--page --rest' those that weren't run on this commit. Last run on {machine}, beside other work.",
        "",
        f"- {len(harms)} mutants: {len(known) - len(survived)} killed by their module's tests, "
        f"{len(survived)} survived, {unexplained} of these without a reason; {len(harms) - len(known)} not run",
        f"- rows of {len(commits)} commits: {', '.join(commits)}",
        f"- the simulator was asked about {len(asked)} and found {found}",
        "",
        "| file | with this edit … | killed by | on | simulator |",
        "| --- | --- | --- | --- | --- |",
        *(
            rows[harm].line() if harm in rows else f"| {file} | {harm} | not run | {NOT_ASKED} | {NOT_ASKED} |"
            for file, harm in harms
        ),
    ]
    return "\n".join(lines) + "\n"
