"""The budget follows the settings."""

from __future__ import annotations

import dataclasses

import pytest

from streamd.config import Settings
from streamd.core.admission import Prices
from streamd.daemon.budget import price_of, prices_of


@pytest.mark.parametrize(
    "name", ["notsent_lowat_bytes", "ring_slots", "ring_bytes_max", "head_bytes_max", "catchup_bytes_max"]
)
def test_a_setting_of_what_a_connection_may_hold_is_a_part_of_its_price(name: str) -> None:
    value = 2 * getattr(Settings(), name)
    settings = dataclasses.replace(Settings(), **{name: value})
    assert getattr(prices_of(settings), name) == value


def test_the_prices_without_settings_are_those_of_the_settings_defaults() -> None:
    assert prices_of(Settings()) == Prices()


def test_a_connection_is_charged_by_the_kind_of_its_listener() -> None:
    plain, behind_tls = Settings(), dataclasses.replace(Settings(), tls_cert="cert.pem", tls_key="key.pem")
    prices = prices_of(plain)
    assert len({prices.unix_bytes, prices.tcp_bytes, prices.tls_tcp_bytes}) == 3
    assert price_of(plain, "127.0.0.1:8080") == prices.tcp_bytes
    assert price_of(behind_tls, "127.0.0.1:8080") == prices.tls_tcp_bytes
    assert price_of(plain, "unix:/run/s") == price_of(behind_tls, "unix:/run/s") == prices.unix_bytes
