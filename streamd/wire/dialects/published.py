"""Events of APIs that streamd doesn't know: published events, and answers of other paths. The framing ends them.

Published text has a form of streamd's own, `{"delta": "…"}` (wire/publish.py).
"""

from __future__ import annotations

from typing import ClassVar

from streamd.wire.dialects.api import Api, Part, google_tokens_of, tokens_of
from streamd.wire.dialects.members import Json, Usage, is_text, object_of, string_of
from streamd.wire.dialects.merging import Merge, Merging


class Published(Api):
    """Every path that belongs to no other API."""

    streams: ClassVar = False
    done_ends: ClassVar = True
    framing_ends: ClassVar = True
    text_keys: ClassVar = ("delta",)
    merging: ClassVar = Merging({"delta": Merge.TEXT})

    def is_error(self, body: Json, name: str | None) -> bool:
        """An `error` member may mean anything here: in JSON-RPC it answers a single call."""
        return False

    def texts(self, body: Json) -> list[str | None]:
        return [string_of(body, "delta")]

    def usage(self, body: Json, before: Usage | None) -> Usage | None:
        """An unknown server's usage, in all places where known servers have it."""
        for holder in (body, object_of(body, "response"), object_of(body, "message")):
            before = tokens_of(object_of(holder, "usage"), before)
        return google_tokens_of(body, before)

    def parts(self, parsed: Json) -> list[Part] | None:
        if len(parsed) == 1 and is_text(parsed.get("delta")):
            return [Part({}, 0, [(parsed, "delta")])]
        return None
