"""The on-call scene of a single user's complaint: the key is watched in both workers, and ends by itself."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal

from served import WAIT_S, Served, served, upstream

CHAT = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}).encode()


def admin(d: Served, method: str, path: str) -> http.client.HTTPResponse:
    port = int(d.line(r" serving .*admin=\S*?:(\d+)")[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    connection.request(method, path)
    return connection.getresponse()


def pids(d: Served) -> set[int]:
    return {each["pid"] for each in json.loads(admin(d, "GET", "/status").read())["workers"]}


def steps(d: Served, request_id: str) -> list[str]:
    """The names of the lines at debug of a request."""
    found = [re.match(rf"\S+ DEBUG ([a-z ]+) id={request_id} ", line) for line in d.lines]
    return [match[1] for match in found if match is not None]


def generate(d: Served, connection: http.client.HTTPConnection, user: str, request_id: str) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {user}", "X-Request-Id": request_id}
    connection.request(
        "POST", "/v1/chat/completions", CHAT, headers | {"X-Mock-Tokens": "3", "X-Mock-Interval-Ms": "1"}
    )
    answer = connection.getresponse()
    assert answer.status == 200 and b"[DONE]" in answer.read()
    d.line(rf" INFO request id={request_id} ")


def test_one_keys_requests_are_told_step_by_step_in_every_worker_and_no_others() -> None:
    args = ("--workers", "2", "--admin", "127.0.0.1:0", "--upstream")
    with upstream() as mock, served(*args, mock) as d:
        d.notify.until("READY=1")
        spread = [http.client.HTTPConnection("127.0.0.1", d.port, timeout=WAIT_S) for _ in range(8)]
        for k, connection in enumerate(spread):
            generate(d, connection, "alice", f"before{k}")
        user = d.line(r" id=before0 .*principal=(\S+)")[1]
        assert admin(d, "PUT", f"/log-level?for=5m&key={user}").status == 204
        d.line(rf"INFO watched step by step key={user} for_s=300")
        for k, connection in enumerate(spread):
            generate(d, connection, "alice", f"alice{k}")
            generate(d, connection, "bob", f"bob{k}")
        for k in range(8):
            told = steps(d, f"alice{k}")
            assert told[0] == "upstream chosen" and told[-1] == "reader leaves", told
            assert {"request sent", "answer begins", "reader joins"} <= set(told)
            assert steps(d, f"bob{k}") == steps(d, f"before{k}") == []
        slots = {match[1] for line in d.lines if (match := re.search(r" DEBUG .* stream=s_(.)", line))}
        assert len(slots) == 2, "both workers told"
        victim = min(pids(d))
        os.kill(victim, signal.SIGKILL)
        d.line(r"worker died")
        d.until(lambda: len(pids(d) - {0, victim}) == 2, "successor")
        fresh = [http.client.HTTPConnection("127.0.0.1", d.port, timeout=WAIT_S) for _ in range(8)]
        for k, connection in enumerate(fresh):
            generate(d, connection, "alice", f"later{k}")
            assert steps(d, f"later{k}")[0] == "upstream chosen", "the successor knows of the watch"
        assert admin(d, "PUT", f"/log-level?for=1s&key={user}").status == 204
        d.line(rf"INFO watch ends key={user}")
        d.until(lambda: json.loads(admin(d, "GET", "/log-level").read())["watches"] == [], "end")
