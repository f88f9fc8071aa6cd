"""Makers of kept objects: bounded, each principal's own, fair where there is no room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.core import makers as makers_module
from streamd.core.makers import ID_CHARS_MAX, MAKERS_MAX, Made, Makers


def test_each_principal_has_its_own_maker_of_an_id() -> None:
    makers = Makers()
    makers.learn("r1", "alice", "one")
    makers.learn("r1", "bob", "two")
    makers.learn("r1", "alice", "three")  # the server has begun to count anew
    assert makers.of("r1") == (Made("bob", "two"), Made("alice", "three")) and len(makers) == 2
    assert makers.of("r2") == ()
    assert dict(makers) == {"r1": Made("alice", "three")} and len(list(makers)) == 2


@pytest.mark.parametrize("object_id", ["", "x" * (ID_CHARS_MAX + 1)])
def test_an_id_that_no_server_gives_is_not_kept(object_id: str) -> None:
    makers = Makers()
    makers.learn(object_id, "alice", "one")
    assert len(makers) == 0 and makers.of(object_id) == ()


def test_the_latest_makers_of_an_id_count() -> None:
    makers = Makers()
    for k in range(MAKERS_MAX + 2):
        makers.learn("r1", f"p{k}", "one")
    assert [each.principal for each in makers.of("r1")] == [f"p{k}" for k in range(2, MAKERS_MAX + 2)]
    assert len(makers) == MAKERS_MAX


def test_a_principal_with_many_objects_pushes_out_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makers_module, "OBJECTS_MAX", 5)
    makers = Makers()
    makers.learn("b1", "bob", "one")
    for k in range(9):
        makers.learn(f"a{k}", "alice", "one")
    assert sorted(object_id for object_id, _ in makers) == ["a5", "a6", "a7", "a8", "b1"]


def test_where_all_have_one_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makers_module, "OBJECTS_MAX", 3)
    makers = Makers()
    for k in range(5):
        makers.learn(f"r{k}", f"p{k}", "one")
    assert [object_id for object_id, _ in makers] == ["r2", "r3", "r4"]


@given(st.lists(st.tuples(st.sampled_from("rstuv"), st.sampled_from("abcd"), st.sampled_from("12"))))
def test_what_is_known_is_what_was_learned_last(learned: list[tuple[str, str, str]]) -> None:
    makers, last = Makers(), {}
    for object_id, principal, upstream in learned:
        makers.learn(object_id, principal, upstream)
        last[object_id, principal] = upstream
    assert {(object_id, made.principal): made.upstream for object_id, made in makers} == last
    assert len(makers) == len(last)
