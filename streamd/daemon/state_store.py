"""Where streams wait while no process runs: systemd's file descriptor store, and a file in the state directory.

    systemctl restart       systemd keeps a memfd named `streamd-state` and passes it to the next process
    stop, later start       systemd (252) lets its store go with the unit: the file is what is left
    a crash, kill -9        nothing was saved, and nothing older is found: what is taken up is removed at once

So at an orderly stop one pass over the streams writes both, as far as they are there: the memfd under systemd, the file
with a `state_dir`. That systemd's store is open for us (FileDescriptorStoreMax=) can't be seen from here; where it
isn't, systemd closes what it gets. The file is complete or not there: written beside its place, synced, renamed.

At start both may be there. The newest save counts; of its copies the first that reads to its end, and what a damaged
one lacks comes from the other. An older save is never mixed in: a published stream would lose events in silence. A file
that can't be read is left aside as FILE.damaged, and its streams are 410 like those of a process that crashed.

Bounds. What is chosen (core/kept.py) is at most what the logs may take. The memfd is memory of the same control group
beside the logs themselves, so it is written only into half of what is free of the limit, and where that isn't enough
for everything, the file alone is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from streamd.api.publish import Publisher
from streamd.core.kept import (
    FACTS_BYTES,
    Header,
    KeptStream,
    Read,
    StateError,
    choose,
    keep,
    load,
    read_header,
    restore,
    save,
)
from streamd.core.stream import Stream
from streamd.daemon import logs, systemd
from streamd.daemon.control import STATE_FILE
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason

FILE: Final = STATE_FILE

# Written in pieces: 200 streams of 5 KB a system call.
WRITE_BYTES: Final = 1024 * 1024

# systemd's notification socket may be full for a moment: this is the one datagram that has to arrive now.
STORE_TRIES: Final = 20
STORE_WAIT_S: Final = 0.05

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(slots=True)
class _Copy:
    """One copy of a save, opened. `aside` leaves it for a person to look at."""

    where: str
    fd: int
    read: Read
    header: Header
    aside: Callable[[], None]


class FdStore(Protocol):
    """systemd's store: systemd.Notifier, or the way to it through the parent."""

    @property
    def enabled(self) -> bool: ...

    def store_fd(self, name: str, fd: int) -> bool: ...

    def remove_fd(self, name: str) -> bool: ...


class StateStore:
    """Both places of one daemon. `take` once at start, `put` once at the end."""

    def __init__(self, notifier: FdStore, state_dir: str, stored: Sequence[int] = ()) -> None:
        """`stored` are systemd's descriptors (systemd.Inherited), which are closed when they were read."""
        self._notifier = notifier
        self._stored = list(stored)
        self._path = Path(state_dir) / FILE if state_dir else None

    # -- at start

    def take(self) -> Iterator[KeptStream]:
        """The streams of the last save, each once; then both places are empty. Says in the log what can't be read."""
        self.check_directory()
        copies = [*self._stored_copies(), *self._file_copy()]
        newest = max(copies, key=lambda copy: copy.header.saved_unix, default=None)
        try:
            if newest is not None:
                yield from _merged([copy for copy in copies if copy.header.save_id == newest.header.save_id])
        finally:
            for copy in copies:
                os.close(copy.fd)
            if self._path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(_loading(self._path))

    def check_directory(self) -> None:
        """A directory that can't be written is said now, not when the streams are lost."""
        if self._path is None:
            return
        folder = self._path.parent
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            logs.event(logs.WARNING, "state_dir can't be written; a stop loses all streams", dir=str(folder))

    def _stored_copies(self) -> Iterator[_Copy]:
        fds, self._stored = self._stored[::-1], []
        if fds:
            self._notifier.remove_fd(systemd.STATE_FDNAME)
        for fd in fds:
            yield from _opened("systemd", fd, lambda: None)

    def _file_copy(self) -> Iterator[_Copy]:
        """The file, out of its place from now on: a start that dies in the middle doesn't meet it again."""
        path = self._path
        if path is None:
            return
        loading = _loading(path)
        try:
            os.rename(path, loading)
            fd = os.open(loading, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            _say_unusable(str(path), error)
            _leave_aside(path)
            return
        yield from _opened(str(path), fd, lambda: _leave_aside(path))

    # -- at the end

    def put(self, kept: Iterable[KeptStream], *, in_memory: bool) -> tuple[str, ...]:
        """Save streams in every place there is; those that worked. `in_memory`: there is room for the memfd."""
        sinks = list(self._sinks(in_memory))
        if not sinks:
            return ()
        for piece in _in_pieces(save(kept, os.urandom(8), time.time())):
            for sink in tuple(sinks):
                if not _written(sink, piece):
                    sinks.remove(sink)
        return tuple(sink.where for sink in sinks if sink.finish())

    @property
    def in_memory_only(self) -> bool:
        """Whether there is no place but systemd's store."""
        return self._path is None

    def _sinks(self, in_memory: bool) -> Iterator[_Memory | _File]:
        """Those that can be had; one that can't is named in the log."""
        places: list[tuple[str, Callable[[], _Memory | _File]]] = []
        if self._notifier.enabled and in_memory:
            places.append((_Memory.where, partial(_Memory, self._notifier)))
        if self._path is not None:
            places.append((str(self._path), partial(_File, self._path)))
        for where, make in places:
            try:
                yield make()
            except OSError as error:
                _say_unsaved(where, error)


def _loading(path: Path) -> Path:
    return path.with_name(path.name + ".loading")


def _leave_aside(path: Path) -> None:
    """As FILE.damaged, in place of one that was there before."""
    with contextlib.suppress(OSError):
        os.rename(_loading(path), path.with_name(path.name + ".damaged"))


def _opened(where: str, fd: int, aside: Callable[[], None]) -> Iterator[_Copy]:
    """The copy behind a descriptor, if it begins like one."""
    offset = 0

    def read(count: int) -> bytes:
        # Not the file's own position: systemd's copy of the descriptor shares that.
        nonlocal offset
        piece = os.pread(fd, count, offset)
        offset += len(piece)
        return piece

    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StateError("it is no regular file")
        yield _Copy(where, fd, read, read_header(read), aside)
    except (StateError, OSError) as error:
        _say_unusable(where, error)
        aside()
        os.close(fd)


def _merged(copies: Sequence[_Copy]) -> Iterator[KeptStream]:
    """All copies are of one save: the first that reads to its end has everything."""
    seen: set[str] = set()
    for copy in copies:
        try:
            for kept in load(copy.read):
                if kept.facts.id not in seen:
                    seen.add(kept.facts.id)
                    yield kept
            return
        except (StateError, OSError) as error:
            _say_unusable(copy.where, error)
            copy.aside()


def _say_unusable(where: str, error: Exception) -> None:
    logs.event(logs.ERROR, "saved streams can't be read; the rest is left aside", where=where, error=str(error))


def _in_pieces(records: Iterable[bytes]) -> Iterator[bytes]:
    piece = bytearray()
    for record in records:
        piece += record
        if len(piece) >= WRITE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def _say_unsaved(where: str, error: OSError) -> None:
    logs.event(logs.ERROR, "streams can't be saved", where=where, error=str(error))


class _Memory:
    """A memfd for systemd's store."""

    where = "systemd"

    def __init__(self, notifier: FdStore) -> None:
        self._notifier = notifier
        self.fd = os.memfd_create(systemd.STATE_FDNAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def finish(self) -> bool:
        """Hand it over, unchangeable. Whether systemd's socket took it."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self._notifier.remove_fd(systemd.STATE_FDNAME)
        taken = any(self._offer() for _ in range(STORE_TRIES))
        os.close(self.fd)
        if not taken:
            _say_unsaved(self.where, OSError("its socket takes nothing"))
        return taken

    def _offer(self) -> bool:
        if self._notifier.store_fd(systemd.STATE_FDNAME, self.fd):
            return True
        time.sleep(STORE_WAIT_S)  # nothing is served any more
        return False


class _File:
    """A file that takes its place when it is complete and on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unfinished = path.with_name(path.name + ".unfinished")
        self.where = str(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._unfinished)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(self._unfinished, flags, 0o600)

    def finish(self) -> bool:
        """Sync it and give it its name. Whether that worked."""
        try:
            _sync_and_close(self.fd)
            os.rename(self._unfinished, self._path)
            _sync_and_close(os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            _say_unsaved(self.where, error)
            return False
        return True


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _written(sink: _Memory | _File, piece: bytes) -> bool:
    """Whether all of the piece is in the sink; if not, it is closed and given up."""
    left = memoryview(piece)
    try:
        while left:
            left = left[os.write(sink.fd, left) :]
    except OSError as error:
        _say_unsaved(sink.where, error)
        os.close(sink.fd)
        return False
    return True


# Several workers: what each has lies in a memfd of its slot, which the parent keeps


def write_kept(fd: int, kept: Iterable[KeptStream]) -> None:
    """Streams into a slot's memfd, in place of what is there. Raises OSError, and leaves it empty."""
    os.ftruncate(fd, 0)
    offset = 0
    try:
        for piece in _in_pieces(save(kept, os.urandom(8), time.time())):
            left = memoryview(piece)
            while left:
                written = os.pwrite(fd, left, offset)
                offset, left = offset + written, left[written:]
    except OSError:
        os.ftruncate(fd, 0)
        raise


def read_kept(fd: int) -> Iterator[KeptStream]:
    """The streams in a slot's memfd; says in the log what can't be read. Nothing there: nothing."""
    if not os.fstat(fd).st_size:
        return
    for copy in _opened("worker", os.dup(fd), lambda: None):
        try:
            yield from load(copy.read)
        except (StateError, OSError) as error:
            _say_unusable(copy.where, error)
        finally:
            os.close(copy.fd)


def leave_streams(fd: int, runtime: Runtime, room_bytes: int) -> None:
    """A worker that has drained leaves its streams to the parent, as many as there is room for beside the logs."""
    hub, now, now_unix = runtime.hub, runtime.time(), runtime.unix_time()
    chosen = choose(hub, room_bytes)
    try:
        write_kept(fd, (keep(hub, stream, now, now_unix) for stream in chosen))
    except OSError as error:
        _say_unsaved("worker", error)
        return
    if len(chosen) < len(hub):
        logs.event(logs.WARNING, "streams not kept", left=len(hub) - len(chosen), room_bytes=room_bytes)


def distribute(store: StateStore, slots: Sequence[int], owner: Callable[[str], int]) -> None:
    """What the process before has left, into the memfd of each stream's worker. `slots`: their descriptors."""
    dealt: list[list[KeptStream]] = [[] for _ in slots]
    for kept in store.take():
        dealt[owner(kept.facts.id)].append(kept)
    for fd, streams in zip(slots, dealt, strict=True):
        if streams:
            write_kept(fd, streams)


def collect(store: StateStore, slots: Sequence[int]) -> None:
    """What all workers have left, into the store."""
    kept = [stream for fd in slots for stream in read_kept(fd)]
    if kept:
        where = store.put(kept, in_memory=True)
        logs.event(logs.INFO, "streams kept", streams=len(kept) if where else 0, where=where or ("nowhere",))


# One worker's hub


def put_streams(store: StateStore, runtime: Runtime, room_bytes: int) -> None:
    """Save the streams of a worker that has drained. `room_bytes`: memory that may be used beside the logs."""
    hub, now, now_unix = runtime.hub, runtime.time(), runtime.unix_time()
    if not len(hub):
        return
    held = sum(stream.log.bytes_held + FACTS_BYTES for stream in hub)
    in_memory = held <= room_bytes or store.in_memory_only
    chosen = choose(hub, min(held, room_bytes) if in_memory else hub.log_bytes_max)
    where = store.put((keep(hub, stream, now, now_unix) for stream in chosen), in_memory=in_memory)
    kept = len(chosen) if where else 0
    if len(hub):
        logs.event(
            logs.INFO, "streams kept", streams=kept, left=len(hub) - kept, bytes=held, where=where or ("nowhere",)
        )


def take_streams(kept_streams: Iterable[KeptStream], runtime: Runtime) -> None:
    """Register what was saved with a worker that begins, as far as its logs' budget goes."""
    hub = runtime.hub
    taken = live = left = 0
    for kept in kept_streams:
        now = runtime.time()
        size = sum(map(len, kept.log.segments))
        if not kept.live and hub.log_bytes + size > hub.log_bytes_max:
            left += 1
            continue
        stream = restore(hub, kept, now, runtime.unix_time())
        if stream is None:
            left += 1
            continue
        taken += 1
        if kept.live:
            live += 1
            _await_publisher(runtime, stream, kept.facts.flush_interval_s)
    if taken or left:
        logs.event(logs.INFO, "streams taken up", streams=taken, live=live, left=left, bytes=hub.log_bytes)


def _await_publisher(runtime: Runtime, stream: Stream, flush_interval_s: float) -> None:
    """A published stream goes on if its publisher comes back within publisher_grace."""
    now = runtime.time()
    if flush_interval_s:
        stream.use_fanout(runtime.new_fanout(stream, flush_interval_s))
    if runtime.admission.admit_stream() is not None:
        stream.fail(CloseReason.RESTARTED, now, message="There was no room for this stream after a restart.")
        return
    publisher = Publisher(runtime, stream)
    publisher.due_at = now + runtime.settings.publisher_grace_s
    stream.source = publisher
