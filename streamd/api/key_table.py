"""GET /keys: what each API key holds now, and how much of its limits is left. `streamd keys` edits the key file.

Without a key file the rows are the principals that hold something now: hashes of their credentials. The counts against
limits are the same in every worker, because workers share them; the rest is added up over all workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import orjson

from streamd.api.reader_table import connections
from streamd.api.tables import SLICE_MEMBERS, SLICE_ROWS, Shown, Table, TableQuery, best
from streamd.core.keys import format_expiry
from streamd.core.pace import tokens_per_s
from streamd.net.client import ClientConnection
from streamd.net.in_turns import Steps

# The numbers of a principal in a worker, in this order.
TOKENS_PER_S, STREAMS, DETACHED, READERS, REQUESTS = range(5)

Held = dict[str, list[float]]
"""The numbers of each principal that holds something."""


class KeyTable(Table):
    """The keys, and the principals without a key that hold something."""

    kind = "keys"
    sorts = ("tokens", "streams", "readers", "requests")
    filters = ()
    _RANKED_BY: ClassVar[dict[str, int]] = {
        "tokens": TOKENS_PER_S,
        "streams": STREAMS,
        "readers": READERS,
        "requests": REQUESTS,
    }

    def part(self, wanted: TableQuery) -> Steps[bytes]:
        held: Held = {}
        now = self._runtime.time()
        for k, stream in enumerate(self._runtime.hub, 1):
            if stream.reason is None and wanted.has_owner(stream.terms.owner):
                numbers = held.setdefault(stream.terms.owner, [0.0, 0, 0, 0, 0])
                numbers[TOKENS_PER_S] += tokens_per_s(stream, now)
                numbers[STREAMS] += 1
                numbers[DETACHED] += bool(stream.grace_until)
            if k % SLICE_MEMBERS == 0:
                yield
        for k, client in enumerate(connections(self._runtime), 1):
            owner = _asker(client)
            if owner is not None and wanted.has_owner(owner):
                numbers = held.setdefault(owner, [0.0, 0, 0, 0, 0])
                numbers[READERS if client.reader is not None else REQUESTS] += 1
            if k % SLICE_MEMBERS == 0:
                yield
        return orjson.dumps(held)

    def whole(self, wanted: TableQuery, parts: Sequence[bytes]) -> Steps[Shown]:
        held: Held = {}
        for part in parts:
            found: Held = orjson.loads(part)
            for k, (owner, numbers) in enumerate(found.items(), 1):
                known = held.get(owner)
                held[owner] = numbers if known is None else [a + b for a, b in zip(known, numbers, strict=True)]
                if k % SLICE_MEMBERS == 0:
                    yield
        in_file = [key.id for key in self._rights.keys or () if wanted.has_owner(key.id)]
        owners = dict.fromkeys([*held, *in_file])
        column = self._RANKED_BY[wanted.sort]
        nothing = [0.0] * 5
        total, found_owners, _ = yield from best(owners, lambda owner: held.get(owner, nothing)[column], wanted.limit)
        rows = []
        for k, owner in enumerate(found_owners, 1):
            rows.append(orjson.dumps(self._row(owner, held.get(owner, nothing))))
            if k % SLICE_ROWS == 0:
                yield
        return Shown(total, rows)

    def _row(self, owner: str, numbers: Sequence[float]) -> dict[str, Any]:
        held = {
            "streams": int(numbers[STREAMS]),
            "detached": int(numbers[DETACHED]),
            "readers": int(numbers[READERS]),
            "requests": int(numbers[REQUESTS]),
            "tokens_per_s": round(numbers[TOKENS_PER_S], 1),
        }
        key = self._rights.key_of(owner)
        if key is None:
            return {"key": owner, "key_name": None, **held}
        used = self._rights.usage_of(key)
        return {
            "key": owner,
            "key_name": key.name,
            **held,
            "streams": used.streams_now,
            "streams_max": key.streams_max,
            "requests_total": used.requests_total,
            "requests_per_minute": key.requests_per_minute,
            "requests_left": used.requests_left,
            "tokens_total": used.tokens_total,
            "tokens_per_minute": key.tokens_per_minute,
            "tokens_left": used.tokens_left,
            "wait_s": round(used.wait_s, 1),
            "expires": format_expiry(key.expires_unix) if key.expires_unix is not None else None,
        }


def _asker(client: ClientConnection) -> str | None:
    """The principal of the connection's request; None between requests, and for an operator's, such as this table's."""
    answer = client.answer
    return answer.request.principal.id if answer is not None and client.origin.listener != "admin" else None
