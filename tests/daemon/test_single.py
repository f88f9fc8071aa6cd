"""The daemon as a process: what systemd is told and when, signals, reloads, and restarts under readers."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from fakes import CHAT, SSE_HEAD, chunk, event, events_in, post, rig, text_of
from served import Held, Notify, Served, holding, served, upstream

from streamd.config import ConfigError, Settings, UpstreamSettings
from streamd.daemon import logs, systemd
from streamd.daemon.single import SECOND_SIGNAL_S, Single, as_far_as_running, check_inherited
from streamd.daemon.worker import Worker

STATE = "streams.state"
JSON = {"Content-Type": "application/json"}
NOBODY = systemd.Inherited([], [], [])


@pytest.fixture(scope="module")
def mock() -> Iterator[str]:
    with upstream() as url:
        yield url


@pytest.fixture
def held() -> Iterator[Held]:
    with holding() as upstream:
        yield upstream


def opened(answer: http.client.HTTPResponse) -> str:
    """Wait for the first event; the stream's id."""
    while not answer.readline().startswith(b"data:"):
        pass
    return answer.getheader("x-stream-id") or ""


def rest(answer: http.client.HTTPResponse) -> tuple[bytes, bool]:
    """What still comes, and whether it ended as HTTP ends it."""
    try:
        return answer.read(), True
    except http.client.IncompleteRead as cut:
        return cut.partial, False


def resumed(d: Served, stream_id: str, last_id: str = "") -> tuple[bytes, bool]:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    answer = d.request("GET", f"/v1/streams/{stream_id}", headers=headers)
    assert answer.status == 200, answer.read()
    return rest(answer)


# What systemd is told


def test_a_life_is_told_in_order_and_ready_means_listening(mock: str) -> None:
    with served("--upstream", mock) as d:
        d.notify.until("READY=1")
        assert d.request("GET", "/readyz").status == 200
        d.signal(signal.SIGHUP)
        d.notify.until("READY=1", 2)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        assert d.notify.names() == ["READY", "RELOADING", "READY", "STOPPING"]
        assert d.notify.told[0] == "READY=1"
        assert d.notify.told[d.notify.told.index("RELOADING=1") + 1].startswith("MONOTONIC_USEC=")
        assert d.notify.told[d.notify.told.index("STOPPING=1") + 1].startswith("STATUS=draining: 0 connections")


def test_a_drain_asks_for_time_and_its_streams_go_to_the_store(mock: str) -> None:
    with served("--upstream", mock, "--drain-timeout", "1s") as d:
        d.notify.until("READY=1")
        answer = d.generation(tokens=1000, interval_ms=20)
        opened(answer)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        names = d.notify.names()
        assert names[:3] == ["READY", "STOPPING", "EXTEND_TIMEOUT_USEC"]
        assert names[-2:] == ["FDSTOREREMOVE", "FDSTORE"]
        assert set(names[3:-2]) == {"EXTEND_TIMEOUT_USEC"}
        (fd,) = d.notify.fds
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:streamd-state")


def test_a_drain_from_the_admin_surface_is_told_too(mock: str, tmp_path: Path) -> None:
    with served("--upstream", mock, "--admin", f"unix:{tmp_path}/admin.sock") as d:
        d.notify.until("READY=1")
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(f"{tmp_path}/admin.sock")
            admin.sendall(b"POST /drain HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
            assert b"202" in admin.recv(4096)
        assert d.ended() == 0
        assert d.notify.names() == ["READY", "STOPPING"]
        assert not (tmp_path / "admin.sock").exists()


def listening_at(sock: socket.socket) -> tuple[str, str]:
    return "--listen", f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_start_that_fails_never_says_ready(mock: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, served("--upstream", mock, *listening_at(taken)) as d:
        assert d.ended() == 1
        assert "Address already in use" in d.lines[-1]
        assert d.notify.names() == []
    with served("--upstream", mock, "--conns-max", "10000000") as d:
        assert d.ended() == 2
        assert "conns_max" in d.lines[-1] and d.notify.names() == []


async def _beside(single: Single, notify: Notify) -> None:
    """Serve, and look from another thread at what is told, but for the time in which the loop is blocked."""
    loop = asyncio.get_running_loop()
    serving = loop.create_task(single.serve(NOBODY))
    await loop.run_in_executor(None, notify.until, "WATCHDOG=1", 2)
    assert "READY=1" in notify.told
    while notify.take(0.001):
        pass
    heard = len(notify.told)
    assert not notify.take(1.0)  # here, in the loop: four times the interval
    assert len(notify.told) == heard
    await loop.run_in_executor(None, notify.until, "WATCHDOG=1", notify.told.count("WATCHDOG=1") + 2)
    single._worker.drain()
    assert await serving == 0


def test_only_a_live_loop_feeds_the_watchdog() -> None:
    notify = Notify()
    settings = Settings(listen=("127.0.0.1:0",), upstreams=(UpstreamSettings(url="http://127.0.0.1:9"),))
    logs.set_level("error")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        worker = Worker(runner.get_loop(), settings)
        single = Single(worker, lambda: settings, systemd.Notifier(notify.address, watchdog_interval_s=0.25))
        runner.run(_beside(single, notify))
    logs.set_level("info")
    notify.close()


# Signals


def test_a_running_generation_finishes_and_the_last_line_counts_it(held: Held) -> None:
    with served("--upstream", held.url) as d:
        answer = d.generation()
        opened(answer)
        d.signal(signal.SIGTERM)
        d.line("draining")
        held.go_on()
        body, whole = rest(answer)
        assert whole and body.endswith(b"data: [DONE]\n\n")
        assert d.ended() == 0
        assert d.lines[-1].endswith(" stopped finished=1 moved=0 cut=0")
        assert [line.split()[2] for line in d.lines if " signal=SIGTERM" in line] == ["draining"]


def test_ctrl_c_is_the_same_with_short_times(mock: str) -> None:
    with served("--upstream", mock) as d:
        answer = d.generation(tokens=2000, interval_ms=20)
        stream_id = opened(answer)
        d.signal(signal.SIGINT)
        body, whole = rest(answer)
        assert not whole
        told = events_in(body.partition(b"\n\n")[2])[-1]
        assert told.name == "reconnect" and told.json["last_id"].startswith(stream_id)
        assert d.ended() == 0
        assert d.lines[-1].endswith(" stopped finished=0 moved=0 cut=1")


def test_a_second_signal_counts_only_a_second_later() -> None:
    """Ctrl-C reaches the whole foreground group, a shell may send it twice: on a clock that jumps."""
    with rig(drain_timeout_s=30.0) as r:
        single = Single(r.worker, lambda: r.worker.settings, systemd.Notifier())
        reader = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        single._stop("SIGTERM", False)
        r.pass_time(SECOND_SIGNAL_S / 2)
        single._stop("SIGTERM", False)
        r.pass_time(SECOND_SIGNAL_S / 4)
        assert not reader.gone
        r.pass_time(SECOND_SIGNAL_S / 4 + 0.001)
        single._stop("SIGTERM", False)
        r.pass_time(0.05)
        assert reader.gone and r.worker.drained.result().cut == 1
        r.runtime.sweep.start()


# Reload


def write(path: Path, upstream_name: str, mock: str, *more: str) -> Path:
    path.write_text("\n".join((*more, "[[upstream]]", f'name = "{upstream_name}"', f'url = "{mock}"', "")))
    return path


def reload(d: Served) -> str:
    """SIGHUP; the line of the log that says what came of it."""
    before = sum(" reload" in line for line in d.lines)
    d.signal(signal.SIGHUP)
    d.until(lambda: sum(" reload" in line for line in d.lines) > before, "line about the reload")
    return [line for line in d.lines if " reload" in line][-1]


def test_a_reload_holds_for_what_is_new_and_drops_nobody(mock: str, held: Held, tmp_path: Path) -> None:
    path = write(tmp_path / "s.toml", "one", held.url)
    with served("--config", str(path)) as d:
        reader = d.generation()
        opened(reader)
        write(path, "two", mock)
        assert "reloaded upstreams=two" in reload(d)
        assert d.generation(tokens=1).getheader("x-upstream") == "two"
        # Limits: one stream runs, so there is no room for another.
        write(path, "two", mock, "streams_max = 1", "conns_max = 8")
        reload(d)
        refused = d.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), JSON)
        assert refused.status == 503 and b"over_capacity" in refused.read()
        write(path, "two", mock, 'log_format = "json"')
        d.signal(signal.SIGHUP)
        d.until(lambda: any(line.startswith("{") and '"reloaded"' in line for line in d.lines), "a line of JSON")
        assert d.generation(tokens=1).status == 200
        held.go_on()
        body, whole = rest(reader)
        assert whole and body.endswith(b"[DONE]\n\n") and reader.getheader("x-upstream") == "one"


NOT_RIGHT = {
    'heartbeat = "soon"': r"s.toml.*heartbeat.*soon",
    "heartbeet = 1": "heartbeet",
    "this is no TOML": "s.toml",
    "conns_max = 10000000": "conns_max",
    'keys_file = "/nowhere/keys"': "keys_file",
}


def test_a_file_that_is_not_right_changes_nothing_and_says_why(mock: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.toml", "one", mock)
    with served("--config", str(path)) as d:
        d.notify.until("READY=1")
        for line, why in NOT_RIGHT.items():
            write(path, "two", mock, line)
            assert re.search(rf'ERROR "?reload refused.*{why}', reload(d)), line
            assert d.generation(tokens=1).getheader("x-upstream") == "one"
        d.notify.until("READY=1", 1 + len(NOT_RIGHT))
        assert d.notify.names() == ["READY"] + ["RELOADING", "READY"] * len(NOT_RIGHT)
        # And what only a restart changes is named; the rest of that file is taken.
        write(path, "two", mock, 'admin = "127.0.0.1:1"', "workers = 3")
        assert "reloaded upstreams=two" in reload(d)
        assert d.line(r"only a restart changes.*settings=(\S+)")[1] == "admin,workers"


def test_a_reload_takes_all_but_what_needs_a_restart() -> None:
    running = Settings(workers=1, heartbeat_s=15.0)
    taken, fixed = as_far_as_running(running, Settings(workers=4, heartbeat_s=7.0, state_dir="/x"))
    assert fixed == ("workers", "state_dir")
    assert (taken.workers, taken.heartbeat_s, taken.state_dir) == (1, 7.0, "")
    assert taken.route("/v1/chat/completions").heartbeat_s == 7.0


def test_a_reload_while_stopping_is_refused(held: Held) -> None:
    with served("--upstream", held.url) as d:
        answer = d.generation()
        opened(answer)
        d.signal(signal.SIGTERM)
        d.line("draining")
        d.signal(signal.SIGHUP)
        d.line("reload refused; streamd is stopping")
        held.go_on()
        assert rest(answer)[1]
        assert d.ended() == 0
        assert "RELOADING" not in d.notify.names()


# Sockets of systemd's


def test_passed_sockets_are_served_by_their_names_and_stay_open(mock: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as public, socket.create_server(("127.0.0.1", 0)) as admin:
        fds = (("public", public.fileno()), ("admin", admin.fileno()))
        with served("--upstream", mock, listen_fds=fds) as d:
            assert d.port == public.getsockname()[1]
            assert d.request("GET", "/streams").status == 404
            asking = http.client.HTTPConnection(*admin.getsockname())
            asking.request("GET", "/streams")
            assert asking.getresponse().status == 200
            d.signal(signal.SIGTERM)
            assert d.ended() == 0
        waiting = socket.create_connection(public.getsockname())  # nobody runs: the kernel keeps it
        waiting.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        with served("--upstream", mock, listen_fds=fds) as d:
            assert waiting.recv(4096).startswith(b"HTTP/1.1 200")
            waiting.close()


def test_a_passed_socket_needs_keys_beyond_loopback_as_listen_does(mock: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as public:
        with served("--upstream", mock, listen_fds=[("public", public.fileno())]) as d:
            assert d.ended() == 2
            assert "streamd.socket: ListenStream = 0.0.0.0:" in d.lines[-1] and "keys_file" in d.lines[-1]
        check_inherited(Settings(insecure_public=True), [public])
        check_inherited(Settings(keys_file="/keys"), [public])
        with pytest.raises(ConfigError):
            check_inherited(Settings(), [public])


# Restart without loss


# Three starts on a busy machine may take longer than a finished stream or one without its publisher is kept by default.
PATIENT = ("--publisher-grace", "10m", "--retention", "10m")


class Life:
    """One process of several that follow each other, with what passes between them."""

    def __init__(self, mock: str, place: str, tmp_path: Path) -> None:
        self.args = ["--upstream", mock, "--drain-timeout", "500ms", *PATIENT]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.fds = [("public", self.listener.fileno())]
        self.state_dir = tmp_path / "state"
        self._stored: int | None = None
        if place == "file":
            self.args += ["--state-dir", str(self.state_dir)]
        self._keeps = place == "store"

    def next(self) -> Served:
        stored = [] if self._stored is None else [(systemd.STATE_FDNAME, self._stored)]
        return Served(self.args, {}, [*self.fds, *stored])

    def stop(self, d: Served) -> None:
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        d.notify.names()
        if self._keeps and d.notify.fds:
            if self._stored is not None:
                os.close(self._stored)
            self._stored = os.dup(d.notify.fds[-1])
        d.end()

    def crash(self, d: Served) -> None:
        told = d.notify.names()
        d.signal(signal.SIGKILL)
        d.ended()
        d.end()
        if self._stored is not None:
            assert "FDSTOREREMOVE" in told
            os.close(self._stored)
            self._stored = None

    def close(self) -> None:
        self.listener.close()
        if self._stored is not None:
            os.close(self._stored)


@pytest.fixture(
    params=[("store", 1), ("file", 1), ("store", 2), ("file", 2)], ids=lambda place: f"{place[0]}-{place[1]}"
)
def life(request: pytest.FixtureRequest, mock: str, tmp_path: Path) -> Iterator[Life]:
    place, workers = request.param
    life = Life(mock, place, tmp_path)
    life.args += ["--workers", str(workers)]
    yield life
    life.close()


def cut_off(d: Served, answer: http.client.HTTPResponse) -> tuple[bytes, str]:
    """Stop the daemon under a reader; what that reader still got, and the position that it was told."""
    d.signal(signal.SIGTERM)
    body, clean = rest(answer)
    assert not clean
    told = events_in(body.partition(b"\n\n")[2])[-1]
    assert told.name == "reconnect"
    return body, told.json["last_id"]


def test_a_restart_loses_nothing(life: Life) -> None:
    d = life.next()
    whole = d.generation(tokens=20, interval_ms=1)
    whole_text, whole_id = text_of(events_in(whole.read())), whole.getheader("x-stream-id") or ""
    cut = d.generation(tokens=5000, interval_ms=5)
    cut_id = opened(cut)
    epoch = d.request("PUT", "/v1/streams/news").read().partition(b'"epoch":"')[2][:6].decode()
    assert d.request("POST", "/v1/streams/news/events", b"one").read() == b'{"last_seq":1}'
    seen, last_id = cut_off(d, cut)
    assert last_id.startswith(f"{cut_id}:")
    life.stop(d)

    d = life.next()
    again, clean = resumed(d, whole_id)
    assert clean and text_of(events_in(again)) == whole_text
    body, clean = resumed(d, cut_id, last_id)
    *_, error = events_in(body)
    assert not clean and error.json["error"]["code"] == "restarted"
    from_start = text_of(events_in(resumed(d, cut_id)[0]))
    assert text_of(events_in(seen.partition(b"\n\n")[2])) in from_start
    more = d.request("POST", "/v1/streams/news/events", b"two", {"Expected-Seq": "1"})
    assert more.read() == b'{"last_seq":2}'
    life.stop(d)

    d = life.next()
    last = d.request("POST", "/v1/streams/news/events?seal=finished", b"three", {"Expected-Seq": "2"})
    assert last.read() == b'{"last_seq":3}'
    body, clean = resumed(d, "news", f"news:{epoch}:1")
    assert clean and events_in(body)[-1].id == f"news:{epoch}:3"
    assert d.request("GET", f"/v1/streams/{cut_id}", headers={"Last-Event-ID": f"{cut_id}:99999"}).status == 204
    life.crash(d)

    d = life.next()
    assert d.request("GET", f"/v1/streams/{cut_id}").status == 410  # what had been taken up is not found again
    life.stop(d)


def test_a_port_that_is_taken_leaves_saved_streams_for_the_next_try(mock: str, tmp_path: Path) -> None:
    args = ("--upstream", mock, "--state-dir", str(tmp_path), *PATIENT)
    with served(*args) as d:
        answer = d.generation(tokens=3, interval_ms=1)
        answer.read()
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
    with socket.create_server(("127.0.0.1", 0)) as taken, served(*args, *listening_at(taken)) as d:
        assert d.ended() == 1
    with served(*args) as d:
        assert resumed(d, answer.getheader("x-stream-id") or "")[1]


def test_a_damaged_file_is_no_reason_not_to_start(mock: str, tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(os.urandom(1000))
    with served("--upstream", mock, "--state-dir", str(tmp_path)) as d:
        assert d.request("GET", "/readyz").status == 200
        d.line("ERROR .*can't be read.*no state of streamd's")
        assert os.listdir(tmp_path) == [STATE + ".damaged"]
