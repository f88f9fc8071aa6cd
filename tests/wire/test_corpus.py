"""Every row of the corpus through the parsers alone: whole, byte by byte, in odd cuts, and with bytes after it."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamd.wire.chunked import decoder_for
from streamd.wire.http1 import (
    RESPONSE_OPENING,
    HeadReader,
    RemoteProtocolError,
    parse_request,
    parse_response,
)

CORPUS = Path(__file__).parent.parent / "corpus"
REQUESTS = runpy.run_path(str(CORPUS / "http_requests.py"))["ROWS"]
RESPONSES = runpy.run_path(str(CORPUS / "http_responses.py"))["ROWS"]

WHOLE_REQUESTS = [row for row in REQUESTS if row[-1] != "close"]  # nothing can follow a request that is cut off

CUTS = [0, 1, 7, 1000]  # bytes per read; 0: all in one


def cut(wire: bytes, size: int) -> Iterator[bytes]:
    """The wire bytes in reads of that size."""
    if not size:
        yield wire
        return
    for start in range(0, len(wire), size):
        yield wire[start : start + size]


class ServerEnd:
    """The reading half of a connection, as in the daemon: heads and bodies in turn."""

    def __init__(self) -> None:
        self.reader = HeadReader()
        self.decoder: Any = None
        self.targets: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        while chunk:
            if self.decoder is not None:
                self.decoder.feed(chunk)
                chunk = self.decoder.rest
            else:
                found = self.reader.feed(chunk)
                if found is None:
                    return
                chunk = self._begin(*found)
            if self.decoder.done:
                self.decoder = None

    def _begin(self, head: bytes, rest: bytes) -> bytes:
        request = parse_request(head)
        if request.upgrade:
            raise RemoteProtocolError("no other protocol", "upgrade", 426)
        self.targets.append(request.target)
        self.decoder = decoder_for(request.framing, request.content_length)
        if self.decoder.done:
            return rest
        self.decoder.feed(rest)
        return self.decoder.rest

    def outcome(self, wire: bytes, size: int) -> int | str:
        try:
            for chunk in cut(wire, size):
                self.feed(chunk)
        except RemoteProtocolError as error:
            return error.status
        return "close" if self.decoder is not None or self.reader.bytes_held else "accept"


def response_outcome(request_method: str, wire: bytes, size: int) -> int | str:
    """The outcome of an upstream connection that receives these bytes and a FIN."""
    reader = HeadReader(opening=RESPONSE_OPENING)
    decoder: Any = None
    surplus = b""
    try:
        for chunk in cut(wire, size):
            while chunk:
                if decoder is None:
                    found = reader.feed(chunk)
                    if found is None:
                        break
                    head, chunk = found
                    response = parse_response(head, request_method)
                    if response.status >= 200:
                        decoder = decoder_for(response.framing, response.content_length, loose=True)
                elif decoder.done:
                    surplus += chunk
                    break
                else:
                    decoder.feed(chunk)
                    chunk = decoder.rest
    except RemoteProtocolError as error:
        return error.status if decoder is None else "close"
    if decoder is None:
        return 502
    if not decoder.eof():
        return "close"
    return "surplus" if surplus else "accept"


def ids(rows: list[tuple[Any, ...]]) -> list[str]:
    return [row[0].replace(" ", "-") for row in rows]


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("row", REQUESTS, ids=ids(REQUESTS))
def test_every_request_has_its_outcome_in_any_cut(row: tuple[str, bytes, str, int | str], size: int) -> None:
    _, wire, _, expected = row
    assert ServerEnd().outcome(wire, size) == expected


@pytest.mark.parametrize("row", WHOLE_REQUESTS, ids=ids(WHOLE_REQUESTS))
def test_every_request_has_its_outcome_with_bytes_after_it(row: tuple[str, bytes, str, int | str]) -> None:
    """A refusal stays the same refusal, and an accepted request leaves the next request whole."""
    _, wire, _, expected = row
    behind = b"GET /behind HTTP/1.1\r\nHost: example.org\r\n\r\n"
    server = ServerEnd()
    assert server.outcome(wire + behind, 0) == expected
    assert (server.targets[-1:] == [b"/behind"]) is (expected == "accept")
    assert b"/smuggled" not in server.targets


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("row", RESPONSES, ids=ids(RESPONSES))
def test_every_response_has_its_outcome_in_any_cut(row: tuple[str, str, bytes, str, int | str], size: int) -> None:
    _, method, wire, _, expected = row
    assert response_outcome(method, wire, size) == expected


def test_every_row_has_a_source_and_a_name_of_its_own() -> None:
    for rows, refusals_min in ((REQUESTS, 150), (RESPONSES, 60)):
        names = [row[0] for row in rows]
        assert len(set(names)) == len(names)
        assert sum(row[-1] != "accept" for row in rows) >= refusals_min
        assert all(row[-2].startswith(("RFC ", "docs/", "WHATWG ")) for row in rows)
    named = " ".join(row[0] for row in REQUESTS)
    for cve in (
        "h11 CVE-2025-43859",
        "Kestrel CVE-2025-55315",
        "Go CVE-2025-22871",
        "llhttp CVE-2024-27982",
        "llhttp CVE-2023-30589",
        "aiohttp CVE-2025-53643",
        "aiohttp Upgrade smuggling",
        "Starlette CVE-2026-48710",
        "LiteLLM CVE-2026-49468",
    ):
        assert cve in named
