"""The on-call scene of a dead server: two workers, each of which finds it dead, and one line in the log."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

from served import WAIT_S, Served, served

CHAT = json.dumps({"model": "m", "messages": []}).encode()


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET = _answer  # noqa: N815 (http.server calls them so)

    def log_message(self, *words: object) -> None:
        """Log nothing."""


class Machine(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """An inference server that can be dead (its port refuses connections) and come to life."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers, bind_and_activate=False)
        self.server_bind()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def live(self) -> None:
        self.server_activate()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@contextlib.contextmanager
def machines() -> Iterator[tuple[Machine, Machine]]:
    with Machine() as one, Machine() as two:
        yield one, two


def levels(d: Served, name: str) -> list[str]:
    """The level of each line of this name."""
    found = [re.match(rf"\S+ (\w+) {name}( |$)", line) for line in d.lines]
    return [match[1] for match in found if match is not None]


def ask(connection: http.client.HTTPConnection) -> int:
    connection.request("POST", "/v1/chat/completions", CHAT, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def shown(d: Served) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(d.request("GET", "/status").read())["upstreams"]
    return found


def test_a_dead_server_gives_one_line_of_two_workers_and_one_when_it_is_back() -> None:
    config = ("--workers", "2", "--upstream")
    with machines() as (one, two), served(*config, two.url, "--upstream", one.url) as d:
        one.live()
        d.notify.until("READY=1")
        host, dead = f"127.0.0.1:{one.server_address[1]}", f"127.0.0.1:{two.server_address[1]}"
        open_ones = [http.client.HTTPConnection("127.0.0.1", d.port, timeout=WAIT_S) for _ in range(12)]
        for connection in open_ones:  # spread over both workers, and idle connections stay there
            connection.connect()
        for _ in range(3):
            assert [ask(connection) for connection in open_ones] == [200] * 12
        d.until(lambda: shown(d)[dead]["failures"] >= 2, "failures in both workers")
        d.notify.until("STATUS=serving: ")
        d.until(lambda: d.notify.take(0.01) or f"1 of 2 upstreams out: {dead}" in d.notify.told[-1], "status line")
        assert any(f", 1 of 2 upstreams out: {dead}" in line for line in d.notify.told)
        assert levels(d, "upstream out") == ["WARNING"] and levels(d, "no upstream left") == []
        assert shown(d)[dead]["state"] in ("out", "probing") and shown(d)[host]["state"] == "up"
        one.shutdown()
        one.server_close()
        statuses = [ask(connection) for _ in range(3) for connection in open_ones]
        assert set(statuses) <= {502, 503}
        d.line(f"ERROR no upstream left models=\\* upstreams={host},{dead}|ERROR no upstream left .*{host}")
        assert levels(d, "upstream out") == ["WARNING"] * 2
        assert 1 <= levels(d, "request").count("WARNING") <= 3 * 7, "six a minute for each server, and for none"
        two.live()
        d.until(lambda: [ask(connection) for connection in open_ones] and shown(d)[dead]["state"] == "up", "an answer")
        d.line(f"INFO upstream back upstream={dead} ")
        d.line(r"INFO models served again models=\*")
        text = d.request("GET", "/metrics").read().decode()
        assert f'streamd_upstream_up{{upstream="{dead}"}} 1.0' in text
        assert f'streamd_upstream_up{{upstream="{host}"}} 0.0' in text
        two.shutdown()
