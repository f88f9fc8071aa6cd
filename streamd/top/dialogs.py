"""The dialogs of `streamd top`: a choice that has to be confirmed, and a row with all its members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Label, OptionList, Static
from textual.widgets.option_list import Option

from streamd.daemon.admin_cli import shown


class ConfirmScreen(ModalScreen[int | None]):
    """Asks which of some things to do. The result is the number of the chosen thing, or None.

    The first line is "do nothing" and is the chosen line at the start: a key that was typed too early ends nothing.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,n,q", "dismiss_with_nothing", "do nothing")]

    def __init__(self, title: str, text: str, choices: Sequence[str]) -> None:
        super().__init__()
        self._title = title
        self._text = text
        self._choices = choices

    def compose(self) -> ComposeResult:
        """Build the dialog."""
        with Vertical(id="dialog"):
            yield Label(Text(self._title, style="bold"))
            yield Static(Text(self._text))
            yield OptionList(Option("Do nothing"), *(Option(Text(choice)) for choice in self._choices))
            yield Label(Text("arrows choose, enter confirms, escape does nothing"), classes="hint")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Return the choice."""
        self.dismiss(event.option_index - 1 if event.option_index else None)

    def action_dismiss_with_nothing(self) -> None:
        """Close the dialog."""
        self.dismiss(None)


class DetailsScreen(ModalScreen[None]):
    """Shows all members of a row."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q", "dismiss", "close"),
        Binding("up", "scroll('up')", show=False),
        Binding("down", "scroll('down')", show=False),
    ]

    def __init__(self, title: str, row: Mapping[str, Any]) -> None:
        super().__init__()
        self._title = title
        self._row = row

    def compose(self) -> ComposeResult:
        """Build the dialog."""
        width = max(map(len, self._row))
        lines = [f"{name.ljust(width)}  {shown(value)}" for name, value in self._row.items()]
        with VerticalScroll(id="dialog") as dialog:
            yield Static(Text("\n".join(lines)))
        # Why Text: a plain string is the library's markup, and a topic's name may look like it.
        dialog.border_title = cast("Any", Text(self._title))
        dialog.border_subtitle = "escape closes"

    def action_scroll(self, direction: str) -> None:
        """Scroll by a line."""
        scroll = self.query_one(VerticalScroll)
        (scroll.scroll_up if direction == "up" else scroll.scroll_down)(animate=False)
