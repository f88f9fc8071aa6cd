"""Draws docs/screenshots/top.svg and top-end.svg: `streamd top` before a daemon of two workers under load.

Run by `make screenshots-top`. The pictures name no foreign host: the library's font is left to the reader's machine.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loaded import Loaded, loaded
from served import PROJECT, WAIT_S, upstream
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from streamd.top.app import TopApp
from streamd.top.dialogs import ConfirmScreen

FOLDER = PROJECT / "docs" / "screenshots"
SIZE = (118, 24)
# Readers of each key: the model that they ask for, and their number.
READERS = {"web": ("llama-3.3-70b", 7), "ios": ("llama-3.3-70b", 4), "batch": ("qwen3-32b", 2)}
SLOW = "reports"

SERVERS = """
[[upstream]]
name = "gpu1"
url = "{one}"

[[upstream]]
name = "gpu2"
url = "{two}"
"""


async def until(pilot: Pilot[None], condition: Callable[[], Any]) -> None:
    """Wait until the condition is true."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await pilot.pause(0.1)


def write(app: TopApp, name: str) -> None:
    """Write the screen as it is now."""
    picture = app.export_screenshot(title="streamd top")
    (FOLDER / name).write_text(re.sub(r"\s*(@font-face \{.*?\}|<!--.*?-->)", "", picture, flags=re.DOTALL))
    print(f"{FOLDER / name}")


async def draw(d: Loaded, address: str) -> None:
    """Draw both pictures; `address`: the slow reader's."""
    app = TopApp(d.client, interval_s=0.5, view="readers")
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: app.query_one(DataTable).row_count > sum(count for _, count in READERS.values()))
        await until(pilot, lambda: "tokens/s -" not in str(app.query_one("#head", Static).render()))
        first = d.rows("readers")[0]
        assert first["peer"] == address and first["lag_events"] > 100, first
        await pilot.pause(4)  # the rate is a mean over some seconds
        write(app, "top.svg")
        await pilot.press("k")
        await until(pilot, lambda: isinstance(app.screen, ConfirmScreen))
        await pilot.press("down")
        write(app, "top-end.svg")


def main() -> None:
    """Start the daemon and its load, and draw."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, upstream("--interval-ms", "20") as one, upstream() as two:
        config = Path(name, "streamd.toml")
        config.write_text(SERVERS.format(one=one, two=two))
        with loaded(Path(name), *READERS, SLOW, of_upstreams=("--config", str(config))) as d:
            for key, (model, count) in READERS.items():
                for _ in range(count):
                    d.reader(key, model=model, interval_ms=25)
            address = d.reader(SLOW, model="llama-3.3-70b", stalls=True, interval_ms=5)
            d.until(lambda: any(row["peer"] == address and row["paused_s"] > 2 for row in d.rows("readers")), "pause")
            asyncio.run(draw(d, address))


if __name__ == "__main__":
    main()
