"""A real Prometheus scrapes loaded daemons: every panel of the dashboard has data, every alert fires for its fault.

    make test-prometheus

The rules are those of examples/prometheus, with their times shortened so that a run takes two minutes; SHORTER has each
change. The faults are real: servers that refuse, hang or are slow, a reader that doesn't read, a stopped worker, a
stopped main process in a drain, a bad settings file, a certificate near its end, a real Valkey that is full, emptied
and killed, a node that dies. Three alerts have no fault that can be made here, a mistake of streamd, a lack of memory
and pushes that are lost without end: promtool tests these (examples/prometheus/streamd.rules.test.yml).

Needs prometheus and promtool (Debian: prometheus), and the Valkey of make test-cluster.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "tests" / "cluster")]

from nodes import Nodes, nodes  # noqa: E402
from served import Served, served, upstream  # noqa: E402
from tlspeer import make_certificate  # noqa: E402

RULES = PROJECT / "examples" / "prometheus" / "streamd.rules.yml"
DASHBOARD = PROJECT / "examples" / "grafana" / "streamd.json"

# Times of the rules, as a run has them.
SHORTER = (
    (r"for: \w+", "for: 1s"),
    (r"\[(?:1|5|15)m\]", "[15s]"),
    (r"wait_seconds > 60", "wait_seconds > 3"),
    (r"\) > 10$", ") > 1"),
    (r"deadline_timestamp_seconds > 15", "deadline_timestamp_seconds > 1"),
)
# Alerts without a fault that can be made.
UNPROVOKED = frozenset(("StreamdBug", "StreamdMemory", "StreamdEngineHoles"))
# Grafana's variables, as a run has them.
VARIABLES = {"$__rate_interval": "15s", "$job": ".*", "$instance": ".*", "$model": ".*"}

WAIT_S = 90.0


class Prometheus:
    """A running Prometheus."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        rules = RULES.read_text()
        for pattern, replacement in SHORTER:
            rules, count = re.subn(pattern, replacement, rules, flags=re.MULTILINE)
            assert count, f"{pattern} is in no rule"
        (folder / "rules.yml").write_text(rules)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "streamd", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.log = (folder / "log").open("w")
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self.process = subprocess.Popen(
            [*command, f"--web.listen-address={self.address}"], stdout=self.log, stderr=self.log
        )
        until(self.is_ready, "a ready Prometheus")

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"http://{self.address}/-/ready").status == 200)
        return False

    def query(self, expression: str) -> list[Any]:
        """The series of an expression at this moment."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{query}") as answer:
            found: list[Any] = json.load(answer)["data"]["result"]
        return [series for series in found if series["value"][1] != "NaN"]

    def firing(self) -> set[str]:
        """The alerts that fire."""
        with urllib.request.urlopen(f"http://{self.address}/api/v1/alerts") as answer:
            alerts = json.load(answer)["data"]["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what} in {WAIT_S:.0f} s")
        time.sleep(0.2)


@contextlib.contextmanager
def again_and_again(work: Callable[[], None], every_s: float) -> Iterator[None]:
    """Do `work` in a thread for as long as the block lasts."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(every_s):
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                work()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ask(d: Served, model: str, *, stream: bool = True, **mock: object) -> None:
    """A chat, read to its end; `mock` are the X-Mock-… headers."""
    headers = {f"X-Mock-{name.replace('_', '-')}": str(value) for name, value in mock.items()}
    body = json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": "Hello"}]}).encode()
    d.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"} | headers).read()


def beside(d: Served, **mock: object) -> socket.socket:
    """A chat whose reader takes no byte."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", d.port))
    headers = "".join(f"X-Mock-{name.replace('_', '-')}: {value}\r\n" for name, value in mock.items())
    body = b'{"model":"mock-llm","stream":true,"messages":[{"role":"user","content":"Hello"}]}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    reader.sendall(head.encode() + body)
    return reader


def metrics_of(d: Served) -> str:
    return d.line(r" serving .*metrics=(\S+)")[1]


def worker_of(d: Served) -> int:
    """A worker's process id."""
    children = Path(f"/proc/{d.process.pid}/task/{d.process.pid}/children").read_text().split()
    return int(children[0])


def stop_for_a_moment(d: Served) -> None:
    pid = worker_of(d)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.kill(pid, signal.SIGCONT)


def expressions() -> Iterator[tuple[str, str]]:
    """Each panel's title with each of its queries."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def alerts() -> set[str]:
    return set(re.findall(r"- alert: (\w+)", RULES.read_text()))


def show(what: str) -> None:
    print(what, flush=True)


def check_panels(prometheus: Prometheus) -> None:
    for title, expression in expressions():
        until(lambda expression=expression: prometheus.query(expression), f"data in panel {title!r}: {expression}")  # type: ignore[misc]
    show(f"every query of the dashboard has data: {len(list(expressions()))} queries")


def await_alerts(prometheus: Prometheus, seen: set[str], *names: str) -> None:
    for name in names:
        until(lambda name=name: name in prometheus.firing(), f"alert {name}")  # type: ignore[misc]
        seen.add(name)
        show(f"fires: {name}")


def run(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = f"127.0.0.1:{gone.getsockname()[1]}"
    settings = folder / "streamd.toml"
    cert, key = make_certificate(folder)
    times = ("--drain-delay", "3s", "--drain-timeout", "1s")
    several = ("--workers", "2", "--metrics-listen", "127.0.0.1:0", "--config", str(settings), *times)
    alone = ("--metrics-listen", "127.0.0.1:0", "--tls-cert", str(cert), "--tls-key", str(key))
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        mock = stack.enter_context(upstream())
        settings.write_text(
            f'[[upstream]]\nname = "gpu1"\nurl = "{mock}"\n'
            f'[[upstream]]\nname = "gpu2"\nurl = "http://{nobody}"\nmodels = ["lost"]\n'
        )
        d = stack.enter_context(served(*several))
        only = stack.enter_context(
            served(*alone, "--upstream", f"http://{nobody}", "--conns-max", "10", "--drain-timeout", "60s")
        )
        # A third node has a prefix of its own: it sees other members than a and b.
        flags = ("--metrics-listen", "127.0.0.1:0")
        own = lambda name: ("--engine-prefix", "other:") if name == "c" else ()  # noqa: E731
        n = stack.enter_context(nodes(*flags, names="abc", own=own))
        targets = [metrics_of(each) for each in (d, only, *n.daemons.values())]
        prometheus = Prometheus(folder, [*targets, nobody])
        stack.callback(prometheus.end)
        for work, every_s in (
            (lambda: ask(d, "mock-llm", tokens=20, interval_ms=20, ttft_ms=50), 0.1),
            (lambda: ask(d, "mock-llm", stream=False, tokens=20), 0.5),
            (lambda: ask(d, "lost"), 0.3),
            (lambda: ask(d, "mock-llm", tokens=3, ttft_ms=2500), 0.5),
        ):
            stack.enter_context(again_and_again(work, every_s))
        hanging = stack.enter_context(beside(d, ttft_ms=300_000))
        stack.enter_context(beside(d, tokens=100_000, interval_ms=0.2))
        await_alerts(prometheus, seen, "StreamdDown", "StreamdUpstreamOut", "StreamdModelWithoutUpstream")
        await_alerts(prometheus, seen, "StreamdUpstreamFails", "StreamdFirstTokenHangs", "StreamdFirstTokenSlow")
        await_alerts(prometheus, seen, "StreamdReadersLag")
        running = n.start("a", tokens=100_000, interval_ms=50)
        elsewhere = n.read("b", running.stream_id).read(1)
        check_panels(prometheus)
        hanging.close()
        await_engine_alerts(n, prometheus, seen)
        assert elsewhere.events

        settings.write_text("heartbeat = 'soon'\n")
        d.signal(signal.SIGHUP)
        await_alerts(prometheus, seen, "StreamdReloadRefused")
        with again_and_again(lambda: stop_for_a_moment(d), 0.3):
            await_alerts(prometheus, seen, "StreamdLoopLags")

        context = ssl.create_default_context(cafile=str(cert))
        context.check_hostname = False

        def ask_in_vain() -> None:
            connection = http.client.HTTPSConnection("127.0.0.1", only.port, context=context)
            connection.request("POST", "/v1/chat/completions", b"{}", {"Content-Type": "application/json"})
            connection.getresponse().read()

        with again_and_again(ask_in_vain, 0.3):
            await_alerts(prometheus, seen, "StreamdNoUpstream", "StreamdCertificateExpires")
        for _ in range(9):
            stack.enter_context(socket.create_connection(("127.0.0.1", only.port)))
        await_alerts(prometheus, seen, "StreamdSaturated")
        await_drain(stack, d, prometheus, seen)
    missing = alerts() - seen - UNPROVOKED
    if missing:
        raise SystemExit(f"no fault was made for {sorted(missing)}")
    show(f"every alert fires for its fault, but for {', '.join(sorted(UNPROVOKED))}, which promtool tests")


def await_engine_alerts(n: Nodes, prometheus: Prometheus, seen: set[str]) -> None:
    """The engine is full, emptied and killed, and node a dies, whose stream node b has followed."""
    await_alerts(prometheus, seen, "StreamdMembersDiffer")
    n.engine.ask("CONFIG", "SET", "maxmemory", "1")
    await_alerts(prometheus, seen, "StreamdEngineFull", "StreamdEngineLags")
    n.engine.ask("CONFIG", "SET", "maxmemory", "0")
    with again_and_again(lambda: n.engine.ask("FLUSHALL"), 1.0):
        await_alerts(prometheus, seen, "StreamdEngineEvicts")
    n.until_up("a", "b")
    n.until_copied("a")
    running = n.start("a", tokens=100_000, interval_ms=50)
    elsewhere = n.read("b", running.stream_id).read(1)
    n.kill("a")
    await_alerts(prometheus, seen, "StreamdNodeLost")
    assert "node_lost" in elsewhere.to_the_end().events[-1].data
    n.engine.kill()
    await_alerts(prometheus, seen, "StreamdEngineDown")


def await_drain(stack: contextlib.ExitStack, d: Served, prometheus: Prometheus, seen: set[str]) -> None:
    """The main process hangs within drain_delay: its workers go on with their reader, beyond the deadline."""
    long = d.generation(tokens=3000, interval_ms=100)
    stack.callback(long.close)
    d.signal(signal.SIGTERM)
    until(lambda: d.request("GET", "/readyz").status == 503, "a drain")
    d.signal(signal.SIGSTOP)
    await_alerts(prometheus, seen, "StreamdDrainStuck")
    assert long.readline(), "the reader still gets its tokens"


def main() -> None:
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)} (Debian: prometheus)")
    for command in (["check", "rules"], ["check", "config"], ["test", "rules"]):
        files = {
            "check rules": "streamd.rules.yml",
            "check config": "prometheus.yml",
            "test rules": "streamd.rules.test.yml",
        }
        subprocess.run(["promtool", *command, files[" ".join(command)]], cwd=RULES.parent, check=True)
    with tempfile.TemporaryDirectory(prefix="streamd-prometheus-") as folder:
        run(Path(folder))


if __name__ == "__main__":
    main()
