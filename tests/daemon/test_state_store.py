"""The places where streams wait for the next process: both, each alone, and every way in which a place fails."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, Rig, chunk, event, events_in, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.core.auth import principal_without_keys
from streamd.core.makers import OBJECTS_MAX, Made, Makers
from streamd.core.snapshot import FACTS_BYTES, MADE_BYTES, MadeObjects, Snapshot, take_snapshot
from streamd.core.stream import Stream
from streamd.daemon import logs, state_store, systemd
from streamd.daemon.state_store import (
    FILE,
    StateStore,
    collect,
    distribute,
    leave_streams,
    put_streams,
    read_snapshots,
    take_streams,
)
from streamd.reasons import CloseReason

PLENTY = 1 << 40


class Store:
    """systemd's end: a notification socket, and the descriptors that it got."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(address)
        self.held: dict[str, list[int]] = {}
        self.told: list[str] = []

    def look(self) -> list[int]:
        """Carry out all requests; return the descriptors then held under streamd's name."""
        while True:
            try:
                datagram, fds, _, _ = socket.recv_fds(self.socket, 4096, 4)
            except BlockingIOError:
                return self.held.get(systemd.STATE_FDNAME, [])
            fields = dict(line.split("=", 1) for line in datagram.decode().splitlines())
            self.told.append(datagram.decode().splitlines()[0])
            if "FDSTOREREMOVE" in fields:
                for fd in self.held.pop(fields["FDNAME"], []):
                    os.close(fd)
            if "FDSTORE" in fields:
                self.held.setdefault(fields["FDNAME"], []).extend(fds)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path / "notify"))
    yield store
    for fds in store.held.values():
        for fd in fds:
            os.close(fd)
    store.socket.close()


@pytest.fixture
def notifier(tmp_path: Path, store: Store) -> Iterator[systemd.Notifier]:
    notifier = systemd.Notifier(str(tmp_path / "notify"))
    yield notifier
    notifier.close()


@pytest.fixture
def nobody() -> systemd.Notifier:
    return systemd.Notifier()


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The log lines about saved streams."""
    lines: list[tuple[str, dict[str, Any]]] = []

    def note(level: int, name: str, /, **fields: Any) -> None:
        if name.startswith(("streams ", "saved streams ", "state_dir ")):
            lines.append((name, fields))

    monkeypatch.setattr(logs, "event", note)
    return lines


def generation(r: Rig, *events: bytes, end: bool = True) -> Stream:
    reader = r.client(post(CHAT))
    r.reply(SSE_HEAD + chunk(*events, *([DONE] if end else [])) + (LAST if end else b""))
    stream = r.runtime.hub.get(reader.answer.get("x-stream-id") or "")
    assert stream is not None
    if not end:
        stream.cancel(CloseReason.RESTARTED, r.runtime.time(), message="cut")
    reader.fin()
    return stream


def some() -> list[Snapshot]:
    with rig() as r:
        streams = [generation(r, event("Hel"), event(str(k)), end=k % 2 == 0) for k in range(4)]
        return [take_snapshot(r.runtime.hub, stream, r.runtime.time(), r.runtime.unix_time()) for stream in streams]


def fresh(place: systemd.Notifier, state_dir: Path | None = None, stored: tuple[int, ...] = ()) -> StateStore:
    return StateStore(place, str(state_dir or ""), [os.dup(fd) for fd in stored])


def saved(store: StateStore, streams: list[Snapshot]) -> tuple[str, ...]:
    return store.put(streams, in_memory=True)


# Both places


def test_the_file_alone_keeps_streams(nobody: systemd.Notifier, state_dir: Path) -> None:
    streams = some()
    assert list(fresh(nobody, state_dir).take()) == []  # makes the directory
    assert state_dir.stat().st_mode & 0o777 == 0o700
    store = fresh(nobody, state_dir)
    assert saved(store, streams) == (str(state_dir / FILE),)
    assert (state_dir / FILE).stat().st_mode & 0o777 == 0o600
    assert os.listdir(state_dir) == [FILE]
    assert list(fresh(nobody, state_dir).take()) == streams


def test_a_save_is_removed_once_it_is_read(nobody: systemd.Notifier, state_dir: Path) -> None:
    state_dir.mkdir()
    saved(fresh(nobody, state_dir), some())
    assert len(list(fresh(nobody, state_dir).take())) == 4
    assert os.listdir(state_dir) == []
    assert list(fresh(nobody, state_dir).take()) == []


def test_the_store_of_systemd_alone_keeps_streams(notifier: systemd.Notifier, store: Store) -> None:
    streams = some()
    assert saved(fresh(notifier), streams) == ("systemd",)
    (fd,) = store.look()
    assert store.told == ["FDSTOREREMOVE=1", "FDSTORE=1"]
    again = fresh(notifier, stored=(fd,))
    assert list(again.take()) == streams
    assert store.look() == [] and store.told[2:] == ["FDSTOREREMOVE=1"]


def test_the_saved_memfd_is_sealed_against_changes(notifier: systemd.Notifier, store: Store) -> None:
    saved(fresh(notifier), some())
    (fd,) = store.look()
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:streamd-state")
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == seals
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)


def test_both_places_get_a_whole_copy(notifier: systemd.Notifier, store: Store, state_dir: Path) -> None:
    streams = some()
    state_dir.mkdir()
    assert saved(fresh(notifier, state_dir), streams) == ("systemd", str(state_dir / FILE))
    (fd,) = store.look()
    assert os.pread(fd, 1 << 20, 0) == (state_dir / FILE).read_bytes()
    # A restart finds both copies, and restores each stream once.
    assert list(fresh(notifier, state_dir, (fd,)).take()) == streams
    assert os.listdir(state_dir) == []


def test_without_a_place_nothing_is_saved(nobody: systemd.Notifier) -> None:
    assert saved(fresh(nobody), some()) == ()


def test_without_memory_for_the_store_only_the_file_is_written(
    notifier: systemd.Notifier, store: Store, state_dir: Path
) -> None:
    state_dir.mkdir()
    assert fresh(notifier, state_dir).put(some(), in_memory=False) == (str(state_dir / FILE),)
    assert store.look() == []


# Damage


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "a byte":
        path.write_bytes(raw[:-40] + bytes((raw[-40] ^ 1,)) + raw[-39:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        path.write_bytes(b"PK\x03\x04" * 1000)
    elif how == "zeros":
        path.write_bytes(bytes(len(raw)))
    elif how == "directory":
        path.unlink()
        path.mkdir()
    elif how == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif how == "symbolic link":
        path.unlink()
        path.symlink_to("/etc/passwd")


SPOILT = {"cut": 1, "a byte": 3, "empty": 0, "foreign": 0, "zeros": 0, "directory": 0, "fifo": 0, "symbolic link": 0}


@pytest.mark.parametrize(("how", "left"), SPOILT.items())
def test_a_damaged_file_is_reported_and_set_aside_and_the_start_goes_on(
    nobody: systemd.Notifier, state_dir: Path, told: list[Any], how: str, left: int
) -> None:
    state_dir.mkdir()
    streams = some()
    saved(fresh(nobody, state_dir), streams)
    damage(state_dir / FILE, how)
    assert list(fresh(nobody, state_dir).take()) == streams[:left]  # the streams before the damage are good
    assert os.listdir(state_dir) == [FILE + ".damaged"]
    ((name, fields),) = told
    assert "can't be read" in name and fields["where"] == str(state_dir / FILE) and fields["error"]


def test_a_damaged_file_replaces_the_damaged_file_before_it(
    nobody: systemd.Notifier, state_dir: Path, told: list[Any]
) -> None:
    state_dir.mkdir()
    for text in (b"first", b"second"):
        (state_dir / FILE).write_bytes(text)
        list(fresh(nobody, state_dir).take())
    assert (state_dir / (FILE + ".damaged")).read_bytes() == b"second"
    assert os.listdir(state_dir) == [FILE + ".damaged"]


def test_streams_that_a_damaged_copy_lacks_come_from_the_other_copy(
    notifier: systemd.Notifier, store: Store, state_dir: Path, told: list[Any]
) -> None:
    streams = some()
    state_dir.mkdir()
    saved(fresh(notifier, state_dir), streams)
    store.look()
    broken = os.memfd_create("broken")
    os.write(broken, (state_dir / FILE).read_bytes()[:1500])
    assert list(fresh(notifier, state_dir, (broken,)).take()) == streams
    os.close(broken)
    assert os.listdir(state_dir) == []
    assert [fields["where"] for _, fields in told] == ["systemd"]


def test_an_older_save_is_never_mixed_in(
    notifier: systemd.Notifier, store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = some()
    state_dir.mkdir()
    monkeypatch.setattr(state_store.time, "time", lambda: 1_000.0)
    saved(fresh(systemd.Notifier(), state_dir), streams)
    monkeypatch.setattr(state_store.time, "time", lambda: 2_000.0)
    saved(fresh(notifier), streams[:1])
    (fd,) = store.look()
    assert list(fresh(notifier, state_dir, (fd,)).take()) == streams[:1]
    assert os.listdir(state_dir) == []


def test_a_broken_off_save_is_ignored(nobody: systemd.Notifier, state_dir: Path) -> None:
    """A crash in the middle of a save leaves an unfinished file, which the next save overwrites."""
    state_dir.mkdir()
    (state_dir / (FILE + ".unfinished")).write_bytes(b"half")
    assert list(fresh(nobody, state_dir).take()) == []
    streams = some()
    saved(fresh(nobody, state_dir), streams)
    assert list(fresh(nobody, state_dir).take()) == streams


def test_a_file_that_crashed_a_start_is_not_read_again(nobody: systemd.Notifier, state_dir: Path) -> None:
    state_dir.mkdir()
    saved(fresh(nobody, state_dir), some())
    died = fresh(nobody, state_dir).take()
    next(died)
    assert list(fresh(nobody, state_dir).take()) == []


# Places that can't be used


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def only(where: str, act: Callable[..., int]) -> Callable[..., int]:
    """`act` in place of os.write for descriptors open at that place; the real os.write for all others."""
    real = os.write

    def write(fd: int, data: bytes) -> int:
        return act() if where in os.readlink(f"/proc/self/fd/{fd}") else real(fd, data)

    return write


@pytest.mark.parametrize(("where", "left"), [("memfd:", "file"), (FILE, "systemd")])
def test_a_place_that_fills_up_is_given_up_and_the_other_place_is_written(
    notifier: systemd.Notifier,
    store: Store,
    state_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: list[Any],
    where: str,
    left: str,
) -> None:
    state_dir.mkdir()
    monkeypatch.setattr(os, "write", only(where, full))
    worked = saved(fresh(notifier, state_dir), some())
    monkeypatch.undo()
    assert worked == (("systemd",) if left == "systemd" else (str(state_dir / FILE),))
    assert len(store.look()) == (left == "systemd")
    assert os.listdir(state_dir) == [FILE] * (left == "file"), "no half file"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_file_that_can_not_be_finished_leaves_nothing(
    nobody: systemd.Notifier, state_dir: Path, monkeypatch: pytest.MonkeyPatch, told: list[Any], call: str
) -> None:
    state_dir.mkdir()
    monkeypatch.setattr(os, call, full)
    assert saved(fresh(nobody, state_dir), some()) == ()
    monkeypatch.undo()
    assert os.listdir(state_dir) == [] and told[-1][0] == "streams can't be saved"


def test_a_short_write_is_continued(nobody: systemd.Notifier, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dir.mkdir()
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:100]))
    streams = some()
    saved(fresh(nobody, state_dir), streams)
    assert list(fresh(nobody, state_dir).take()) == streams


def test_a_directory_that_cannot_be_written_is_reported_at_the_start(
    nobody: systemd.Notifier, tmp_path: Path, told: list[Any]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    spoilt = fresh(nobody, tmp_path / "file" / "state")
    assert list(spoilt.take()) == []
    assert "can't be written" in told[0][0]
    assert saved(spoilt, some()) == ()
    assert told[-1][0] == "streams can't be saved"


def test_a_full_notification_socket_is_tried_again(
    notifier: systemd.Notifier, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    while notifier.status("filling"):
        pass
    waits: list[float] = []

    def make_room(seconds: float) -> None:
        waits.append(seconds)
        store.look()

    monkeypatch.setattr(state_store.time, "sleep", make_room)
    assert saved(fresh(notifier), some()) == ("systemd",)
    assert len(store.look()) == 1 and len(waits) == 1


def test_a_notification_socket_that_stays_full_is_given_up(
    notifier: systemd.Notifier, store: Store, monkeypatch: pytest.MonkeyPatch, told: list[Any]
) -> None:
    while notifier.status("filling"):
        pass
    monkeypatch.setattr(state_store.time, "sleep", lambda seconds: None)
    assert saved(fresh(notifier), some()) == ()
    assert told[-1][1]["where"] == "systemd"


# From one worker to the next


def handed_over(before: Rig, after: Rig, place: systemd.Notifier, state_dir: Path, room_bytes: int = PLENTY) -> None:
    state_dir.mkdir(exist_ok=True)
    put_streams(fresh(place, state_dir), before.runtime, before.worker.kept.makers, room_bytes)
    take_streams(fresh(place, state_dir).take(), after.runtime, after.worker.kept.makers)


def test_readers_resume_by_id_in_the_next_process(nobody: systemd.Notifier, state_dir: Path) -> None:
    with rig() as before, rig() as after:
        whole = generation(before, event("Hel"), event("lo"))
        cut = generation(before, event("a"), end=False)
        handed_over(before, after, nobody, state_dir)
        again = after.client(get(f"/v1/streams/{whole.id}", f"Last-Event-ID: {whole.id}:1"))
        assert again.answer.whole and b"lo" in again.answer.body and b"Hel" not in again.answer.body
        told = after.client(get(f"/v1/streams/{cut.id}", f"Last-Event-ID: {cut.id}:1"))
        assert b'"code":"restarted"' in told.answer.body and not told.answer.whole
        done = after.client(get(f"/v1/streams/{cut.id}", f"Last-Event-ID: {cut.id}:2"))
        assert done.answer.status == 204
        unknown = f"{whole.id[:-1]}{'B' if whole.id[-1] == 'A' else 'A'}"
        assert after.client(get(f"/v1/streams/{unknown}")).answer.status == 410


def published(r: Rig, name: str) -> Stream:
    client = r.client(get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT"))
    client.send(post(b"one", "Content-Type: text/plain", path=f"/v1/streams/{name}/events"))
    stream = r.runtime.hub.get(name)
    assert stream is not None
    return stream


def test_a_publisher_comes_back_and_goes_on_exactly(nobody: systemd.Notifier, state_dir: Path) -> None:
    with rig() as before, rig(publisher_grace_s=30.0) as after:
        epoch = published(before, "news").epoch
        handed_over(before, after, nobody, state_dir)
        back = after.runtime.hub.get("news")
        assert back is not None and back.epoch == epoch
        reader = after.client(get("/v1/streams/news", f"Last-Event-ID: news:{epoch}:1"))
        after.pass_time(29)
        sent = post(b"two", "Expected-Seq: 1", path="/v1/streams/news/events?seal=finished")
        assert after.client(sent).answer.body == b'{"last_seq":2}'
        assert f"id: news:{epoch}:2".encode() in reader.answer.body and reader.answer.whole
        before.worker.streams.stop_stream(published_one(before))


def published_one(r: Rig) -> Stream:
    stream = r.runtime.hub.get("news")
    assert stream is not None
    return stream


def test_a_publisher_that_does_not_come_back_leaves_a_failed_stream(nobody: systemd.Notifier, state_dir: Path) -> None:
    with rig() as before, rig(publisher_grace_s=30.0) as after:
        published(before, "news")
        handed_over(before, after, nobody, state_dir)
        reader = after.client(get("/v1/streams/news"))
        after.pass_time(29.5)
        assert not reader.gone
        after.pass_time(1)
        assert published_one(after).reason is CloseReason.PUBLISHER_GONE
        assert b"did not come back" in reader.answer.body
        before.worker.streams.stop_stream(published_one(before))


def test_a_published_stream_without_room_ends_with_an_error(nobody: systemd.Notifier, state_dir: Path) -> None:
    with rig() as before, rig(streams_max=1) as after:
        published(before, "news")
        assert after.runtime.admission.admit_stream() is None
        handed_over(before, after, nobody, state_dir)
        assert published_one(after).reason is CloseReason.RESTARTED
        after.runtime.admission.release_stream()
        before.worker.streams.stop_stream(published_one(before))


@pytest.mark.parametrize("log_bytes_max", [0, 1500])
def test_a_live_published_stream_comes_back_with_any_budget_of_the_logs(
    nobody: systemd.Notifier, state_dir: Path, told: list[Any], log_bytes_max: int
) -> None:
    """Its publisher is about to go on. The budget bounds only streams that have ended."""
    with rig() as before, rig(publisher_grace_s=30.0) as after:
        sealed = [generation(before, event("x" * 3000)) for _ in range(2)]
        live = published(before, "news")
        before.client(post(b"y" * 3000, "Content-Type: text/plain", path="/v1/streams/news/events"))
        assert live.log.bytes_held > log_bytes_max
        epoch = live.epoch
        after.runtime.hub.log_bytes_max = log_bytes_max
        handed_over(before, after, nobody, state_dir)
        assert [after.client(get(f"/v1/streams/{each.id}")).answer.status for each in sealed] == [410, 410]
        assert (told[-1][1]["streams"], told[-1][1]["live"], told[-1][1]["left"]) == (1, 1, 2)
        reader = after.client(get("/v1/streams/news", f"Last-Event-ID: news:{epoch}:1"))
        sent = post(b"three", "Expected-Seq: 2", path="/v1/streams/news/events?seal=finished")
        assert after.client(sent).answer.body == b'{"last_seq":3}'
        assert [each.seq for each in events_in(reader.answer.body)] == [2, 3] and reader.answer.whole
        before.worker.streams.stop_stream(live)


def test_the_newest_streams_are_restored_up_to_the_budget_of_the_logs(
    nobody: systemd.Notifier, state_dir: Path, told: list[Any]
) -> None:
    with rig() as before, rig() as after:
        for _ in range(5):
            generation(before, event("x" * 3000))
            before.pass_time(1)
        newest = max(before.runtime.hub, key=lambda stream: stream.sealed_at)
        after.runtime.hub.log_bytes_max = 3 * newest.ledger.charged_bytes
        handed_over(before, after, nobody, state_dir)
        assert len(after.runtime.hub) == 3 and after.runtime.hub.get(newest.id) is not None
        fields = told[-1][1]
        assert (fields["streams"], fields["left"]) == (3, 2)


def test_little_memory_keeps_the_newest_in_the_store_or_all_in_the_file(
    notifier: systemd.Notifier, store: Store, state_dir: Path
) -> None:
    state_dir.mkdir()
    with rig() as before:
        for _ in range(4):
            generation(before, event("x" * 3000))
        room = sum(stream.log.bytes_held + FACTS_BYTES for stream in tuple(before.runtime.hub)[:2])
        put_streams(fresh(notifier), before.runtime, Makers(), room)
        (fd,) = store.look()
        assert len(list(fresh(notifier, stored=(fd,)).take())) == 2
        put_streams(fresh(notifier, state_dir), before.runtime, Makers(), room)
        assert store.look() == []
        assert len(list(fresh(notifier, state_dir).take())) == 4


def test_without_streams_no_save_is_written(notifier: systemd.Notifier, store: Store, state_dir: Path) -> None:
    state_dir.mkdir()
    with rig() as r:
        put_streams(fresh(notifier, state_dir), r.runtime, Makers(), PLENTY)
    assert os.listdir(state_dir) == [] and store.look() == []


def test_the_file_is_renamed_only_after_its_bytes_are_on_disk(
    nobody: systemd.Notifier, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir.mkdir()
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(fd: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        sync(fd)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"rename {source.name} {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    saved(fresh(nobody, state_dir), some())
    unfinished = FILE + ".unfinished"
    assert done == [f"sync {unfinished}", f"rename {unfinished} {FILE}", f"sync {state_dir.name}"]


def test_a_slots_memory_that_fills_up_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("kept")
    real, room = os.pwrite, 1000

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if offset >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: room - offset], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space"):
        state_store.write_snapshots(fd, some())
    assert os.fstat(fd).st_size == 0
    monkeypatch.undo()
    assert list(state_store.read_snapshots(fd)) == []
    os.close(fd)


def test_an_older_copy_that_reads_well_does_not_stand_in_for_a_newer_one(
    notifier: systemd.Notifier, store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = some()
    state_dir.mkdir()
    monkeypatch.setattr(state_store.time, "time", lambda: 1_000.0)
    saved(fresh(notifier), streams)
    (fd,) = store.look()
    monkeypatch.setattr(state_store.time, "time", lambda: 2_000.0)
    saved(fresh(systemd.Notifier(), state_dir), streams[1:])
    assert list(fresh(notifier, state_dir, (fd,)).take()) == streams[1:]


# Makers of objects that upstreams keep


def test_an_object_is_asked_of_its_maker_after_a_restart_and_for_its_principal_alone(
    nobody: systemd.Notifier, state_dir: Path
) -> None:
    ups = tuple(UpstreamSettings(name=f"up-{k}", url=f"http://up-{k}.test:{k + 1}") for k in range(2))
    with rig(upstreams=ups) as before, rig(upstreams=ups) as after:
        before.worker.kept.makers.learn("resp_1", MINE, "up-1")
        before.worker.kept.makers.learn("resp_2", MINE, "gone")
        handed_over(before, after, nobody, state_dir)
        assert os.listdir(state_dir) == []
        asked = get("/v1/responses/resp_1", "Authorization: Bearer mine")
        client = after.client(asked)
        after.reply(whole_answer(b"{}"))
        assert client.answer.get("x-upstream") == "up-1"
        other = after.client(get("/v1/responses/resp_1", "Authorization: Bearer another"))
        assert other.answer.status == 404 and len(after.links) == 1
        client = after.client(get("/v1/responses/resp_2", "Authorization: Bearer mine"))
        after.reply(whole_answer(b"{}"))
        assert client.answer.status == 200, "its upstream isn't configured any more"


MINE = principal_without_keys({b"authorization": b"Bearer mine"}.get).id


def makers_of(count: int) -> Makers:
    makers = Makers()
    for k in range(count):
        makers.learn(f"resp_{k}", f"p-{k % 7}", f"up-{k % 3}")
    return makers


def test_all_makers_come_back_in_their_order(nobody: systemd.Notifier, state_dir: Path) -> None:
    state_dir.mkdir()
    makers, again = makers_of(OBJECTS_MAX), Makers()
    makers.learn("resp_\ud800", "p", "up")  # can't be written
    with rig() as r:
        put_streams(fresh(nobody, state_dir), r.runtime, makers, PLENTY)
        take_streams(fresh(nobody, state_dir).take(), r.runtime, again)
    assert list(again) == [each for each in makers if "\ud800" not in each[0]] and len(again) == OBJECTS_MAX - 1


def test_makers_without_room_are_left_out(nobody: systemd.Notifier, state_dir: Path) -> None:
    state_dir.mkdir()
    with rig() as r:
        put_streams(fresh(nobody, state_dir), r.runtime, makers_of(100), 100 * MADE_BYTES - 1)
    assert list(fresh(nobody, state_dir).take()) == []


def test_several_workers_each_get_all_makers(nobody: systemd.Notifier, state_dir: Path) -> None:
    state_dir.mkdir()
    slots = [os.memfd_create("slot") for _ in range(3)]
    with rig() as r:
        generation(r, event("a"))
        for fd, count in zip(slots, (5, 9, 0), strict=True):
            leave_streams(fd, r.runtime, makers_of(count), PLENTY)
    collect(fresh(nobody, state_dir), slots)
    for fd in slots:
        os.ftruncate(fd, 0)
    distribute(fresh(nobody, state_dir), slots, lambda stream_id: 1)
    for place, fd in enumerate(slots):
        kept = list(read_snapshots(fd))
        made = [each for each in kept if isinstance(each, MadeObjects)]
        assert [len(each.made) for each in made] == [9] and made[0].made[0] == ("resp_0", Made("p-0", "up-0"))
        assert len(kept) == (2 if place == 1 else 1)
        os.close(fd)
