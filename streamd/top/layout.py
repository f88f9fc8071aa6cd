"""The columns of a table that fit a terminal: in the order of their use, as many as there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len

from streamd.top.views import ViewColumn

# Beside a cell: a blank on each side.
PADDING = 2
# Room for the arrow of the sort.
ARROW = 2
# Numbers change each second; with less room for them columns would come and go.
NUMBER_WIDTH_MIN = 6
# With fewer columns than these, columns of words are cut.
COLUMNS_MIN = 5
# A column of words isn't cut below this width: the start of an address or a name is still a help.
WORDS_WIDTH_MIN = 10


class Placed(NamedTuple):
    """A column and its width, without padding."""

    column: ViewColumn
    width: int


def placed(columns: Sequence[ViewColumn], cells: Sequence[Sequence[str]], sorted_by: str, room: int) -> list[Placed]:
    """The columns for `room` cells of width. `cells`: each row's cells, in the columns' order.

    The column that rows are sorted by is always there, and so is the first; where the room is small, columns of words
    are cut.
    """
    widths = []
    for k, column in enumerate(columns):
        widest = max((min(cell_len(row[k]), column.width_max) for row in cells), default=0)
        widths.append(max(cell_len(column.head) + ARROW, NUMBER_WIDTH_MIN, widest))
    found = _fitting(columns, widths, sorted_by, room)
    if len(found) == len(columns) or len(found) >= COLUMNS_MIN:
        return found
    cut = [
        min(width, max(WORDS_WIDTH_MIN, cell_len(column.head) + ARROW)) if column.is_word else width
        for column, width in zip(columns, widths, strict=True)
    ]
    return _fitting(columns, cut, sorted_by, room)


def _fitting(columns: Sequence[ViewColumn], widths: Sequence[int], sorted_by: str, room: int) -> list[Placed]:
    kept = {0, next(k for k, column in enumerate(columns) if column.head == sorted_by)}
    left = room - sum(widths[k] + PADDING for k in kept)
    for k, width in enumerate(widths):
        if k not in kept:
            if width + PADDING > left:
                continue
            left -= width + PADDING
            kept.add(k)
    return [Placed(columns[k], widths[k]) for k in sorted(kept)]
