"""Streams through Apache, lighttpd, Varnish, h2o and Envoy, with the configurations of examples/proxies.

The table of docs/REVERSE-PROXIES.md says the same as OBSERVED.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from inprocess import WAIT_S, live
from tcp_fronts import FRONTS, running
from tools import needs, skip_without

from streamd.mockllm import MockOptions

BODY = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello."}]})
PROMPT = MockOptions(interval_s=0, ttft_s=0.05, tokens=20)
BEHIND: dict[str, Any] = {"trusted_proxies": ("127.0.0.1",)}
CURL_CUT = (18, 56, 92)  # partial body, connection reset, HTTP/2 stream error


class Observed(NamedTuple):
    """How a proxy behaves."""

    hears_at_once: bool  # of a reader that leaves a silent stream; otherwise from failing heartbeats
    cleans: tuple[str, ...] = ()  # HTTP versions in which a truncation gets a proper end
    versions: tuple[str, ...] = ("http1.1", "http2")
    holds_bodies: bool = False  # until their end


OBSERVED = {
    "apache2": Observed(hears_at_once=False),
    "lighttpd": Observed(hears_at_once=False, cleans=("http2",)),
    "varnish": Observed(hears_at_once=True, versions=("http1.1",)),
    "h2o": Observed(hears_at_once=False, cleans=("http1.1", "http2"), holds_bodies=True),
    "envoy": Observed(hears_at_once=True),
}
assert OBSERVED.keys() == FRONTS.keys()

pytestmark = needs("curl", "openssl")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="front-") as path:
        yield Path(path)


@pytest.fixture(params=FRONTS)
def kind(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


def curl(url: str, *options: str, version: str = "http1.1") -> list[str]:
    limits = ["--max-time", f"{WAIT_S:g}", "--insecure", "--noproxy", "*"]
    return ["curl", "--silent", "--no-buffer", f"--{version}", *limits, *options, url]


def post(url: str, *options: str, version: str = "http1.1") -> list[str]:
    asked = ("-H", "Content-Type: application/json", "-d", BODY)
    return curl(f"{url}/v1/chat/completions", *asked, *options, version=version)


def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, timeout=2 * WAIT_S, check=False)


def text_of(body: bytes) -> str:
    datas = re.findall(rb"^data: (\{.*\})$", body, re.MULTILINE)
    choices = [choice for data in datas for choice in json.loads(data).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_a_stream_its_resumption_and_its_truncation_pass(kind: str, folder: Path) -> None:
    observed = OBSERVED[kind]
    with live(PROMPT, **BEHIND) as served, running(kind, served.url, folder) as url:
        for version in observed.versions:
            whole = run(post(url, "--include", version=version))
            assert whole.returncode == 0 and text_of(whole.stdout) == served.said("Hello.")
            ids = [found.decode() for found in re.findall(rb"^id: (s_\S+)$", whole.stdout, re.MULTILINE)]
            path = f"{url}/v1/streams/{ids[0].partition(':')[0]}"
            rest = run(curl(path, "-H", f"Last-Event-ID: {ids[7]}", version=version))
            assert text_of(rest.stdout) and served.said("Hello.").endswith(text_of(rest.stdout))
            over = run(curl(path, "-H", f"Last-Event-ID: {ids[-1]}", "-w", "%{http_code}", version=version))
            assert over.stdout == b"204"
        for version in observed.versions:
            served.fault("break-fin=5")
            cut = run(post(url, version=version))
            assert b'"code":"upstream_truncated"' in cut.stdout and b"[DONE]" not in cut.stdout
            assert cut.returncode == 0 if version in observed.cleans else cut.returncode in CURL_CUT


def test_leaving_a_silent_stream_is_heard(kind: str, folder: Path) -> None:
    """At once, or from the first or second heartbeat that can't be delivered."""
    heartbeat_s = 0.0 if OBSERVED[kind].hears_at_once else 0.3
    with live(PROMPT, heartbeat_s=heartbeat_s, **BEHIND) as served, running(kind, served.url, folder) as url:
        served.fault("stall=5")
        with subprocess.Popen(post(url), stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            read_events(reader, 6)
            reader.terminate()
        served.until(aborted=1, open=0)


def test_a_publishers_body_passes_piece_by_piece(kind: str, folder: Path) -> None:
    with live(PROMPT, **BEHIND) as served, running(kind, served.url, folder) as url:
        assert run(curl(f"{served.url}/v1/streams/topic", "-X", "PUT")).returncode == 0
        events = ("-X", "POST", "-T", "-", "-H", "Content-Type: text/plain")
        publishing = curl(f"{url}/v1/streams/topic/events", *events)
        reading = curl(f"{served.url}/v1/streams/topic")
        with (
            subprocess.Popen(reading, stdout=subprocess.PIPE) as reader,
            subprocess.Popen(publishing, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as publisher,
        ):
            assert publisher.stdin is not None
            publisher.stdin.write(b"first ")
            publisher.stdin.flush()
            if not OBSERVED[kind].holds_bodies:
                assert b"first" in read_events(reader, 1), "while the body has no end yet"
            publisher.stdin.close()
            if OBSERVED[kind].holds_bodies:
                assert b"first" in read_events(reader, 1)
            assert publisher.wait(WAIT_S) == 0
            assert run(curl(f"{served.url}/v1/streams/topic", "-X", "DELETE")).returncode == 0
            reader.wait(WAIT_S)


def read_events(reader: subprocess.Popen[bytes], count: int) -> bytes:
    """The output up to that number of events."""
    assert reader.stdout is not None
    out = b""
    while out.count(b"\ndata: ") + out.startswith(b"data: ") < count:
        line = reader.stdout.readline()
        assert line, out
        out += line
    return out
