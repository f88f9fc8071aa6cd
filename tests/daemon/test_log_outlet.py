"""The log's way out: no write waits for the reader, lines wait in bounded memory, and a loss is counted and told."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from streamd.daemon import log_outlet
from streamd.daemon.log_outlet import PIECE_BYTES_MAX, WAITING_BYTES_MAX, LogOutlet

LINE = b"x" * 999 + b"\n"
FULL = 4 * WAITING_BYTES_MAX // len(LINE)  # lines: more than a pipe and the outlet take together


def told(count: int) -> bytes:
    return b"lost %d\n" % count


def read_all(fd: int) -> bytes:
    os.set_blocking(fd, False)
    found = b""
    while True:
        try:
            piece = os.read(fd, 1 << 20)
        except BlockingIOError:
            return found
        if not piece:
            return found
        found += piece


@pytest.fixture(params=["pipe", "another user's pipe", "socket"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """The reader's end and the blocking descriptor that the outlet gets."""
    if request.param == "socket":
        near, far = socket.socketpair()
        yield near.fileno(), far.fileno()
        near.close()
        far.close()
        return
    near_fd, far_fd = os.pipe()
    refuses = mock.patch.object(log_outlet.os, "open", side_effect=PermissionError(errno.EACCES, "denied"))
    with refuses if request.param != "pipe" else mock.patch.object(log_outlet, "WAITING_BYTES_MAX", WAITING_BYTES_MAX):
        yield near_fd, far_fd
    os.close(near_fd)
    os.close(far_fd)


def test_a_reader_that_takes_nothing_costs_lines_and_no_time(ends: tuple[int, int]) -> None:
    reader, fd = ends
    outlet = LogOutlet(fd, told)
    for _ in range(FULL):
        outlet.write(LINE)  # a write that waits would hang here
    assert outlet._waiting_bytes <= WAITING_BYTES_MAX and outlet.lost > 0
    found = b""
    while not outlet.flush():
        found += read_all(reader)
    outlet.write(b"next\n")
    found += read_all(reader)
    lines = found.split(b"\n")
    lost = outlet.lost
    assert lines[-3:] == [b"lost %d" % lost, b"next", b""]
    assert set(lines[:-3]) == {LINE[:-1]} and len(lines) - 3 + lost == FULL
    outlet.write(b"after\n")
    assert read_all(reader) == b"after\n", "a loss is told once"


def test_lines_leave_in_order_and_whole(ends: tuple[int, int]) -> None:
    reader, fd = ends
    outlet = LogOutlet(fd, told)
    wanted = [b"%d %s\n" % (number, b"y" * (number * 37 % 9000)) for number in range(100)]
    found = b""
    for line in wanted:
        outlet.write(line)
        if outlet._waiting_bytes > WAITING_BYTES_MAX // 2:
            found += read_all(reader)
    while not outlet.flush():
        found += read_all(reader)
    assert found + read_all(reader) == b"".join(wanted) and not outlet.lost


def test_lines_that_wait_leave_several_at_once_as_far_as_a_pipe_takes_them_whole() -> None:
    near, far = os.pipe()
    outlet = LogOutlet(far, told)
    sent: list[bytes] = []
    send = outlet._send
    outlet._send = lambda lines: sent.append(lines) or send(lines)  # type: ignore[func-returns-value]
    outlet.corked = True
    for _ in range(30):
        outlet.write(LINE)
    assert sent == [] and outlet._waiting_bytes == 30 * len(LINE)
    outlet.corked = False
    assert outlet.flush()
    most = PIECE_BYTES_MAX // len(LINE)
    assert read_all(near) == 30 * LINE
    assert all(piece == LINE * most for piece in sent[:-1]) and len(sent) == -(-30 // most)
    outlet.write(b"x" * PIECE_BYTES_MAX + b"\n")  # a line that is longer leaves alone
    assert len(sent[-1]) == PIECE_BYTES_MAX + 1
    os.close(near)
    os.close(far)


def test_lines_that_are_held_back_are_bounded_and_each_lost_line_counts() -> None:
    outlet = LogOutlet(without_reader(), told)
    outlet.corked = True
    many = WAITING_BYTES_MAX // len(LINE)
    for _ in range(many):
        outlet.write(LINE)
    assert outlet.lost == 0
    for _ in range(3):
        outlet.write(LINE)
    assert outlet._waiting_bytes <= WAITING_BYTES_MAX
    outlet.corked = False
    while outlet._waiting:
        outlet.flush()
    assert outlet.lost == many + 3


def without_reader() -> int:
    near, far = os.pipe()
    os.close(near)
    return far


def closed() -> int:
    fd = os.open("/dev/null", os.O_WRONLY)
    os.close(fd)
    return fd


@pytest.mark.parametrize("make", [without_reader, closed, lambda: os.open("/dev/full", os.O_WRONLY)])
def test_lines_that_nobody_can_read_are_counted(make: Callable[[], int]) -> None:
    outlet = LogOutlet(make(), told)
    for number in range(1, 4):
        outlet.write(LINE)
        assert outlet.lost == number and not outlet._waiting
    outlet.finish()


def test_the_end_waits_for_a_reader_that_reads_and_not_for_another() -> None:
    near, far = os.pipe()
    outlet = LogOutlet(far, told)
    for _ in range(100):
        outlet.write(LINE)
    with mock.patch.object(log_outlet, "FINISH_S_MAX", 0.0):
        outlet.finish()
    assert outlet._waiting
    slept: list[bytes] = []
    with mock.patch.object(log_outlet.time, "sleep", lambda seconds: slept.append(read_all(near))):
        outlet.finish()
    assert len(b"".join(slept) + read_all(near)) == 100 * len(LINE)
    os.close(near)
    os.close(far)


def test_the_line_that_tells_of_a_loss_may_be_cut_and_leaves_whole() -> None:
    outlet, found = LogOutlet(os.open("/dev/null", os.O_WRONLY), lambda count: b"lost %d lines\n" % count), bytearray()

    def takes(room: int) -> Callable[[bytes], int]:
        def send(line: bytes) -> int:
            found.extend(line[:room])
            return min(room, len(line))

        return send

    outlet.lose()
    outlet._send = takes(3)
    outlet.flush()
    assert bytes(found) == b"lost 1" and outlet._waiting_bytes == len(outlet._waiting[0]) == 7
    outlet._send = takes(100)
    outlet.write(b"next\n")
    assert bytes(found) == b"lost 1 lines\nnext\n" and not outlet._waiting_bytes


def test_a_file_takes_every_line(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    outlet = LogOutlet(fd, told)
    for _ in range(3):
        outlet.write(LINE)
    os.close(fd)
    assert (tmp_path / "log").read_bytes() == 3 * LINE and not outlet.lost


def test_standard_streams_that_are_closed_get_devices_that_keep_nothing() -> None:
    opened: dict[str, list[int]] = {}
    real_open = os.open

    def opens(path: str, flags: int) -> int:
        opened.setdefault(path, []).append(fd := real_open(path, flags))
        return fd

    all_closed = mock.patch.object(log_outlet.os, "fstat", side_effect=OSError(errno.EBADF, "closed"))
    with mock.patch.object(log_outlet.os, "open", opens):
        log_outlet.open_standard_streams()
        assert opened == {}, "all three are open"
        with all_closed:
            log_outlet.open_standard_streams()
    assert {path: len(fds) for path, fds in opened.items()} == {"/dev/null": 1, "/dev/full": 2}
    for fd in (*opened["/dev/null"], *opened["/dev/full"]):
        assert os.get_inheritable(fd), "the workers have it too"
        os.close(fd)
