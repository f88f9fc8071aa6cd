"""Notifier and inherited() against a notification socket of the test; the unit files against systemd's own tools."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import skip_without

from streamd.daemon import systemd
from streamd.daemon.systemd import Notifier, inherited

UNITS = Path(__file__).parents[2] / "systemd"
EXPOSURE_MAX = 1.5  # score of `systemd-analyze security`, where 10 is the worst
PID = os.getpid()


class Listener:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, address: str | bytes) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(address)

    def heard(self) -> list[str]:
        """All datagrams received so far, in order."""
        datagrams = []
        while True:
            try:
                datagrams.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return datagrams

    def heard_fd(self) -> tuple[str, list[int]]:
        datagram, fds, _, _ = socket.recv_fds(self.socket, 4096, 4)
        return datagram.decode(), fds


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(str(tmp_path / "notify"))
    yield listener
    listener.socket.close()


@pytest.fixture
def notifier(tmp_path: Path, listener: Listener) -> Iterator[Notifier]:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": str(tmp_path / "notify")}, PID)
    yield notifier
    notifier.close()


# Notifier


def test_states_are_sent_in_order(notifier: Notifier, listener: Listener) -> None:
    notifier.extend_timeout(30_000_000)
    notifier.ready("serving")
    notifier.status("3 connections, 2 streams")
    notifier.watchdog()
    notifier.reloading(123_456_789)
    notifier.ready()
    notifier.stopping("draining 2 streams")
    notifier.extend_timeout(1_000_000)
    assert listener.heard() == [
        "EXTEND_TIMEOUT_USEC=30000000",
        "READY=1\nSTATUS=serving",
        "STATUS=3 connections, 2 streams",
        "WATCHDOG=1",
        "RELOADING=1\nMONOTONIC_USEC=123456789",
        "READY=1",
        "STOPPING=1\nSTATUS=draining 2 streams",
        "EXTEND_TIMEOUT_USEC=1000000",
    ]


def test_every_call_returns_whether_the_socket_took_the_datagram(notifier: Notifier) -> None:
    assert notifier.enabled
    for told in (notifier.ready, notifier.watchdog, notifier.stopping):
        assert told()
    assert notifier.status("x")
    assert notifier.reloading(1)
    assert notifier.extend_timeout(1)
    assert notifier.remove_fd("a")


def test_an_abstract_address_is_reached() -> None:
    name = f"streamd-test-{PID}-{os.urandom(4).hex()}"
    there = Listener(b"\0" + name.encode())
    assert Notifier("@" + name).ready()
    assert there.heard() == ["READY=1"]
    there.socket.close()


@pytest.mark.parametrize("address", ["", "@", "relative/path", "vsock:2:1234", "C:\\notify"])
def test_without_an_address_nothing_is_sent(address: str) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": address}, PID)
    assert not notifier.enabled
    assert not notifier.ready("x")
    assert not notifier.watchdog()
    assert not notifier.store_fd("streamd-state", 0)


@pytest.mark.parametrize("name", ["nobody-binds-this", "x" * 200, "\udcff\udc80"])
def test_an_address_without_a_socket_raises_nothing(tmp_path: Path, name: str) -> None:
    notifier = Notifier(f"{tmp_path}/{name}")
    assert notifier.enabled
    assert not notifier.ready()
    assert not notifier.status("x")


def test_a_status_cannot_smuggle_an_assignment_or_grow(notifier: Notifier, listener: Listener) -> None:
    notifier.status("a\nSTOPPING=1\r\nb\0c\x85d")
    notifier.status("é" * 5000)
    first, second = listener.heard()
    assert first == "STATUS=a STOPPING=1 b\0c d"
    assert second == "STATUS=" + "é" * systemd.STATUS_CHARS_MAX


def test_half_a_character_in_a_status_is_replaced(notifier: Notifier, listener: Listener) -> None:
    assert notifier.status("model \udce9")
    assert listener.heard() == ["STATUS=model ?"]


def test_a_full_socket_delays_states_in_order_and_drops_the_rest(notifier: Notifier, listener: Listener) -> None:
    while notifier.status("filling"):
        pass
    assert not notifier.ready()
    assert not notifier.watchdog()
    assert not notifier.reloading(7)
    assert not notifier.status("lost")
    assert set(listener.heard()) == {"STATUS=filling"}
    assert notifier.watchdog()
    assert listener.heard() == ["READY=1", "RELOADING=1\nMONOTONIC_USEC=7", "WATCHDOG=1"]


def test_delayed_states_are_bounded_and_keep_the_latest(notifier: Notifier, listener: Listener) -> None:
    while notifier.status("filling"):
        pass
    for usec in range(systemd.OWED_DATAGRAMS_MAX + 3):
        notifier.reloading(usec)
    listener.heard()
    notifier.ready()
    datagrams = listener.heard()
    assert len(datagrams) == systemd.OWED_DATAGRAMS_MAX + 1
    assert datagrams[-2:] == [f"RELOADING=1\nMONOTONIC_USEC={systemd.OWED_DATAGRAMS_MAX + 2}", "READY=1"]


def test_the_socket_is_found_again_after_systemd_made_a_new_one(
    tmp_path: Path, notifier: Notifier, listener: Listener
) -> None:
    notifier.ready()
    listener.socket.close()
    os.unlink(tmp_path / "notify")
    assert not notifier.watchdog()
    again = Listener(str(tmp_path / "notify"))
    assert notifier.watchdog()
    assert again.heard() == ["WATCHDOG=1"]
    again.socket.close()


def test_a_stored_descriptor_is_sent_with_its_name(notifier: Notifier, listener: Listener) -> None:
    memfd = os.memfd_create("streamd-state")
    os.write(memfd, b"the streams")
    assert notifier.store_fd(systemd.STATE_FDNAME, memfd)
    os.close(memfd)
    datagram, fds = listener.heard_fd()
    assert datagram == "FDSTORE=1\nFDNAME=streamd-state"
    assert os.pread(fds[0], 100, 0) == b"the streams"
    os.close(fds[0])
    assert notifier.remove_fd(systemd.STATE_FDNAME)
    assert listener.heard() == ["FDSTOREREMOVE=1\nFDNAME=streamd-state"]


def test_storing_a_closed_descriptor_returns_false(notifier: Notifier, listener: Listener) -> None:
    notifier.ready()  # else the notifier's own socket would take the freed number
    listener.heard()
    memfd = os.memfd_create("gone")
    os.close(memfd)
    assert not notifier.store_fd("gone", memfd)
    assert listener.heard() == []


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "naïve", "x" * 256])
def test_a_name_that_systemd_would_refuse_is_a_bug(notifier: Notifier, name: str) -> None:
    with pytest.raises(AssertionError):
        notifier.store_fd(name, 0)


@pytest.mark.parametrize(
    ("variables", "interval_s"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "20000000"}, 10.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(PID)}, 10.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(PID + 1)}, 0.0),
        ({"WATCHDOG_USEC": "0", "WATCHDOG_PID": str(PID)}, 0.0),
        ({"WATCHDOG_USEC": "soon", "WATCHDOG_PID": str(PID)}, 0.0),
        ({"WATCHDOG_USEC": "-5"}, 0.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": ""}, 0.0),
    ],
)
def test_the_watchdog_interval_is_half_of_its_time_for_the_named_process_only(
    variables: dict[str, str], interval_s: float
) -> None:
    assert Notifier.from_environ(dict(variables), PID).watchdog_interval_s == interval_s


def test_the_variables_of_systemd_are_removed_from_the_environment() -> None:
    environ = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "2", "LISTEN_PID": "3", "HOME": "/"}
    environ |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "public"}
    Notifier.from_environ(environ, PID)
    assert inherited(environ, PID) == ([], [], [])
    assert environ == {"HOME": "/"}


# inherited()


def _passed(*fds: int) -> int:
    """Put copies of `fds` at consecutive numbers, as systemd does from 3 on; return the first number."""
    # Above all other descriptors of the test process.
    fd_first = 700
    for offset, fd in enumerate(fds):
        os.dup2(fd, fd_first + offset)
    return fd_first


def _environ(count: int, names: str | None, pid: int = PID) -> dict[str, str]:
    environ = {"LISTEN_PID": str(pid), "LISTEN_FDS": str(count)}
    return environ if names is None else environ | {"LISTEN_FDNAMES": names}


@pytest.fixture
def public() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "admin.sock"))
        listener.listen()
        yield listener


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("streamd-state")
    yield fd
    os.close(fd)


def _let_go(passed: systemd.Inherited) -> None:
    for _, listener in passed.listeners:
        listener.close()
    for fd in passed.stored:
        os.close(fd)


def test_listeners_and_the_stored_state_are_told_apart(public: socket.socket, admin: socket.socket, memfd: int) -> None:
    fd_first = _passed(memfd, public.fileno(), admin.fileno())
    passed = inherited(_environ(3, "streamd-state:public:admin"), PID, fd_first)
    assert [(name, listener.getsockname()) for name, listener in passed.listeners] == [
        ("public", public.getsockname()),
        ("admin", admin.getsockname()),
    ]
    assert passed.stored == [fd_first]
    assert passed.refused == []
    for fd in (fd_first, *(listener.fileno() for _, listener in passed.listeners)):
        assert not os.get_inheritable(fd)
    assert all(not listener.getblocking() for _, listener in passed.listeners)
    _let_go(passed)


def test_a_passed_listener_accepts(public: socket.socket) -> None:
    passed = inherited(_environ(1, "public"), PID, _passed(public.fileno()))
    with socket.create_connection(public.getsockname()) as client:
        listener = passed.listeners[0][1]
        listener.setblocking(True)
        accepted, peer = listener.accept()
        assert peer == client.getsockname()
        accepted.close()
    _let_go(passed)


def test_several_addresses_of_one_unit_share_its_name(public: socket.socket, admin: socket.socket) -> None:
    passed = inherited(_environ(2, "public:public"), PID, _passed(public.fileno(), admin.fileno()))
    assert [name for name, _ in passed.listeners] == ["public", "public"]
    _let_go(passed)


@pytest.mark.parametrize("names", [None, "", "public"])
def test_a_listener_without_a_name_is_called_unknown(public: socket.socket, names: str | None) -> None:
    passed = inherited(_environ(2, names), PID, _passed(public.fileno(), public.fileno()))
    assert [name for name, _ in passed.listeners] == [names or "unknown", "unknown"]
    _let_go(passed)


def test_other_descriptors_are_closed_and_named(memfd: int) -> None:
    ours, theirs = socket.socketpair()
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fd_first = _passed(ours.fileno(), datagrams.fileno(), memfd, ours.fileno())
    passed = inherited(_environ(5, "public:udp:other:streamd-state:closed"), PID, fd_first)
    assert passed == ([], [], ["public", "udp", "other", "streamd-state", "closed"])
    for fd in range(fd_first, fd_first + 5):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    for end in (ours, theirs, datagrams):
        end.close()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        _environ(1, "public", PID + 1),
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "public"},
        {"LISTEN_PID": str(PID), "LISTEN_FDS": "many"},
        {"LISTEN_PID": str(PID), "LISTEN_FDS": "-1"},
        {"LISTEN_PID": str(PID), "LISTEN_FDS": "99999999999"},
        {"LISTEN_PID": str(PID)},
    ],
)
def test_variables_for_another_process_or_without_sense_pass_nothing(
    environ: dict[str, str], public: socket.socket
) -> None:
    fd_first = _passed(public.fileno())
    assert inherited(environ, PID, fd_first) == ([], [], [])
    assert environ == {}
    os.fstat(fd_first)  # untouched
    os.close(fd_first)


TAKES_THREE_AND_FOUR = """
import fcntl, os, sys
from streamd.daemon.systemd import inherited
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1:]]
os.dup2(high[0], 3), os.dup2(high[1], 4)
environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "streamd-state:public"}
[(name, listener)], stored, refused = inherited(environ, os.getpid())
print(name, listener.fileno(), listener.getsockname()[1])
print(stored, refused, [os.get_inheritable(fd) for fd in (3, 4)])
"""


def test_descriptors_begin_at_three_and_no_child_inherits_them(public: socket.socket, memfd: int) -> None:
    # In a child process: 3 and 4 of the test process are in use.
    told = subprocess.run(
        [sys.executable, "-c", TAKES_THREE_AND_FOUR, str(memfd), str(public.fileno())],
        pass_fds=(memfd, public.fileno()),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert told.stdout == f"public 4 {public.getsockname()[1]}\n[3] [] [False, False]\n"
    assert inherited({}, PID) == ([], [], [])


# The unit files


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the units with commands that exist here."""
    skip_without("systemd-analyze")
    copies = tmp_path_factory.mktemp("units")
    for unit in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        text = unit.read_text().replace("/opt/streamd/bin/streamd", "/bin/true")
        (copies / unit.name).write_text(text)
    return copies


def test_the_units_pass_systemds_own_check(units: Path) -> None:
    names = sorted(str(unit) for unit in units.iterdir())
    assert len(names) == 3
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False
    )
    # The exit code doesn't count a directive that isn't known, and counts faults of the machine's own units.
    assert [line for line in found.stderr.splitlines() if "streamd" in line] == []


def test_the_sandbox_scores_at_most_the_allowed_exposure(units: Path) -> None:
    scored = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(units / "streamd.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    overall = re.search(r"Overall exposure level for streamd\.service: ([\d.]+)", scored.stdout)
    assert overall is not None, scored.stderr
    assert float(overall[1]) <= EXPOSURE_MAX


def test_the_socket_units_use_the_names_that_the_service_expects() -> None:
    service = (UNITS / "streamd.service").read_text()
    sockets = re.search(r"^Sockets=(.*)$", service, re.M)
    assert sockets is not None
    assert sorted(sockets[1].split()) == sorted(unit.name for unit in UNITS.glob("*.socket"))
    assert "FileDescriptorName=public\n" in (UNITS / "streamd.socket").read_text()
    assert "FileDescriptorName=admin\n" in (UNITS / "streamd-admin.socket").read_text()
