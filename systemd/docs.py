"""Write the man pages and completion scripts into a folder: python systemd/docs.py FOLDER, with streamd importable."""

from __future__ import annotations

import sys
from pathlib import Path

from streamd import __version__
from streamd.cli import build_parser
from streamd.config import ROUTE_ROWS, ROWS, UPSTREAM_ROWS
from streamd.daemon import completion, manpage


def pages() -> dict[str, str]:
    """File name → text."""
    parser = build_parser()
    tables = {"upstream": UPSTREAM_ROWS, "route": ROUTE_ROWS}
    return {
        "streamd.8": manpage.command_page(parser, ROWS, __version__),
        "streamd.toml.5": manpage.settings_page(ROWS, tables, __version__),
        "streamd.bash": completion.bash(parser, ROWS),
        "_streamd": completion.zsh(parser, ROWS),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
