"""Hold 10,000 readers and more in a process: numbers that greenlets can't reach on two cores.

An epoll loop, plain sockets, a few hundred bytes per reader. Readers connect on a ramp; shares of them

  stalled    stop reading after a few events, for --stall seconds (0: forever), then read on,
  slow       read --slow-bps bytes a second,
  vanishing  reset their connection in mid-stream and stay away,
  resuming   reset it --cuts times and come back with Last-Event-ID after the time in `retry:`,

and all others read. `--wave AT` resets all connections within a second, AT seconds after the last was opened, and lets
all come back. Every reader verifies its own text and seqs (checker.py). It prints a line of progress each second, and
a JSON report at the end; the exit status is 1 if a token was lost in silence or came twice, or if a reader that should
be complete is not.

    holder.py --port 8080 --readers 10000 --stalled 0.1 --tokens 60
    holder.py --port 8080 --readers 8000 --wave 5 --reference --body '{"model":"mock-llm","stream":true,…}'

A process holds at most as many readers as it may open files. Beyond 20,000 readers the next source address is used
(127.0.0.2, …), since an address has 28,000 ports.
"""

from __future__ import annotations

import argparse
import enum
import functools
import heapq
import itertools
import json
import math
import random
import resource
import select
import socket
import struct
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checker import Checker, Histogram, Numbered, Reference, Response, Tally

IP_BIND_ADDRESS_NO_PORT = 24
PORTS_PER_ADDRESS = 20_000
READ_BYTES_MAX = 65_536
STALL_RCVBUF_BYTES = 4096  # a reader that stops should soon stop the server, not after megabytes
SLOW_SLICES_PER_S = 5
RETRY_S = 1.0  # unless the server says otherwise
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST

CHAT = {"model": "mock-llm", "stream": True, "messages": [{"role": "user", "content": "Tell me a story."}]}


class Group(enum.Enum):
    """The behaviour of a reader."""

    LIVE = "live"
    STALLED = "stalled"
    SLOW = "slow"
    VANISHING = "vanishing"
    RESUMING = "resuming"


class State(enum.Enum):
    """The state of a reader."""

    CONNECTING = "connecting"
    READING = "reading"
    PAUSED = "paused"  # stalled, or slow between two slices
    AWAY = "away"  # will come back
    OVER = "over"


@dataclass(frozen=True)
class Plan:
    """The options of the command line."""

    port: int
    readers: int
    tokens: int | None = None  # of each stream; None: not known
    path: str = "/v1/chat/completions"
    body: bytes = b""
    grace_s: float = 30
    ramp_per_s: float = 1000
    shares: dict[Group, float] = field(default_factory=dict)
    stall_s: float = 0
    slow_bps: int = 1000
    cuts: int = 3
    act_after_events: int = 20  # about the number of events before a reader acts as its group does
    wave_at_s: float | None = None
    seconds: float = 120
    reference: bytes | None = None
    seed: int = 1


class Reader:
    """A reader, over all its connections."""

    __slots__ = (
        "acts_at", "asked_s", "checker", "cuts_left", "fd_socket", "first_seen", "group", "index", "last_text_s",
        "response", "state", "stream_id",
    )  # fmt: skip

    def __init__(self, index: int, group: Group, checker: Checker, cuts: int, acts_at: int) -> None:
        # process
        self.index = index
        self.group = group
        self.checker = checker
        self.cuts_left = cuts
        self.acts_at = acts_at  # number of its own events until it acts
        self.stream_id = b""
        self.first_seen = False
        # connection
        self.state = State.AWAY
        self.fd_socket: socket.socket | None = None
        self.response = Response()
        self.asked_s = 0.0
        self.last_text_s = 0.0


class Holder:
    """All readers, and the loop that serves them. `run` returns the report."""

    def __init__(self, plan: Plan, progress: Callable[[str], None] = lambda line: None) -> None:
        self._plan = plan
        self._progress = progress
        self._rng = random.Random(plan.seed)
        self._epoll = select.epoll()
        self._by_fd: dict[int, Reader] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._begun_s = time.monotonic()
        # results
        self._tallies = {group: Tally() for group in Group}
        self._ages, self._firsts, self._gaps, self._backs = Histogram(), Histogram(), Histogram(), Histogram()
        self._answers: Counter[int] = Counter()
        self._ends: Counter[str] = Counter()
        self._retry_after = 0
        self._resumed = 0
        self._opened = 0
        self._all_over = False
        self._open_most = 0
        self._opened_in_s: float | None = None
        self._wave_at_s: float | None = None
        self._wave_out: set[int] = set()
        self._wave_back_s: float | None = None
        self._readers = [self._reader(index, group) for index, group in enumerate(self._groups())]

    def run(self) -> dict[str, Any]:
        """Connect, hold and verify readers until all that should end have ended, or the time is over."""
        self._begun_s = time.monotonic()
        deadline_s = self._begun_s + self._plan.seconds
        self._at(self._begun_s, self._ramp)
        self._at(self._begun_s + 1, self._tell)
        if Group.SLOW in self._plan.shares:
            self._at(self._begun_s, self._slow_slice)
        self._at(self._begun_s, self._look_round)
        while (now := time.monotonic()) < deadline_s and not self._all_over:
            due = self._timers[0][0] - now if self._timers else 0.1
            for fd, events in self._epoll.poll(min(max(due, 0), 0.1), 1024):
                reader = self._by_fd.get(fd)
                if reader is not None:
                    self._ready(reader, events)
            self._run_timers()
        self._tell()
        report = self._report()
        for reader in list(self._by_fd.values()):
            self._drop(reader, State.OVER)
        self._epoll.close()
        return report

    # Set-up

    def _groups(self) -> list[Group]:
        """A group for each reader, in random order."""
        groups = []
        for group, share in self._plan.shares.items():
            groups += [group] * round(share * self._plan.readers)
        groups += [Group.LIVE] * (self._plan.readers - len(groups))
        self._rng.shuffle(groups)
        return groups

    def _reader(self, index: int, group: Group) -> Reader:
        text: Numbered | Reference
        if self._plan.reference is None:
            text = Numbered(self._ages if group is Group.LIVE else None)
        else:
            text = Reference(self._plan.reference)
        acts_at = self._rng.randint(1, 2 * self._plan.act_after_events - 1)
        return Reader(index, group, Checker(text, self._tallies[group]), self._plan.cuts, acts_at)

    # Timers

    def _at(self, at_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (at_s, next(self._order), what))

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def _ramp(self) -> None:
        """Connect the readers that are due; once a millisecond until all are connected."""
        elapsed_s = time.monotonic() - self._begun_s
        due = min(self._plan.readers, math.ceil(elapsed_s * self._plan.ramp_per_s))
        while self._opened < due:
            self._connect(self._readers[self._opened])
            self._opened += 1
        if due < self._plan.readers:
            self._at(time.monotonic() + 0.001, self._ramp)
            return
        self._opened_in_s = elapsed_s
        if self._plan.wave_at_s is not None:
            self._at(time.monotonic() + self._plan.wave_at_s, self._wave)

    def _wave(self) -> None:
        """Reset all connections at random times within this second."""
        now = self._wave_at_s = time.monotonic()
        for reader in list(self._by_fd.values()):
            self._at(now + self._rng.random(), functools.partial(self._wash_away, reader))

    def _wash_away(self, reader: Reader) -> None:
        """Count the reader as disconnected from here on, not from the wave's beginning: earlier reads are no return."""
        if reader.fd_socket is not None:
            self._wave_out.add(reader.index)
            self._cut(reader)

    def _slow_slice(self) -> None:
        for reader in list(self._by_fd.values()):
            if reader.group is Group.SLOW and reader.state is State.PAUSED:
                self._read(reader, max(1, self._plan.slow_bps // SLOW_SLICES_PER_S))
        self._at(time.monotonic() + 1 / SLOW_SLICES_PER_S, self._slow_slice)

    # Connections

    def _connect(self, reader: Reader) -> None:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if reader.group in (Group.STALLED, Group.SLOW):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STALL_RCVBUF_BYTES)
        connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        connection.bind((f"127.0.0.{1 + reader.index // PORTS_PER_ADDRESS}", 0))
        connection.connect_ex(("127.0.0.1", self._plan.port))
        reader.fd_socket = connection
        reader.response = Response()
        reader.state = State.CONNECTING
        reader.asked_s = time.monotonic()
        self._by_fd[connection.fileno()] = reader
        self._open_most = max(self._open_most, len(self._by_fd))
        self._epoll.register(connection.fileno(), select.EPOLLOUT)

    def _ready(self, reader: Reader, events: int) -> None:
        connection = reader.fd_socket
        assert connection is not None
        if reader.state is State.CONNECTING:
            error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error or not self._ask(reader, connection):
                self._lost_connection(reader, "connect")
                return
            reader.state = State.READING
            self._epoll.modify(connection.fileno(), select.EPOLLIN)
        elif reader.state is State.READING:
            self._read(reader, READ_BYTES_MAX)
        elif events & (select.EPOLLERR | select.EPOLLHUP):
            self._lost_connection(reader, "reset")

    def _ask(self, reader: Reader, connection: socket.socket) -> bool:
        host = f"Host: 127.0.0.1:{self._plan.port}\r\nAccept: text/event-stream\r\n"
        if reader.stream_id:
            last = f"Last-Event-ID: {reader.checker.last_id.decode()}\r\n" if reader.checker.last_id else ""
            request = f"GET /v1/streams/{reader.stream_id.decode()} HTTP/1.1\r\n{host}{last}\r\n".encode()
        else:
            grace = f"X-Stream-Detach-Grace: {self._plan.grace_s:g}\r\n" if self._comes_back(reader) else ""
            length = f"Content-Type: application/json\r\nContent-Length: {len(self._plan.body)}\r\n"
            head = f"POST {self._plan.path} HTTP/1.1\r\n{host}{grace}{length}\r\n"
            request = head.encode() + self._plan.body
        try:
            return connection.send(request) == len(request)
        except OSError:
            return False

    def _comes_back(self, reader: Reader) -> bool:
        return reader.group is Group.RESUMING or self._plan.wave_at_s is not None

    def _read(self, reader: Reader, most_bytes: int) -> None:
        assert reader.fd_socket is not None
        try:
            data = reader.fd_socket.recv(most_bytes)
        except BlockingIOError:
            return
        except OSError:
            self._lost_connection(reader, "reset")
            return
        if not data:
            self._ended(reader)
            return
        try:
            events = self._take(reader, data)
        except ValueError:
            reader.checker.tally.wrong += 1
            self._over(reader, "malformed")
            return
        if reader.response.ended and reader.state is not State.OVER:
            self._ended(reader)
        elif events:
            self._act(reader)

    def _take(self, reader: Reader, data: bytes) -> bool:
        """Check the received bytes; return whether they completed an event."""
        fresh = not reader.response.status
        blocks = reader.response.take(data)
        if fresh and reader.response.status:
            self._answered(reader)
        if blocks:
            self._back(reader)
        for block in blocks:
            self._event(reader, block)
        return bool(blocks)

    def _answered(self, reader: Reader) -> None:
        response = reader.response
        self._answers[response.status] += 1
        if response.status == 204:
            self._back(reader)  # the reader had everything already
        if response.status != 200:
            self._retry_after += response.field(b"retry-after") is not None
            return
        if reader.stream_id:
            self._resumed += 1
        reader.stream_id = response.field(b"x-stream-id") or reader.stream_id

    def _back(self, reader: Reader) -> None:
        if self._wave_at_s is None or reader.index not in self._wave_out:
            return
        self._wave_out.discard(reader.index)
        took_s = time.monotonic() - self._wave_at_s
        self._backs.add(took_s)
        if not self._wave_out:
            self._wave_back_s = took_s

    def _event(self, reader: Reader, block: bytes) -> None:
        if not reader.checker.take(block) or reader.group is not Group.LIVE:
            return
        now = time.monotonic()
        if not reader.first_seen:
            reader.first_seen = True
            self._firsts.add(now - reader.asked_s)
        elif reader.last_text_s > reader.asked_s:
            self._gaps.add(now - reader.last_text_s)
        reader.last_text_s = now

    # Actions of the groups

    def _act(self, reader: Reader) -> None:
        """After a read with events, act as the reader's group does, if it is time."""
        if reader.group is Group.LIVE or reader.state is not State.READING:
            return
        reader.acts_at -= 1
        if reader.acts_at > 0:
            return
        reader.acts_at = self._plan.act_after_events
        if reader.group is Group.VANISHING:
            self._over(reader, "vanished")
        elif reader.group is Group.RESUMING and reader.cuts_left:
            reader.cuts_left -= 1
            self._cut(reader)
        elif reader.group is Group.SLOW or (reader.group is Group.STALLED and reader.cuts_left):
            reader.cuts_left = 0
            self._pause(reader)

    def _pause(self, reader: Reader) -> None:
        assert reader.fd_socket is not None
        reader.state = State.PAUSED
        self._epoll.modify(reader.fd_socket.fileno(), 0)
        if reader.group is Group.STALLED and self._plan.stall_s:
            self._at(time.monotonic() + self._plan.stall_s, functools.partial(self._read_on, reader))

    def _read_on(self, reader: Reader) -> None:
        if reader.state is State.PAUSED and reader.fd_socket is not None:
            reader.state = State.READING
            self._epoll.modify(reader.fd_socket.fileno(), select.EPOLLIN)

    def _cut(self, reader: Reader) -> None:
        """Reset the connection, and come back after the time in `retry:`."""
        if reader.state in (State.READING, State.PAUSED, State.CONNECTING):
            self._drop(reader, State.AWAY)
            self._return(reader)

    def _return(self, reader: Reader) -> None:
        retry_ms = reader.checker.retry_ms
        self._at(
            time.monotonic() + (RETRY_S if retry_ms is None else retry_ms / 1000),
            functools.partial(self._connect, reader),
        )

    # Ends

    def _ended(self, reader: Reader) -> None:
        """Handle the end of an answer, proper or not."""
        response = reader.response
        reader.checker.take_rest(response.rest)
        if reader.checker.whole(self._plan.tokens) and (response.ended or not response.chunked):
            self._over(reader, "complete")
        elif reader.checker.error:
            self._over(reader, f"error {reader.checker.error}")
        elif response.status == 204:
            # Text is missing, or the last event: the reader got a 204 before the stream's end.
            self._over(reader, "incomplete" if reader.checker.finished else "204 before the end")
        elif response.status == 200 and reader.stream_id and self._comes_back(reader) and not reader.checker.finished:
            self._cut(reader)  # a polite refusal, or a reconnect event
        elif response.status == 200:
            self._over(reader, "incomplete")
        else:
            self._over(reader, f"refused {response.status}" if response.status else "no answer")

    def _lost_connection(self, reader: Reader, how: str) -> None:
        if self._comes_back(reader) and reader.stream_id:
            self._cut(reader)
        else:
            self._over(reader, how)

    def _over(self, reader: Reader, how: str) -> None:
        self._ends[f"{reader.group.value}: {how}"] += 1
        self._drop(reader, State.OVER)

    def _drop(self, reader: Reader, state: State) -> None:
        """Close the connection with a reset, so that no TIME_WAIT keeps the port."""
        assert reader.fd_socket is not None
        del self._by_fd[reader.fd_socket.fileno()]
        reader.fd_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        reader.fd_socket.close()  # leaves the epoll set by itself
        reader.fd_socket = None
        reader.state = state

    def _look_round(self) -> None:
        """Check ten times a second whether all readers have ended except those that stall or creep forever."""
        self._all_over = self._opened_in_s is not None and all(
            reader.state is State.OVER or (reader.state is State.PAUSED and not self._plan.stall_s)
            for reader in self._readers
        )
        self._at(time.monotonic() + 0.1, self._look_round)

    # Reports

    def _tell(self) -> None:
        elapsed_s = time.monotonic() - self._begun_s
        tokens = sum(tally.tokens for tally in self._tallies.values())
        bad = {
            name: sum(getattr(tally, name) for tally in self._tallies.values()) for name in ("lost", "doubled", "wrong")
        }
        ends = ", ".join(f"{name} {count}" for name, count in sorted(self._ends.items()))
        self._progress(
            f"{elapsed_s:6.1f} s  open {len(self._by_fd)} of {self._opened}  tokens {tokens}"
            f"  resumed {self._resumed}  {bad}  {ends}"
        )
        self._at(time.monotonic() + 1, self._tell)

    def _report(self) -> dict[str, Any]:
        quantiles = {"p50": 0.5, "p99": 0.99}
        histograms = {"age": self._ages, "ttft": self._firsts, "gap": self._gaps, "back": self._backs}
        counts = Counter(reader.group for reader in self._readers)
        return {
            "readers": {group.value: counts[group] for group in Group if counts[group]},
            "open_most": self._open_most,
            "open_at_end": len(self._by_fd),
            "opened_in_s": self._opened_in_s and round(self._opened_in_s, 2),
            "answers": dict(self._answers),
            "with_retry_after": self._retry_after,
            "ends": dict(sorted(self._ends.items())),
            "resumed": self._resumed,
            "wave_at_s": self._wave_at_s,  # CLOCK_MONOTONIC, so that it compares with the probes of other processes
            "wave_back_s": self._wave_back_s and round(self._wave_back_s, 2),
            "wave_missing": len(self._wave_out),
            "groups": {
                group.value: {name: getattr(tally, name) for name in Tally.__slots__}
                for group, tally in self._tallies.items()
                if counts[group]
            },
            **{f"{name}_ms": {key: it.ms(q) for key, q in quantiles.items()} for name, it in histograms.items()},
        }


def holds(report: dict[str, Any]) -> bool:
    """Whether no token was lost in silence or came twice, and all readers that should be complete are."""
    silent = all(not tally[name] for tally in report["groups"].values() for name in ("lost", "doubled", "wrong"))
    refused = sum(count for end, count in report["ends"].items() if "refused" in end)
    wanted = sum(report["readers"].get(group, 0) for group in ("live", "resuming"))
    complete = sum(report["ends"].get(f"{group}: complete", 0) for group in ("live", "resuming"))
    return silent and complete + refused >= wanted


def reference_text(url: str, body: bytes) -> bytes:
    """The text of an undisturbed answer that isn't streamed: each reader must end with this text."""
    whole = json.dumps({**json.loads(body), "stream": False}).encode()
    request = urllib.request.Request(url, whole, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text.encode("utf-8", "surrogatepass")


def raise_descriptors(wanted: int) -> None:
    """Raise the limit of open files to the hard limit. Raises SystemExit if that is too low for the readers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < wanted + 64:
        raise SystemExit(f"{wanted} readers need as many files; the limit is {hard}: start several holders")


def plan_of(argv: list[str]) -> tuple[Plan, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--tokens", type=int, help="of each stream, where they are numbered (source.c)")
    parser.add_argument("--path", default="/v1/chat/completions")
    parser.add_argument("--body", default=json.dumps(CHAT))
    parser.add_argument("--ramp", type=float, default=1000, help="connections a second")
    for group in (Group.STALLED, Group.SLOW, Group.VANISHING, Group.RESUMING):
        parser.add_argument(f"--{group.value}", type=float, default=0, help="share of the readers, 0 to 1")
    parser.add_argument("--stall", type=float, default=0, help="seconds that a stalled reader stalls; 0: forever")
    parser.add_argument("--slow-bps", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument(
        "--act-after", type=int, default=20, help="approximate reads until a reader acts as its group does"
    )
    parser.add_argument(
        "--grace", type=float, default=30, help="seconds of detach grace that returning readers ask for"
    )
    parser.add_argument("--wave", type=float, help="reset all readers this many seconds after the last connected")
    parser.add_argument("--seconds", type=float, default=120, help="upper bound of the run's duration")
    parser.add_argument("--reference", nargs="?", const="", help="verify against the unstreamed answer (of this URL)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report there too")
    options = parser.parse_args(argv)
    body = options.body.encode()
    reference = None
    if options.reference is not None:
        reference = reference_text(options.reference or f"http://127.0.0.1:{options.port}{options.path}", body)
    shares = {group: share for group in Group if (share := getattr(options, group.value, 0))}
    plan = Plan(
        port=options.port, readers=options.readers, tokens=options.tokens, path=options.path, body=body,
        grace_s=options.grace, ramp_per_s=options.ramp, shares=shares, stall_s=options.stall, slow_bps=options.slow_bps,
        cuts=options.cuts, act_after_events=options.act_after, wave_at_s=options.wave, seconds=options.seconds,
        reference=reference, seed=options.seed,
    )  # fmt: skip
    return plan, options


def main(argv: list[str]) -> int:
    """Hold the readers, and return whether the promises held as the exit status."""
    plan, options = plan_of(argv)
    raise_descriptors(plan.readers)
    report = Holder(plan, lambda line: print(line, file=sys.stderr, flush=True)).run()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return int(not holds(report))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
