"""The screen of `streamd top`: a head, four tables of which one is shown, a filter, and the keys.

A single loop looks at the daemon and waits: for the interval to pass, or for a key that changes the wish. The look
runs in a thread. What the keys change at once (sort, filter, table) is drawn from the last look, so that the screen
answers while the daemon doesn't.

All text comes from clients and servers in part: it is shown as plain text, never as the library's markup.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, cast

from rich.cells import set_cell_size
from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.widgets import DataTable, Footer, Input, Static, Tab, Tabs

from streamd.daemon.admin_cli import end, ended_line, seconds, shown
from streamd.daemon.admin_client import AdminClient, AdminRefusedError, AdminUnreachableError
from streamd.top.dialogs import ConfirmScreen, DetailsScreen
from streamd.top.filter import Filter
from streamd.top.head import TokenRate, alarms, facts, wrapped
from streamd.top.in_thread import in_thread
from streamd.top.layout import Placed, placed
from streamd.top.look import Sight, TableWish, look
from streamd.top.views import ALARMING, VIEWS, ViewColumn

# Rows drawn: some screens, since drawing costs this process time for each.
ROWS_SHOWN_MAX: Final = 200

# A terminal with fewer lines has a single line of facts, and no line below the tabs.
SMALL_LINES: Final = 16

# Below this width the keys in the footer stand closer.
NARROW: Final = 90

# How late an answer may be before the screen says so.
LATE_S: Final = 2.5

_ARROWS: Final = {False: "▼", True: "▲"}

# By whether the column is one of words, then by whether it is reversed.
_ORDERS: Final = {False: {False: "highest first", True: "lowest first"}, True: {False: "A to Z", True: "Z to A"}}

_DRAIN_TEXT: Final = (
    "Readiness turns to 503, the listeners close after drain_delay, running generations finish within drain_timeout,"
    " and the daemon stops. It can be taken back within drain_delay."
)
_KILL_TEXT: Final = (
    "A reader is told its position and may come back. A stream is cancelled for all its readers. A key isn't shut out:"
    " streamd keys revoke does that."
)


class _Rows(DataTable[Text]):
    """The table; its own key for a row is in the footer."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "details")]


class TopApp(App[None]):
    """The screen. `client` is asked every `interval_s`; `colours`: False for a terminal without them."""

    TITLE = "streamd top"
    ENABLE_COMMAND_PALETTE = False
    # Blue and orange differ for all kinds of colour blindness; each alarm has a word and a mark of its own as well.
    CSS = """
    #head { height: auto; padding: 0 1; }
    #trouble { height: auto; padding: 0 1; background: #e69f00; color: black; text-style: bold; }
    #alarms { height: auto; padding: 0 1; color: #e69f00; text-style: bold; }
    #caption { height: 1; padding: 0 1; color: $text-muted; }
    #filter { height: 1; border: none; padding: 0 1; }
    DataTable { height: 1fr; }
    DataTable > .datatable--cursor { text-style: bold; }
    .small Underline { display: none; }
    .small Tabs { height: 1; }
    ConfirmScreen, DetailsScreen { align: center middle; }
    #dialog { width: 90%; max-width: 90; height: auto; max-height: 95%; padding: 0 1; border: solid $primary;
        background: $surface; }
    #dialog OptionList { height: auto; border: none; margin: 1 0; }
    .hint { color: $text-muted; }
    App:nocolor DataTable > .datatable--cursor, App:nocolor Tab.-active,
    App:nocolor OptionList > .option-list--option-highlighted { text-style: reverse; }
    App:nocolor #trouble { text-style: reverse bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("1", "view('upstreams')", "view", key_display="1-4"),
        Binding("2", "view('streams')", show=False),
        Binding("3", "view('readers')", show=False),
        Binding("4", "view('keys')", show=False),
        Binding("tab", "next_view(1)", show=False, priority=True),
        Binding("shift+tab", "next_view(-1)", show=False, priority=True),
        Binding("s", "next_sort(1)", "sort", key_display="s/S"),
        Binding("S", "next_sort(-1)", show=False),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("escape", "clear_filter", show=False),
        Binding("k", "kill", "kill"),
        Binding("d", "drain", "drain"),
        Binding("r", "reverse", "reverse"),
        Binding("p", "pause", "pause"),
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]

    def __init__(
        self,
        client: AdminClient,
        *,
        interval_s: float,
        view: str,
        filter_text: str = "",
        colours: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Why: without colours the library shows greys, unless the colours are the terminal's own.
        super().__init__(ansi_color=None if colours else True)
        self._client = client
        self._interval_s = interval_s
        self._clock = clock
        self._view = VIEWS[view]
        self._sorts = {each.name: (each.sorted_by, False) for each in VIEWS.values()}
        self._filter_text = filter_text
        self._is_paused = False
        # the daemon
        self._rate = TokenRate()
        self._tokens_per_s: float | None = None
        self._looks: dict[str, Sight] = {}  # the last of each view
        self._status: Mapping[str, Any] | None = None  # the newest /status
        self._answered_at: float | None = None  # when the last look ended well
        self._asked_at: float | None = None  # when the look under way began
        self._trouble = ""
        # the table as it is drawn
        self._placed: list[Placed] = []
        self._heads: list[str] = []
        self._rows: list[Mapping[str, Any]] = []
        self._texts: dict[str, str] = {}  # of the lines above and below it
        self._wake = asyncio.Event()
        # the screen's parts: a dialog may lie above them
        self._statics = {name: Static(id=name) for name in ("head", "trouble", "alarms", "caption")}
        self._tabs = Tabs(*(Tab(each.title, id=each.name) for each in VIEWS.values()), active=view)
        self._table = _Rows(cursor_type="row", id="rows")
        self._line = Input(placeholder="words, key=NAME, model=NAME, stream=ID", id="filter")
        self._footer = Footer(show_command_palette=False)
        self.animation_level = "none"  # a terminal may be far away

    # -- the screen

    def compose(self) -> ComposeResult:
        """Build the screen."""
        yield from (self._statics[name] for name in ("head", "trouble", "alarms"))
        yield self._tabs
        yield self._table
        yield self._statics["caption"]
        yield self._line
        yield self._footer

    def on_mount(self) -> None:
        """Begin to look."""
        self._tabs.can_focus = False
        self._line.value = self._filter_text
        self._line.display = False
        self._table.focus()
        self._draw()
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
            # Without it a `kill` would leave the terminal in the state of this screen.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._ended_by_signal)
        self.set_interval(1.0, self._draw_head)
        self._watch()

    def _ended_by_signal(self) -> None:
        self.exit(return_code=128 + signal.SIGTERM)

    def on_resize(self, event: events.Resize) -> None:
        """Choose the columns anew."""
        self.screen_stack[0].set_class(event.size.height < SMALL_LINES, "small")
        self._footer.compact = event.size.width < NARROW
        self.call_after_refresh(self._draw)

    # -- the daemon

    @work(exclusive=True, group="watch")
    async def _watch(self) -> None:
        while True:
            began_at = self._clock()
            self._wake.clear()
            if not self._is_paused:
                await self._look_once()
            left_s = self._interval_s - (self._clock() - began_at)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.01, left_s))

    async def _look_once(self) -> None:
        self._asked_at = self._clock()
        try:
            found = await in_thread(functools.partial(look, self._client, self._wish()))
        except AdminUnreachableError as error:
            self._trouble = f"{shown(error)}."
        except AdminRefusedError as error:
            self._trouble = f"The daemon refuses: {shown(error)}"
        else:
            self._trouble = ""
            self._answered_at = self._clock()
            self._tokens_per_s = self._rate.add(self._answered_at, found.status.get("tokens_total"))
            self._looks[found.wish.view.name] = found
            self._status = found.status
        finally:
            self._asked_at = None
        self._draw()

    def _wish(self) -> TableWish:
        head, is_reversed = self._sorts[self._view.name]
        return TableWish(self._view, head, is_reversed, Filter.parse(self._filter_text))

    async def _tell(self, work: Callable[[], Any], done: Callable[[Any], str]) -> None:
        """Let the daemon do something, and say how it went."""
        try:
            answer = await in_thread(work)
        except (AdminUnreachableError, AdminRefusedError) as error:
            self.notify(shown(error), title="Not done", severity="error", markup=False, timeout=10)
        else:
            self.notify(done(answer), markup=False, timeout=10)
        self._wake.set()

    # -- drawing

    def _draw(self) -> None:
        if not self._table.is_attached:  # a look ended after the screen
            return
        self._draw_head()
        self._draw_rows()

    def _draw_head(self) -> None:
        status = self._status
        lines_max = 1 if self.size.height < SMALL_LINES else 4
        width = max(20, self.size.width - 2)
        head = wrapped(facts(status, self._tokens_per_s), width, lines_max) if status else ["streamd top"]
        warned = alarms(status) if status else []
        self._set("head", "\n".join(head))
        self._set("alarms", "\n".join(f"! {line}" for line in warned))
        self._set("trouble", self._trouble_text())

    def _trouble_text(self) -> str:
        now = self._clock()
        since = f" Last answer {seconds(now - self._answered_at)} ago." if self._answered_at is not None else ""
        if self._trouble:
            return f"! {self._trouble}{since} Trying again every {seconds(self._interval_s)}."
        if self._asked_at is not None and now - self._asked_at > max(LATE_S, self._interval_s):
            return f"! No answer for {seconds(now - self._asked_at)}; the daemon may be busy or stopped.{since}"
        return ""

    def _set(self, name: str, text: str) -> None:
        """Show a text, or nothing. A text that is there already isn't laid out anew."""
        if self._texts.get(name) != text:
            self._texts[name] = text
            self._statics[name].update(Text(text))
            self._statics[name].display = bool(text)

    def _draw_rows(self) -> None:
        found, view = self._looks.get(self._view.name), self._view
        head, is_reversed = self._sorts[view.name]
        wanted = Filter.parse(self._filter_text)
        asked = view.filters if found is not None and found.wish.filter.exact == wanted.exact else ()
        shown_rows = []
        for row in found.rows if found is not None else ():
            cells = [column.cell(row) for column in view.columns]
            if wanted.has(row, cells, asked):
                shown_rows.append(row)
        rows = view.arranged(shown_rows, head, is_reversed=is_reversed)[:ROWS_SHOWN_MAX]
        cells_of = [[column.cell(row) for column in view.columns] for row in rows]
        room = max(20, self.size.width - 2)
        fitting = placed(view.columns, cells_of, head, room)
        chosen = self._chosen_id()
        self._place(fitting, head, is_reversed)
        indices = [view.columns.index(each.column) for each in fitting]
        self._fill([[cells[k] for k in indices] for cells in cells_of])
        self._rows = rows
        self._choose(chosen)
        self._set("caption", self._caption(found, len(shown_rows), len(rows)))

    def _caption(self, found: Sight | None, passing: int, drawn: int) -> str:
        head, is_reversed = self._sorts[self._view.name]
        is_word = self._view.column(head).is_word
        order = _ORDERS[is_word][is_reversed]
        if found is None:
            return f"{self._view.title}: not seen yet"
        parts = [f"{self._view.title} by {head}, {order}: {drawn} of {found.total}"]
        if passing > drawn:
            parts.append(f"{passing - drawn} more pass the filter")
        if found.total > len(found.rows) and self._wish().query().get("limit") != str(drawn):
            parts.append(f"chosen among {len(found.rows)}")
        if self._filter_text:
            parts.append(f"filter: {self._filter_text}")
        if found.workers_missing:
            parts.append(f"! {found.workers_missing} worker(s) didn't answer in time: this isn't all")
        if self._is_paused:
            parts.append("! paused, p goes on")
        return "; ".join(parts)

    def _place(self, fitting: list[Placed], sorted_by: str, is_reversed: bool) -> None:
        """Make the table's columns, unless they are there already."""
        heads = [
            f"{each.column.head} {_ARROWS[is_reversed]}" if each.column.head == sorted_by else each.column.head
            for each in fitting
        ]
        if heads == self._heads and fitting == self._placed:
            return
        table = self._table
        table.clear(columns=True)
        for each, head in zip(fitting, heads, strict=True):
            justify = "left" if each.column.is_word else "right"
            table.add_column(Text(head, justify=cast("Any", justify)), width=each.width, key=each.column.head)
        self._placed, self._heads, self._rows = fitting, heads, []

    def _fill(self, cells: list[list[str]]) -> None:
        """Bring the rows of the table up to date, in place, so that neither cursor nor scroll bar jumps."""
        table = self._table
        while table.row_count > len(cells):
            table.remove_row(table.coordinate_to_cell_key(Coordinate(table.row_count - 1, 0)).row_key)
        for y, line in enumerate(cells):
            made = [_cell(text, each) for text, each in zip(line, self._placed, strict=True)]
            if y == table.row_count:
                table.add_row(*made)
                continue
            for x, text in enumerate(made):
                place = Coordinate(y, x)
                if table.get_cell_at(place) != text:
                    table.update_cell_at(place, text)

    def _chosen_id(self) -> str:
        row = self._chosen_row()
        return self._view.id_of(row) if row is not None else ""

    def _chosen_row(self) -> Mapping[str, Any] | None:
        y = self._table.cursor_row
        return self._rows[y] if 0 <= y < len(self._rows) and self._table.row_count else None

    def _choose(self, row_id: str) -> None:
        """Put the cursor back on the row of this id, wherever it went; else it stays at its line."""
        for y, row in enumerate(self._rows):
            if row_id and self._view.id_of(row) == row_id:
                if y != self._table.cursor_row:
                    self._table.move_cursor(row=y, animate=False)
                return

    # -- keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Under a dialog the table stays, though Tab goes before a dialog's own keys."""
        return action != "next_view" or len(self.screen_stack) == 1

    def action_view(self, name: str) -> None:
        """Show a table."""
        self._tabs.active = name

    def action_next_view(self, step: int) -> None:
        """Show the table beside."""
        names = list(VIEWS)
        self.action_view(names[(names.index(self._view.name) + step) % len(names)])

    def on_tabs_tab_activated(self, event: Tabs.TabActivated) -> None:
        """Another table was chosen, by a key or by a click."""
        name = event.tab.id
        if name is not None and name != self._view.name:
            self._view = VIEWS[name]
            self._rows = []
            self._table.move_cursor(row=0, animate=False)
            self._changed()

    def action_next_sort(self, step: int) -> None:
        """Sort by the column beside."""
        heads = [column.head for column in self._view.columns]
        head, _ = self._sorts[self._view.name]
        self._sort_by(heads[(heads.index(head) + step) % len(heads)], is_reversed=False)

    def action_reverse(self) -> None:
        """Sort the other way."""
        head, is_reversed = self._sorts[self._view.name]
        self._sort_by(head, is_reversed=not is_reversed)

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """A click sorts by its column; another click reverses."""
        clicked = str(event.column_key.value)
        head, is_reversed = self._sorts[self._view.name]
        self._sort_by(clicked, is_reversed=clicked == head and not is_reversed)

    def _sort_by(self, head: str, *, is_reversed: bool) -> None:
        self._sorts[self._view.name] = (head, is_reversed)
        self._changed()

    def action_filter(self) -> None:
        """Let the user type a filter."""
        self._line.display = True
        self.screen.set_focus(self._line)  # at once, for keys that were typed ahead

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as the user types."""
        self._filter_text = event.value
        self._changed()

    def on_input_submitted(self) -> None:
        """The filter is complete: back to the table."""
        self.screen.set_focus(self._table)
        self._line.display = False

    def action_clear_filter(self) -> None:
        """Show all rows."""
        self._line.value = ""
        self.on_input_submitted()

    def action_pause(self) -> None:
        """Stop looking, to read or copy; or go on."""
        self._is_paused = not self._is_paused
        self._changed()

    def _changed(self) -> None:
        self._draw()
        self._wake.set()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Show a row's details."""
        row = self._chosen_row()
        if row is not None:
            self.push_screen(DetailsScreen(f"{self._view.title}: {shown(self._view.id_of(row))}", row))

    # -- ends

    @work(group="ask")
    async def action_kill(self) -> None:
        """End what the chosen row names, after a confirmation."""
        row = self._chosen_row()
        targets = self._view.targets(row) if row is not None else []
        if not targets:
            self.notify("There is nothing to end here: choose a stream, a reader or a key.", severity="warning")
            return
        chosen = await self.push_screen_wait(ConfirmScreen("End?", _KILL_TEXT, [each.text for each in targets]))
        if chosen is not None:
            target = targets[chosen]
            work = functools.partial(end, self._client, target.kind, target.id)
            await self._tell(work, lambda counts: f"{shown(target.id)}: {ended_line(counts)}{_missing(counts)}")

    @work(group="ask")
    async def action_drain(self) -> None:
        """Begin a drain, end it at once, or take it back, after a confirmation."""
        if self._status is None:
            self.notify("The daemon hasn't answered yet.", severity="warning")
            return
        drain = self._status["drain"]
        steps = _DRAIN_STEPS if drain is None else _END_STEPS
        if drain is not None and drain["may_be_taken_back"]:
            steps = (*_BACK_STEPS, *steps)
        running = f"{self._status['streams']['live']} streams run now. "
        chosen = await self.push_screen_wait(ConfirmScreen("Drain?", running + _DRAIN_TEXT, [s[0] for s in steps]))
        if chosen is not None:
            _, method, told = steps[chosen]
            was_draining = drain is not None
            await self._tell(
                lambda: self._drain_or_not(was_draining, method), lambda done: told if done else _MEANWHILE
            )

    def _drain_or_not(self, was_draining: bool, method: str) -> bool:
        """Ask for a step of the drain, unless the drain was begun or taken back since it was offered: the same request
        begins a drain and hurries one, and the screen may stand still. False: nothing was asked. Waits for the daemon.
        """
        status = self._client.ask("GET", "/status")
        if (status["drain"] is not None) != was_draining:
            self._status = status
            return False
        self._client.ask(method, "/drain")
        return True


# The text of a choice, the method of its request, and the text when it is done.
_Steps = tuple[tuple[str, str, str], ...]
_DRAIN_STEPS: Final[_Steps] = (("Drain and stop the daemon", "POST", "draining"),)
_END_STEPS: Final[_Steps] = (("End the drain at once: readers are told their position, and cut", "POST", "ending now"),)
_BACK_STEPS: Final[_Steps] = (("Take the drain back", "DELETE", "the drain is taken back; streamd serves"),)

_MEANWHILE: Final = "Nothing was done: the drain was begun or taken back meanwhile. Choose again."


def _missing(counts: Mapping[str, int]) -> str:
    missing = counts.get("workers_missing", 0)
    return f"; {missing} worker(s) didn't answer in time" if missing else ""


def _cell(text: str, place: Placed) -> Text:
    column: ViewColumn = place.column
    is_alarming = column.head == "STATE" and text in ALARMING
    line = Text(f"!{text}" if is_alarming else text, justify="left" if column.is_word else "right")
    if is_alarming:
        line.stylize("bold")
    if line.cell_len > place.width:
        line = Text(set_cell_size(line.plain, place.width - 1) + "…", style=line.style)
    return line
