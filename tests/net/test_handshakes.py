"""The queue of handshakes: its share of a turn, its order, its bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes import FakeLoop

from streamd.net import handshakes as net_handshakes
from streamd.net.handshakes import HANDSHAKES_S_MAX, Handshakes


class Shaking:
    """A handshake whose step takes a time."""

    def __init__(self, room: Room, name: str) -> None:
        self.room, self.name = room, name

    def shake(self) -> None:
        self.room.now += self.room.step_s
        self.room.done.append(self.name)
        if self.name == "broken":
            raise ValueError

    def give_up(self) -> None:
        self.room.given_up.append(self.name)


class Room:
    def __init__(self, loop: FakeLoop) -> None:
        self.loop = loop
        self.now, self.step_s = 0.0, 0.007
        self.done: list[str] = []
        self.given_up: list[str] = []
        self.bugs: list[Exception] = []
        self.queue = Handshakes(loop, lambda where, error: self.bugs.append(error), lambda: self.now)

    def wait(self, name: str, address: str) -> None:
        self.queue.wait(Shaking(self, name), address)

    def turn(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()


@pytest.fixture
def room() -> Iterator[Room]:
    loop = FakeLoop()
    yield Room(loop)
    loop.close()


def test_a_dear_handshake_has_a_turn_of_its_own(room: Room) -> None:
    for k in range(3):
        room.wait(str(k), "a")
    for k in range(3):
        room.turn()
        assert room.done == [str(each) for each in range(k + 1)]


def test_cheap_handshakes_share_a_turn(room: Room) -> None:
    room.step_s = HANDSHAKES_S_MAX / 10
    for k in range(25):
        room.wait(str(k), "a")
    room.turn()
    assert len(room.done) == 10
    room.turn()
    room.turn()
    assert len(room.done) == 25 and room.queue.waiting == 0


def test_an_address_with_a_single_handshake_waits_for_no_crowd(room: Room) -> None:
    for k in range(100):
        room.wait(str(k), "crowd")
    room.wait("single", "other")
    room.turn()
    room.turn()
    assert "single" in room.done


def test_a_full_queue_gives_up_the_newest_of_the_largest_crowd(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_handshakes, "HANDSHAKES_MAX", 10)
    for k in range(10):
        room.wait(str(k), "crowd")
    room.wait("single", "other")
    assert room.given_up == ["9"] and room.queue.waiting == 10
    room.wait("10", "crowd")
    assert room.given_up == ["9", "10"]


def test_a_mistake_in_a_handshake_stops_no_other(room: Room) -> None:
    room.step_s = 0.0
    room.wait("broken", "a")
    room.wait("whole", "a")
    room.turn()
    assert room.done == ["broken", "whole"] and len(room.bugs) == 1
