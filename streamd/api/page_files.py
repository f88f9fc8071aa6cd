"""The pages that streamd serves itself: the operations page on the admin surface, and a chat where `demo` is set.

They consist of whole files of the package (streamd/pages/): HTML, CSS and JavaScript as a browser reads them. A page
asks no listener but its own, and the policy below makes the browser enforce that: no other host, no inline script or
style, no frame around it (a click meant for another page would end a stream), and no text that becomes markup (names of
models come from clients).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.http_error import not_found
from streamd.net.runtime import Runtime
from streamd.wire.answer_fields import Fields

FOLDER: Final = Path(__file__).parents[1] / "pages"
PREFIX: Final = "/pages/"

CHAT: Final = "chat.html"
OPERATIONS: Final = "operations.html"

KINDS: Final = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}

POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
GUARDS: Final[Fields] = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class PageFiles:
    """The routes of the pages, and of the files that they consist of. Nothing is read before a browser asks."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        root, file = {"GET": Plan(answer=self.root)}, {"GET": Plan(answer=self.file)}
        self.methods = {"/": root, **{PREFIX + name: file for name in names()}}

    def root(self, answer: Answer) -> None:
        """GET /: the page of this listener; a word for clients that knock at their base address (Claude Code does)."""
        page = self._page(answer)
        if page is None:
            answer.send(200, b"streamd\n", [(b"content-type", b"text/plain; charset=utf-8")])
        else:
            _send(answer, page)

    def file(self, answer: Answer) -> None:
        """GET /pages/{name}. Raises HttpError 404 on a listener without a page."""
        if self._page(answer) is None:
            raise not_found(answer.request.path)
        _send(answer, answer.request.path.removeprefix(PREFIX))

    def _page(self, answer: Answer) -> str | None:
        if answer.origin.listener == "admin":
            return OPERATIONS
        return CHAT if self._runtime.settings.demo else None


@functools.cache
def names() -> tuple[str, ...]:
    """The names of the files."""
    return tuple(sorted(path.name for path in FOLDER.iterdir() if path.suffix in KINDS))


@functools.cache
def content(name: str) -> bytes:
    """The content of a file, kept from its first use on: 60 KB for all files."""
    return (FOLDER / name).read_bytes()


def _send(answer: Answer, name: str) -> None:
    answer.send(200, content(name), [(b"content-type", KINDS[Path(name).suffix]), *GUARDS])
