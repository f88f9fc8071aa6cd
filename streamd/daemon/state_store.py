"""Storage for streams, and for the makers of kept objects, while no process runs: systemd's file descriptor store, and
a file in the state directory.

    systemctl restart       systemd keeps a memfd named `streamd-state` and passes it to the next process
    stop, later start       systemd (252) drops its store with the unit: only the file is left
    a crash, kill -9        nothing was saved, and no older save is found: a start removes the save that it reads

So at an orderly stop a single pass over the streams writes both places, if they exist: the memfd under systemd, the
file with a `state_dir`. A process can't see whether systemd's store is open for it (FileDescriptorStoreMax=); if it
isn't, systemd closes the descriptor. The file is complete or absent: it is written beside its place, synced, renamed.

At start both may exist. Only the newest save counts. The first of its copies that reads to its end is enough, and
streams that a damaged copy lacks come from the other. An older save is never mixed in: a published stream would lose
events in silence. A file that can't be read is left aside as FILE.damaged, and its streams are 410 like those of a
process that crashed.

Bounds. The chosen streams (core/snapshot.py) take at most the memory bound of the logs. The memfd is memory of the same
control group beside the logs themselves, so it may take half of the free memory below the limit. If that isn't enough
for all streams, only the file is written; without a `state_dir` the memfd gets the streams that fit.
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
from itertools import chain
from pathlib import Path
from typing import Final, Protocol

from streamd.api.publish import Publisher
from streamd.core.makers import Makers
from streamd.core.snapshot import (
    FACTS_BYTES,
    MADE_BYTES,
    Header,
    Kept,
    MadeObjects,
    Read,
    StateError,
    choose,
    load,
    made_records,
    read_header,
    restore,
    save,
    take_snapshot,
)
from streamd.core.stream import Stream
from streamd.daemon import logs, systemd
from streamd.daemon.control import STATE_FILE
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason

FILE: Final = STATE_FILE

# Size of a write: 200 streams of 5 KB per system call.
WRITE_BYTES: Final = 1024 * 1024

# Attempts to hand the memfd over, and the pause between them. systemd's notification socket may be full for a moment,
# and this datagram has to arrive now.
STORE_TRIES: Final = 20
STORE_WAIT_S: Final = 0.05

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(slots=True)
class _Copy:
    """An opened copy of a save. `aside` keeps it for a person to look at."""

    where: str
    fd: int
    read: Read
    header: Header
    aside: Callable[[], None]


class FdStore(Protocol):
    """systemd's store: systemd.Notifier, or the StoreRelay that reaches it through the parent."""

    @property
    def enabled(self) -> bool: ...

    def store_fd(self, name: str, fd: int) -> bool: ...

    def remove_fd(self, name: str) -> bool: ...


class StateStore:
    """Both places of a daemon. Call `take` once at the start, and `put` once at the end."""

    def __init__(self, notifier: FdStore, state_dir: str, stored: Sequence[int] = ()) -> None:
        """`stored` are systemd's descriptors (systemd.Inherited); they are closed after they are read."""
        self._notifier = notifier
        self._stored = list(stored)
        self._path = Path(state_dir) / FILE if state_dir else None

    # -- at start

    def take(self) -> Iterator[Kept]:
        """The streams of the last save, each once, and the makers; then both places are empty. Copies that can't be
        read are logged.
        """
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
        """Log at the start that the directory can't be written, and not only when the streams are lost."""
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
        """The file, which is first moved out of its place: if this start dies, the next start doesn't find it again."""
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

    def put(self, kept: Iterable[Kept], *, in_memory: bool) -> tuple[str, ...]:
        """Save streams and makers in every place; returns the places that worked. `in_memory`: the memfd has room."""
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
        """The places that can be opened; the log names those that can't."""
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
    """Rename the file to FILE.damaged, which replaces an earlier FILE.damaged."""
    with contextlib.suppress(OSError):
        os.rename(_loading(path), path.with_name(path.name + ".damaged"))


def _opened(where: str, fd: int, aside: Callable[[], None]) -> Iterator[_Copy]:
    """The copy behind a descriptor, if it begins with the header of a save."""
    offset = 0

    def read(count: int) -> bytes:
        # Why not os.read(): systemd's copy of the descriptor shares the file's position.
        nonlocal offset
        piece = os.pread(fd, count, offset)
        offset += len(piece)
        return piece

    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StateError("it is not a regular file")
        yield _Copy(where, fd, read, read_header(read), aside)
    except (StateError, OSError) as error:
        _say_unusable(where, error)
        aside()
        os.close(fd)


def _merged(copies: Sequence[_Copy]) -> Iterator[Kept]:
    """The content of several copies of the same save: the first copy that reads to its end has all of them."""
    seen: set[str] = set()
    for copy in copies:
        try:
            for kept in load(copy.read):
                if isinstance(kept, MadeObjects):
                    yield kept
                elif kept.facts.id not in seen:
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
        """Seal the memfd and hand it over; returns whether systemd's socket took it."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self._notifier.remove_fd(systemd.STATE_FDNAME)
        taken = any(self._offer() for _ in range(STORE_TRIES))
        os.close(self.fd)
        if not taken:
            _say_unsaved(self.where, OSError("the notification socket refused the descriptor"))
        return taken

    def abandon(self) -> None:
        """Not all could be written: leave nothing."""
        os.close(self.fd)

    def _offer(self) -> bool:
        if self._notifier.store_fd(systemd.STATE_FDNAME, self.fd):
            return True
        time.sleep(STORE_WAIT_S)  # blocking is fine: no connection is served any more
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
        """Sync the file and give it its name; returns whether that worked."""
        try:
            _sync_and_close(self.fd)
            os.rename(self._unfinished, self._path)
            _sync_and_close(os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            _say_unsaved(self.where, error)
            self._remove()
            return False
        return True

    def abandon(self) -> None:
        """Not all could be written: leave no half file, which nobody could read and which fills a full disk."""
        os.close(self.fd)
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._unfinished)


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _written(sink: _Memory | _File, piece: bytes) -> bool:
    """Write a piece; returns whether all of it was written. If not, the sink is closed and given up."""
    left = memoryview(piece)
    try:
        while left:
            left = left[os.write(sink.fd, left) :]
    except OSError as error:
        _say_unsaved(sink.where, error)
        sink.abandon()
        return False
    return True


# Several workers: the streams of each lie in the memfd of its slot, which the parent keeps


def write_snapshots(fd: int, kept: Iterable[Kept]) -> None:
    """Write streams and makers into a slot's memfd, in place of its content. If it raises OSError, it is empty."""
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


def read_snapshots(fd: int) -> Iterator[Kept]:
    """The streams and makers in a slot's memfd, which may be empty. The log tells of those that can't be read."""
    if not os.fstat(fd).st_size:
        return
    for copy in _opened("worker", os.dup(fd), lambda: None):
        try:
            yield from load(copy.read)
        except (StateError, OSError) as error:
            _say_unusable(copy.where, error)
        finally:
            os.close(copy.fd)


def leave_streams(fd: int, runtime: Runtime, makers: Makers, room_bytes: int) -> None:
    """Write a drained worker's streams and makers into its slot's memfd, if there is room for them beside the logs."""
    hub, now, now_unix = runtime.hub, runtime.time(), runtime.unix_time()
    made, room_bytes = _made_within(makers, room_bytes)
    chosen = choose(hub, room_bytes)
    try:
        write_snapshots(fd, chain(made, (take_snapshot(hub, stream, now, now_unix) for stream in chosen)))
    except OSError as error:
        _say_unsaved("worker", error)
        return
    if len(chosen) < len(hub):
        logs.event(logs.WARNING, "streams not kept", left=len(hub) - len(chosen), room_bytes=room_bytes)


def _made_within(makers: Makers, room_bytes: int) -> tuple[Iterator[MadeObjects], int]:
    """The makers if there is room for them, and the room that is left for streams."""
    made_bytes = len(makers) * MADE_BYTES
    return (made_records(makers), room_bytes - made_bytes) if made_bytes <= room_bytes else (iter(()), room_bytes)


def distribute(store: StateStore, slots: Sequence[int], owner: Callable[[str], int]) -> None:
    """Write the streams of the last save into the memfds of the workers that own them, and the makers into all.

    `slots`: these memfds.
    """
    dealt: list[list[Kept]] = [[] for _ in slots]
    for kept in store.take():
        if isinstance(kept, MadeObjects):
            for each in dealt:
                each.append(kept)
        else:
            dealt[owner(kept.facts.id)].append(kept)
    for fd, streams in zip(slots, dealt, strict=True):
        if streams:
            write_snapshots(fd, streams)


def collect(store: StateStore, slots: Sequence[int]) -> None:
    """Save the streams from all workers' memfds in the store."""
    streams: list[Kept] = []
    makers = Makers()  # every worker has all of them, but for the last notes
    for kept in chain.from_iterable(map(read_snapshots, slots)):
        if isinstance(kept, MadeObjects):
            _learn(makers, kept)
        else:
            streams.append(kept)
    if streams or len(makers):
        where = store.put(chain(made_records(makers), streams), in_memory=True)
        kept_streams, objects = (len(streams), len(makers)) if where else (0, 0)
        logs.event(logs.INFO, "streams kept", streams=kept_streams, objects=objects, where=where or ("nowhere",))


def _learn(makers: Makers, kept: MadeObjects) -> None:
    for object_id, made in kept.made:
        makers.learn(object_id, *made)


# A worker's hub


def put_streams(store: StateStore, runtime: Runtime, makers: Makers, room_bytes: int) -> None:
    """Save the streams and makers of a drained worker in the store. `room_bytes`: memory that may be used beside the
    logs.
    """
    hub, now, now_unix = runtime.hub, runtime.time(), runtime.unix_time()
    if not len(hub) and not len(makers):
        return
    made, room_bytes = _made_within(makers, room_bytes)
    held = sum(stream.log.bytes_held + FACTS_BYTES for stream in hub)
    in_memory = held <= room_bytes or store.in_memory_only
    chosen = choose(hub, min(held, room_bytes) if in_memory else hub.log_bytes_max)
    streams: Iterator[Kept] = (take_snapshot(hub, stream, now, now_unix) for stream in chosen)
    where = store.put(chain(made, streams), in_memory=in_memory)
    kept, objects = (len(chosen), len(makers)) if where else (0, 0)
    logs.event(
        logs.INFO,
        "streams kept",
        streams=kept,
        left=len(hub) - kept,
        objects=objects,
        bytes=held,
        where=where or ("nowhere",),
    )


def take_streams(kept: Iterable[Kept], runtime: Runtime, makers: Makers) -> None:
    """Register saved streams with a worker that starts, as many as its budget for logs allows, and all makers."""
    hub = runtime.hub
    taken = live = left = 0
    for each in kept:
        if isinstance(each, MadeObjects):
            _learn(makers, each)
            continue
        snapshot, now = each, runtime.time()
        size = sum(map(len, snapshot.log.segments))
        if not snapshot.live and hub.log_bytes + size > hub.log_bytes_max:
            left += 1
            continue
        stream = restore(hub, snapshot, now, runtime.unix_time())
        if stream is None:
            left += 1
            continue
        taken += 1
        if snapshot.live:
            live += 1
            _await_publisher(runtime, stream)
    if taken or left or len(makers):
        logs.event(
            logs.INFO,
            "streams taken up",
            streams=taken,
            live=live,
            left=left,
            objects=len(makers),
            bytes=hub.log_bytes,
        )


def _await_publisher(runtime: Runtime, stream: Stream) -> None:
    """A published stream goes on if its publisher comes back within publisher_grace."""
    now = runtime.time()
    if runtime.admission.admit_stream() is not None:
        stream.fail(CloseReason.RESTARTED, now, message="There was no room for this stream after a restart.")
        return
    publisher = Publisher(runtime, stream)
    publisher.due_at = now + runtime.settings.publisher_grace_s
    stream.source = publisher
