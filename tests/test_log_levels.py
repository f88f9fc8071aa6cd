"""Log levels: changes of the level and watches, and their ends by themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamd.log_levels import WATCHES_MAX, LevelChange, LogLevels, Watch


def test_a_level_holds_until_the_next_reload_or_for_a_time() -> None:
    usual = LogLevels.of("info")
    assert usual.at(1e9) is usual
    forever = usual.changed(LevelChange("debug"), 10.0)
    assert forever.at(1e9).level == "debug"
    a_while = usual.changed(LevelChange("debug", 60.0), 10.0)
    assert (a_while.at(69.9).level, a_while.at(70.0)) == ("debug", usual)
    assert forever.changed(LevelChange("warning", 5.0), 10.0).at(20.0) == usual, "the settings' level returns"


def test_watches_end_by_themselves_or_on_request_and_leave_the_level_as_it_is() -> None:
    levels = LogLevels.of("warning").changed(LevelChange("debug", 10.0, key="k"), 0.0)
    levels = levels.changed(LevelChange("debug", 20.0, stream="s"), 0.0)
    assert levels.level == "warning" and levels.watches == (Watch("k", "", 10.0), Watch("", "s", 20.0))
    assert levels.at(10.0).watches == (Watch("", "s", 20.0),) and levels.at(20.0) == LogLevels.of("warning")
    longer = levels.changed(LevelChange("debug", 90.0, key="k"), 5.0)
    assert sorted(longer.watches) == [Watch("", "s", 20.0), Watch("k", "", 95.0)]
    assert levels.changed(LevelChange("debug", 0.0, key="k"), 5.0).watches == (Watch("", "s", 20.0),)
    assert LogLevels.of("info", levels.watches).watches == levels.watches, "a reload ends no watch"


def test_watches_are_bounded() -> None:
    levels = LogLevels.of("info")
    for k in range(WATCHES_MAX):
        change = LevelChange("debug", 60.0, key=f"k{k}")
        assert levels.has_room(change)
        levels = levels.changed(change, float(k))
    assert levels.has_room(LevelChange("debug", 60.0, key="k3")), "it is watched already"
    more = LevelChange("debug", 60.0, stream="s")
    assert not levels.has_room(more) and len(levels.changed(more, 99.0).watches) == WATCHES_MAX
    assert levels.has_room(LevelChange("debug", 60.0))


@given(
    st.lists(st.tuples(st.sampled_from(["", "k", "l"]), st.sampled_from(["", "s"]), st.integers(0, 30)), max_size=30)
)
def test_whatever_is_asked_for_ends_within_its_time(asked: list[tuple[str, str, int]]) -> None:
    levels, now = LogLevels.of("info"), 0.0
    for key, stream, for_s in asked:
        now += 1.0
        levels = levels.at(now).changed(LevelChange("debug", for_s + 0.5, key, stream), now)
    assert levels.at(now + 31.0) == LogLevels.of("info")
