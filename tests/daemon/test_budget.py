"""The budget follows the settings."""

from __future__ import annotations

import dataclasses

import pytest

from streamd.config import Settings
from streamd.core.admission import Prices
from streamd.daemon.budget import prices_of


@pytest.mark.parametrize(
    "name", ["notsent_lowat_bytes", "ring_slots", "ring_bytes_max", "head_bytes_max", "catchup_bytes_max"]
)
def test_a_setting_of_what_a_connection_may_hold_is_a_part_of_its_price(name: str) -> None:
    value = 2 * getattr(Settings(), name)
    settings = dataclasses.replace(Settings(), **{name: value})
    assert getattr(prices_of(settings), name) == value


def test_the_prices_without_settings_are_those_of_the_settings_defaults() -> None:
    assert prices_of(Settings()) == Prices()
