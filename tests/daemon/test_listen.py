"""Listening sockets: bound, with the options that accepted sockets inherit."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

import pytest

from streamd import keepalive
from streamd.addresses import parse_address
from streamd.config import Settings
from streamd.daemon import listen


def test_a_tcp_listener_is_shown_by_its_address() -> None:
    with listen.bind(parse_address("127.0.0.1:0")) as sock:
        assert listen.shown(sock) == f"127.0.0.1:{sock.getsockname()[1]}"
        assert listen.is_loopback(sock) and not sock.getblocking()


def test_an_ipv6_listener_takes_ipv6_only() -> None:
    try:
        sock = listen.bind(parse_address("[::1]:0"))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with sock:
        assert listen.shown(sock).startswith("[::1]:") and listen.is_loopback(sock)
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_a_public_address_is_not_loopback() -> None:
    with listen.bind(parse_address("0.0.0.0:0")) as sock:
        assert not listen.is_loopback(sock)


def test_the_error_of_an_address_in_use_names_the_address() -> None:
    with listen.bind(parse_address("127.0.0.1:0")) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}: "):
            listen.bind(parse_address(f"127.0.0.1:{port}"))


def test_accepted_sockets_inherit_the_options() -> None:
    settings = Settings(notsent_lowat_bytes=12_345, stall_timeout_s=60.0)
    with listen.bind(parse_address("127.0.0.1:0")) as sock:
        listen.set_options(sock, settings)
        sock.setblocking(True)
        with socket.create_connection(sock.getsockname()), sock.accept()[0] as accepted:
            tcp = socket.IPPROTO_TCP
            assert accepted.getsockopt(tcp, socket.TCP_NODELAY) == 1
            assert accepted.getsockopt(tcp, socket.TCP_NOTSENT_LOWAT) == 12_345
            assert accepted.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == 90_000
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(tcp, socket.TCP_KEEPIDLE) == keepalive.IDLE_S


def test_a_connection_that_comes_before_a_worker_is_up_has_the_options() -> None:
    """Between listen() and the worker's first accept the kernel takes connections by itself."""
    with listen.bind(parse_address("127.0.0.1:0"), Settings(notsent_lowat_bytes=12_345)) as sock:
        sock.setblocking(True)
        with socket.create_connection(sock.getsockname()), sock.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 12_345


def test_without_a_stall_limit_no_user_timeout_is_set() -> None:
    with listen.bind(parse_address("127.0.0.1:0"), Settings(stall_timeout_s=60.0)) as sock:
        listen.set_options(sock, Settings(stall_timeout_s=0.0))
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def test_a_unix_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listen.bind(parse_address(f"unix:{path}")).close()
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    with listen.bind(parse_address(f"unix:{path}")) as sock:
        assert listen.shown(sock) == f"unix:{path}" and listen.is_loopback(sock)
        listen.set_options(sock, Settings())
        with pytest.raises(OSError, match=str(path)):
            listen.bind(parse_address(f"unix:{path}"))


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="precious"):
        listen.bind(parse_address(f"unix:{path}"))
    assert path.read_text() == "data"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_mode_that_is_given_is_the_sockets_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path, before = tmp_path / "admin.sock", os.umask(umask)
    try:
        with listen.bind(parse_address(f"unix:{path}"), mode=listen.ADMIN_MODE):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_held_port_refuses_connections_until_it_listens() -> None:
    with listen.bind(parse_address("127.0.0.1:0"), listens=False) as sock:
        name = sock.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(name)
        sock.listen()
        socket.create_connection(name).close()


def test_a_unix_socket_always_listens(tmp_path: Path) -> None:
    with listen.bind(parse_address(f"unix:{tmp_path}/s"), listens=False), socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/s")


def test_a_socket_whose_queue_is_full_belongs_to_a_daemon_that_lives(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    with contextlib.ExitStack() as opened:
        busy = opened.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(path)
        busy.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                client = opened.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        with pytest.raises(OSError, match="in use"):
            listen.bind(parse_address(f"unix:{path}"))
        assert os.path.exists(path)


def test_a_connection_in_the_queue_is_seen_before_it_is_accepted() -> None:
    with listen.bind(parse_address("127.0.0.1:0")) as sock:
        assert not listen.connection_waits(sock)
        with socket.create_connection(sock.getsockname()):
            assert listen.connection_waits(sock)


@pytest.mark.parametrize("remove", [True, False])
def test_the_file_of_a_socket_is_removed_only_where_that_is_wanted(tmp_path: Path, remove: bool) -> None:
    path = tmp_path / "s"
    listen.close(listen.bind(parse_address(f"unix:{path}")), remove=remove)
    assert path.exists() is not remove
    sock = listen.bind(parse_address("127.0.0.1:0"))
    listen.close(sock, remove=remove)
    assert sock.fileno() == -1


def test_a_file_that_is_gone_is_no_mistake_at_the_close(tmp_path: Path) -> None:
    sock = listen.bind(parse_address(f"unix:{tmp_path}/s"))
    os.unlink(tmp_path / "s")
    listen.close(sock, remove=True)
    assert sock.fileno() == -1
