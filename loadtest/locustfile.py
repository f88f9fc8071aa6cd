"""Users for locust: they read a model's answers as people do.

`make load` runs it headless with an HTML report, `make load-ui` opens locust's page. By hand:

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080 --headless -u 500 -r 50 -t 60s --html report.html

Every user opens streams with a pause to think between them. Most read; some stall for a while and read on, some lose
their connection and come back with Last-Event-ID, some walk away. Each verifies its own text against the text of an
answer that wasn't streamed. As locust's statistics, in milliseconds: `ttft`, `gap` (the median of a stream's gaps),
`gap max`, `stream` (the whole of it, failed if it isn't complete); `lost`, `doubled` and `refused` are counted as
failures under their names.

Environment: LOAD_BODY (the request's JSON), LOAD_PATH, LOAD_STALL_S (10), LOAD_KEY (an API key).
For a number of connections that greenlets can't reach, see holder.py.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import gevent
from locust import User, between, task

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checker import Checker, Reference, Tally

CHAT = {"model": "mock-llm", "stream": True, "messages": [{"role": "user", "content": "Tell me a story."}]}
BODY = os.environ.get("LOAD_BODY", json.dumps(CHAT)).encode()
PATH = os.environ.get("LOAD_PATH", "/v1/chat/completions")
STALL_S = float(os.environ.get("LOAD_STALL_S", "10"))
GRACE_S = 30
RETRY_S = 1.0
CUTS_MAX = 3
TIMEOUT_S = 60


class Refused(Exception):
    """A refusal, with the seconds until the next attempt."""

    def __init__(self, status: int, retry_after_s: float) -> None:
        super().__init__(f"{status}, Retry-After {retry_after_s:g}")
        self.retry_after_s = retry_after_s


class Incomplete(Exception):
    """A stream that ended without all its text; the message says how."""


class Reading:
    """A user's reading of a stream, over as many connections as needed."""

    def __init__(self, host: str, reference: bytes) -> None:
        self._host = host
        self._stream_id = ""
        self._connection: HTTPConnection | None = None
        self._asked_s = 0.0
        self.checker = Checker(Reference(reference), Tally())
        self.gaps_ms: list[float] = []
        self.ttft_ms: float | None = None

    def open(self) -> HTTPResponse:
        """Ask for the stream, or for the rest of it. Raises Refused."""
        self._connection = connect(self._host)
        if self.ttft_ms is None:
            self._asked_s = time.perf_counter()
        fields = {"Accept": "text/event-stream", "Content-Type": "application/json", **authorization()}
        if self._stream_id:
            fields["Last-Event-ID"] = self.checker.last_id.decode()
            self._connection.request("GET", f"/v1/streams/{self._stream_id}", headers=fields)
        else:
            fields["X-Stream-Detach-Grace"] = str(GRACE_S)
            self._connection.request("POST", PATH, BODY, fields)
        answer = self._connection.getresponse()
        if answer.status in (429, 503):
            raise Refused(answer.status, float(answer.getheader("Retry-After") or RETRY_S))
        if answer.status != 200:
            raise Incomplete(f"status {answer.status}")
        self._stream_id = answer.getheader("X-Stream-Id") or self._stream_id
        return answer

    def events(self, answer: HTTPResponse, count: int | None = None) -> bool:
        """Read `count` events (None: all). Returns whether the answer has more."""
        last = time.perf_counter()
        block: list[bytes] = []
        while count is None or count > 0:
            line = answer.readline()
            if not line:
                return False
            if line != b"\n":
                block.append(line.rstrip(b"\n"))
                continue
            if self.checker.take(b"\n".join(block)):
                now = time.perf_counter()
                if self.ttft_ms is None:
                    self.ttft_ms = (now - self._asked_s) * 1000
                else:
                    self.gaps_ms.append((now - last) * 1000)
                last = now
            block = []
            count = None if count is None else count - 1
        return True

    def drop(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Reader(User):
    """A user that pauses, opens a stream, and reads it in any of four ways."""

    wait_time = between(1, 5)
    _reference: bytes | None = None

    def on_start(self) -> None:
        """Ask for the text that each stream must have, once in this process."""
        if Reader._reference is None:
            Reader._reference = reference_text(self.host or "")

    @task(8)
    def read(self) -> None:
        """Read from beginning to end."""
        self._measure("read", lambda reading: reading.events(reading.open()))

    @task(1)
    def stall(self) -> None:
        """Stop for a while in the middle, then read on: no text may be missing."""

        def steps(reading: Reading) -> None:
            answer = reading.open()
            if reading.events(answer, random.randint(5, 30)):
                gevent.sleep(STALL_S)
                reading.gaps_ms.clear()  # the user caused this gap
                reading.events(answer)

        self._measure("stall", steps)

    @task(2)
    def resume(self) -> None:
        """Lose the connection and come back with Last-Event-ID, up to three times."""

        def steps(reading: Reading) -> None:
            for _ in range(random.randint(1, CUTS_MAX)):
                if not reading.events(reading.open(), random.randint(5, 30)):
                    return
                reading.drop()
                retry_ms = reading.checker.retry_ms
                gevent.sleep(RETRY_S if retry_ms is None else retry_ms / 1000)
            reading.events(reading.open())

        self._measure("resume", steps)

    @task(1)
    def walk_away(self) -> None:
        """Leave in the middle."""
        self._measure("walk away", lambda reading: reading.events(reading.open(), random.randint(5, 30)), whole=False)

    def _measure(self, name: str, steps, whole: bool = True) -> None:  # type: ignore[no-untyped-def]
        """Run a reading and report its outcome to locust."""
        assert Reader._reference is not None
        reading = Reading(self.host or "", Reader._reference)
        begun = time.perf_counter()
        failure: Exception | None = None
        try:
            steps(reading)
            if whole and not reading.checker.whole(None):
                raise Incomplete(reading.checker.error or "the text isn't whole")
        except Refused as refused:
            self._tell("refused", name, 0, refused)
            gevent.sleep(refused.retry_after_s)
            return
        except (OSError, HTTPException, ValueError, Incomplete) as exception:
            failure = exception
        finally:
            reading.drop()
        self._tell("stream", name, (time.perf_counter() - begun) * 1000, failure, reading.checker.tally.events)
        self._tell_of(reading, name)

    def _tell_of(self, reading: Reading, name: str) -> None:
        tally = reading.checker.tally
        if reading.ttft_ms is not None:
            self._tell("ttft", name, reading.ttft_ms)
        if reading.gaps_ms:
            self._tell("gap", name, statistics.median(reading.gaps_ms))
            self._tell("gap max", name, max(reading.gaps_ms))
        for word in ("lost", "doubled", "wrong"):
            if count := getattr(tally, word):
                self._tell(word, name, 0, Incomplete(f"{count} pieces of text {word}"))

    def _tell(self, kind: str, name: str, ms: float, failure: Exception | None = None, events: int = 0) -> None:
        self.environment.events.request.fire(
            request_type=kind, name=name, response_time=ms, response_length=events, exception=failure, context={}
        )


def connect(host: str) -> HTTPConnection:
    """A connection to locust's --host."""
    parts = urlsplit(host)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(parts.hostname or "127.0.0.1", parts.port, timeout=TIMEOUT_S)


def authorization() -> dict[str, str]:
    """The API key's header field, if there is a key."""
    key = os.environ.get("LOAD_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def reference_text(host: str) -> bytes:
    """The text of the same request, not streamed."""
    connection = connect(host)
    body = json.dumps({**json.loads(BODY), "stream": False}).encode()
    connection.request("POST", PATH, body, {"Content-Type": "application/json", **authorization()})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    text: str = answer["choices"][0]["message"]["content"]
    return text.encode("utf-8", "surrogatepass")
