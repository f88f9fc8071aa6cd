"""The list of mutants still fits the code: rows can't go stale unnoticed when the code is moved or reworded."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutants import MUTANTS
from mutation import Mutant, Stale, applied

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file} {mutant.inside}")
def test_each_mutant_is_one_edit_of_todays_code(mutant: Mutant) -> None:
    source = (PROJECT / "streamd" / mutant.file).read_text(encoding="utf-8")
    text = applied(mutant, PROJECT / "streamd")
    assert text != source
    ast.parse(text, mutant.file)


def test_the_tests_named_by_mutants_exist() -> None:
    named = {name for mutant in MUTANTS for name in mutant.test_files}
    assert [name for name in sorted(named) if not (PROJECT / name).is_file()] == []


def test_no_two_mutants_have_the_same_harm() -> None:
    assert [harm for harm, count in Counter(mutant.harm for mutant in MUTANTS).items() if count > 1] == []


CODE = """\
class Door:
    def open(self) -> None:
        self.locked = False


class Gate:
    def open(self) -> None:
        self.locked = False
"""


@pytest.mark.parametrize(
    ("inside", "was", "says"),
    [
        ("Gate.shut", "self.locked", "there is no Gate.shut"),
        ("Gate.open", "self.barred", "stands 0 times"),
        ("", "self.locked", "stands 2 times"),
    ],
)
def test_a_row_that_no_longer_fits_is_stale(tmp_path: Path, inside: str, was: str, says: str) -> None:
    (tmp_path / "doors.py").write_text(CODE)
    with pytest.raises(Stale, match=says):
        applied(Mutant("", "doors.py", inside, was, ""), tmp_path)


def test_an_edit_changes_only_its_class_or_function(tmp_path: Path) -> None:
    (tmp_path / "doors.py").write_text(CODE)
    edited = applied(Mutant("", "doors.py", "Gate.open", "= False", "= True"), tmp_path)
    assert edited == CODE.replace(
        "class Gate:\n    def open(self) -> None:\n        self.locked = False",
        "class Gate:\n    def open(self) -> None:\n        self.locked = True",
    )
