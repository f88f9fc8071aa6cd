"""Types of answers that browsers run as pages, or guess: held in a sandbox; any other passes without a word."""

from __future__ import annotations

import pytest

from streamd.wire.active_content import holding


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        b"",
        b"text/html",
        b"TEXT/HTML ; charset=utf-8",
        b"image/svg+xml",
        b"application/xhtml+xml;q=1",
        b"application/atom+xml",
        b"text/xml",
        b"*/*",
        b"unknown/unknown",
        b"html",
        b"text/plain, text/html",
        b"multipart/x-mixed-replace; boundary=x",
    ],
)
def test_a_type_that_browsers_run_or_guess_is_held(content_type: bytes | None) -> None:
    assert dict(holding(content_type)) == {
        b"content-security-policy": b"sandbox",
        b"x-content-type-options": b"nosniff",
    }


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json",
        b"text/event-stream",
        b"text/plain; charset=utf-8",
        b"audio/mpeg",
        b"image/png",
        b"application/octet-stream",
        b"application/x-ndjson",
    ],
)
def test_a_type_that_browsers_only_show_or_save_passes(content_type: bytes) -> None:
    assert holding(content_type) == ()
