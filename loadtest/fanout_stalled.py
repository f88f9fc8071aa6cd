"""A stream with 5,000 readers, a tenth of them stalled: the effect on the others, for each policy.

Four runs: a control in which all readers read, and a run for each policy. Each publishes events of 4 KB at a steady
pace, so that a stalled reader's kernel buffers are full within three seconds, and then its ring. At the end the stalled
readers read on: `coalesce` must give them every token, `drop_oldest` every token or a gap that names it, `close` a
beginning without a hole and the end of the connection. Memory is measured when the buffers are full and again at the
end: it must be flat.

    fanout_stalled.py                      about a minute
    fanout_stalled.py --readers 2000 --seconds 5
"""

from __future__ import annotations

import argparse
import re
import select
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field

import contenders
import rig

from streamd.policy import Policy

EVENT_BYTES = 4000
STALLED_RCVBUF_BYTES = 4096
SETTLED_S = 8.0  # kernel buffers and rings are full: 20-25 KB and 32 KiB at 8 KB/s
READ_BYTES = 262_144
RAMP_PER_S = 2500

# The number and the sending time in an event, or the range in a gap, in the order of the stream.
_said = re.compile(rb'\|(\d+) (\d+) |"gap":\{"from":(\d+),"to":(\d+)').finditer


@dataclass(slots=True)
class Reader:
    """A connection, and its position up to which no token is missing."""

    sock: socket.socket
    stalled: bool
    rest: bytes = b""
    next: int = 1  # the next expected token
    missing: int = 0  # announced
    wrong: bool = False  # an unannounced hole, or a token twice
    over: bool = False


@dataclass
class Run:
    """The figures of a run."""

    policy: str
    stalled: int
    ages_ms: list[float] = field(default_factory=list)
    published: int = 0
    readers: list[Reader] = field(default_factory=list)
    pss_bytes: tuple[int, int] = (0, 0)  # when the stall has settled, and at the end
    kernel_bytes: tuple[float, float] = (0.0, 0.0)  # of each stalled reader, at the same two times
    cpu_us: float = 0.0  # per event and reading reader

    def row(self) -> str:
        """A line of the table."""
        others = [reader for reader in self.readers if not reader.stalled]
        cuts = statistics.quantiles(self.ages_ms, n=100)
        memory = " -> ".join(f"{each / 1e6:.1f}" for each in self.pss_bytes)
        kernel = " -> ".join(f"{each / 1024:.0f}" for each in self.kernel_bytes)
        complete = sum(reader.next == self.published + 1 and not reader.wrong for reader in others)
        return (
            f"{self.policy:12}{self.stalled:8}{complete:8}/{len(others)}{cuts[49]:9.1f}{cuts[98]:9.1f}{self.cpu_us:9.1f}"
            f"{memory:>18}{kernel:>14}   {self.promise()}"
        )

    def promise(self) -> str:
        """The number of stalled readers for which the policy's promise held."""
        held = sum(self.kept(reader) for reader in self.readers if reader.stalled)
        return f"{held}/{self.stalled}" if self.stalled else ""

    def kept(self, reader: Reader) -> bool:
        """Whether the policy's promise held for a stalled reader."""
        whole = reader.next == self.published + 1 and not reader.wrong
        if self.policy == "coalesce":
            return whole and not reader.missing
        if self.policy == "drop_oldest":
            return whole and reader.missing > 0
        return reader.over and not reader.wrong and not reader.missing and reader.next <= self.published

    def holds(self) -> bool:
        """The others unharmed, the stalled served as promised, memory flat (within 5 %, because of the allocator)."""
        others = [reader for reader in self.readers if not reader.stalled]
        unharmed = all(reader.next == self.published + 1 and not reader.wrong for reader in others)
        promised = all(self.kept(reader) for reader in self.readers if reader.stalled)
        return unharmed and promised and self.pss_bytes[1] <= self.pss_bytes[0] * 1.05


def main(argv: list[str]) -> int:
    """Run, print the table, and return whether all of it holds as the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=5000)
    parser.add_argument("--stalled", type=float, default=0.1, help="share of stalled readers")
    parser.add_argument("--per-second", type=float, default=2, help="events")
    parser.add_argument("--seconds", type=float, default=12, help="duration of each run")
    options = parser.parse_args(argv)
    print("policy       stalled  complete  age p50   p99 ms us/event     PSS MB of it  kernel KB/stalled  promise kept")
    held = []
    for policy in ("", *(policy.value for policy in Policy)):
        run = measure(options, policy)
        print(run.row(), flush=True)
        held.append(run.holds())
    print(f"holds: {all(held)}   {rig.machine()}")
    return int(not all(held))


def measure(options: argparse.Namespace, policy: str) -> Run:
    """Measure a run; policy "" is the control."""
    stalled = round(options.readers * options.stalled) if policy else 0
    run = Run(policy or "control", stalled)
    with rig.rig() as running:
        port = rig.free_port()
        pid = running.start("streamd", contenders.streamd(running.folder, port, 9), port, contenders.environment())
        opened(port, policy or "coalesce")
        publisher = publish(port)
        loop = select.epoll()
        by_fd = connect(run, loop, port, options.readers)
        play(run, loop, by_fd, publisher, options, (pid, port))
        for reader in run.readers:
            reader.sock.close()
    return run


def opened(port: int, policy: str) -> None:
    """PUT the stream."""
    body = b'{"policy":"%b","log_bytes_max":"1MiB"}' % policy.encode()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(
            b"PUT /v1/streams/load HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        answer = sock.recv(4096)
    if b" 201 " not in answer:
        raise RuntimeError(answer.decode())


def publish(port: int) -> socket.socket:
    """Begin a long request with a chunked body for the events."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(
        b"POST /v1/streams/load/events?seal=finished HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    return sock


def connect(run: Run, loop: select.epoll, port: int, count: int) -> dict[int, Reader]:
    """Connect all readers, on a ramp."""
    by_fd: dict[int, Reader] = {}
    begun = time.monotonic()
    for k in range(count):
        sock = socket.socket()
        stalled = k < run.stalled
        if stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STALLED_RCVBUF_BYTES)
        sock.bind((rig.STALLED_ADDRESS if stalled else "127.0.0.1", 0))
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"GET /v1/streams/load HTTP/1.1\r\nHost: localhost\r\n\r\n")
        sock.setblocking(False)
        reader = Reader(sock, stalled)
        run.readers.append(reader)
        by_fd[sock.fileno()] = reader
        if not stalled:
            loop.register(sock, select.EPOLLIN)
        time.sleep(max(0.0, begun + k / RAMP_PER_S - time.monotonic()))
    time.sleep(1)  # until the last readers are subscribed
    return by_fd


def play(
    run: Run,
    loop: select.epoll,
    by_fd: dict[int, Reader],
    publisher: socket.socket,
    options: argparse.Namespace,
    server: tuple[int, int],
) -> None:
    """Publish and read, measure memory twice, end the stream, and let the stalled readers read on."""
    begun = time.monotonic()
    looked: list[tuple[int, float]] = []
    before = sum(rig.cpu_s(server[0]))
    while (at_s := time.monotonic() - begun) < options.seconds:
        if at_s >= run.published / options.per_second:
            run.published += 1
            publisher.sendall(event(run.published))
        if not looked and at_s >= SETTLED_S:
            looked.append(look(server, run.stalled))
        read(run, loop, by_fd, 0.005)
    run.cpu_us = (sum(rig.cpu_s(server[0])) - before) / run.published / (len(by_fd) - run.stalled) * 1e6
    read_until(run, loop, by_fd, [reader for reader in run.readers if not reader.stalled], 10)
    looked.append(look(server, run.stalled))
    run.pss_bytes = looked[0][0], looked[-1][0]
    run.kernel_bytes = looked[0][1], looked[-1][1]
    publisher.sendall(b"0\r\n\r\n")
    stalled = [reader for reader in run.readers if reader.stalled]
    for reader in stalled:
        loop.register(reader.sock, select.EPOLLIN)
    read_until(run, loop, by_fd, stalled, 20)
    publisher.close()


def event(number: int) -> bytes:
    """A chunk of the publisher's body."""
    text = b"|%d %d " % (number, time.monotonic_ns())
    text += b"x" * (EVENT_BYTES - len(text))
    return b"%x\r\n%b\r\n" % (len(text), text)


def look(server: tuple[int, int], stalled: int) -> tuple[int, float]:
    """User-space memory of the server, and kernel memory of each stalled reader's connection."""
    pid, port = server
    queues = rig.queue_bytes(f"sport = :{port} and dst {rig.STALLED_ADDRESS}") if stalled else []
    return rig.pss_bytes(pid), statistics.mean(queues) if queues else 0.0


def read_until(run: Run, loop: select.epoll, by_fd: dict[int, Reader], readers: list[Reader], limit_s: float) -> None:
    """Read until these readers have everything or have ended."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if all(reader.over or reader.next > run.published for reader in readers):
            return
        read(run, loop, by_fd, 0.1)


def read(run: Run, loop: select.epoll, by_fd: dict[int, Reader], wait_s: float) -> None:
    """Read the available bytes of all readers."""
    for fd, _ in loop.poll(wait_s):
        reader = by_fd[fd]
        try:
            piece = reader.sock.recv(READ_BYTES)
        except OSError:
            piece = b""
        if piece:
            take(run, reader, piece)
        else:
            reader.over = True
            loop.unregister(fd)


def take(run: Run, reader: Reader, piece: bytes) -> None:
    """Take the tokens and gaps of whole events."""
    data = reader.rest + piece
    end = data.rfind(b"\n\n") + 2
    if end < 2:
        reader.rest = data
        return
    reader.rest = data[end:]
    now_ns = time.monotonic_ns()
    for found in _said(data, 0, end):
        if found[1]:
            reader.wrong |= int(found[1]) != reader.next
            reader.next += 1
            if not reader.stalled:
                run.ages_ms.append((now_ns - int(found[2])) / 1e6)
        else:
            reader.wrong |= int(found[3]) != reader.next
            reader.missing += int(found[4]) + 1 - int(found[3])
            reader.next = int(found[4]) + 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
