"""The columns that fit a terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamd.top.layout import PADDING, placed
from streamd.top.views import VIEWS, ViewColumn

ROW = {
    "id": "r_A20b6bc295c76206a67",
    "key_name": "alice",
    "peer": "10.20.30.40:34810",
    "state": "paused",
    "stream": "s_AVsyWlG3zbzvekGuUZ6pIfaulIQ",
    "model": "llama-3.1-8b",
    "upstream": "gpu1",
    "position": 92,
    "last_seq": 120,
    "lag_events": 28,
}
COLUMNS = VIEWS["readers"].columns
CELLS = [[column.cell(ROW) for column in COLUMNS]]


def heads(room: int, sorted_by: str = "LAG") -> list[str]:
    return [each.column.head for each in placed(COLUMNS, CELLS, sorted_by, room)]


def test_a_wide_terminal_has_all_columns_and_a_narrow_one_the_most_useful() -> None:
    assert heads(300) == [column.head for column in COLUMNS]
    assert heads(80)[:6] == ["KEY", "PEER", "STATE", "LAG", "BEHIND", "PAUSED"]
    assert heads(46)[:4] == ["KEY", "PEER", "STATE", "LAG"], "words are cut before columns are left out"


@given(st.integers(1, 320), st.sampled_from([column.head for column in COLUMNS]))
def test_the_columns_fit_and_the_sorted_column_is_there(room: int, sorted_by: str) -> None:
    found = placed(COLUMNS, CELLS, sorted_by, room)
    names = [each.column.head for each in found]
    assert sorted_by in names and names[0] == "KEY" and names == [c.head for c in COLUMNS if c.head in names]
    assert len(found) <= 2 or sum(each.width + PADDING for each in found) <= room


def test_a_long_name_is_bounded_and_wide_characters_count_twice() -> None:
    column = ViewColumn("MODEL", lambda row: str(row["model"]), "model", is_word=True, width_max=24)
    assert placed([column], [["m" * 90]], "MODEL", 200)[0].width == 24
    assert placed([column], [["模型模型模型"]], "MODEL", 200)[0].width == 12
    assert placed([column], [], "MODEL", 200)[0].width == 7
