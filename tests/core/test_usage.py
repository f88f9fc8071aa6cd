"""The token usage of a whole answer, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest

from streamd.core.auth import Key
from streamd.core.limits import Account
from streamd.core.usage import OVERLAP_BYTES, Charge

KEY = Key(id="k1", name="alice", salt=b"", digest=b"", streams_max=1)
CHAT = {"id": "1", "choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 70}}


def charged(body: bytes, size: int = 0) -> int:
    account = Account()
    charge = Charge(account, KEY, pays_tokens=True)
    charge.asked()
    for start in range(0, len(body), size or len(body) or 1):
        charge.passed(body[start : start + (size or len(body))])
    charge.over()
    charge.over()
    assert account.requests_total == 1
    return account.tokens_total


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"promptTokenCount": 3, "candidatesTokenCount": 5, "totalTokenCount": 8}, 5),
        ({"promptTokenCount": 3, "candidatesTokenCount": 5, "thoughtsTokenCount": 100}, 105),
        ({"promptTokenCount": 3}, 0),
    ],
)
def test_geminis_tokens_are_those_of_the_answer_and_of_its_thoughts(usage: dict[str, int], tokens: int) -> None:
    earlier = {"usageMetadata": {"candidatesTokenCount": 2, "thoughtsTokenCount": 100}} if tokens > 5 else {}
    body = json.dumps([earlier, {"candidates": [], "usageMetadata": usage, "modelVersion": "m"}], indent=1).encode()
    assert charged(body, 7) == tokens


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (json.dumps(CHAT).encode(), 70),
        (json.dumps(CHAT, separators=(",", ":")).encode(), 70),
        (
            json.dumps(
                {**CHAT, "usage": {"input_tokens": 3, "output_tokens": 9}, "metadata": {"a": "b" * 500}}
            ).encode(),
            9,
        ),
        (json.dumps({"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}).encode(), 0),
        (json.dumps({"choices": [{"message": {"content": '"completion_tokens": 999'}}]}).encode(), 0),
        (b'{"usage": {"completion_tokens": 70', 70),
        (b'{"usage": {"completion_tokens": "70"}}', 0),
        (b'{"usage": {"completion_tokens": 99999999999999}}', 0),
        (b"", 0),
    ],
)
def test_the_usage_of_an_answer_is_charged_in_any_cut(body: bytes, tokens: int, size: int) -> None:
    assert charged(body, size) == tokens


USAGE = {"input_tokens": 3, "output_tokens": 5000, "total_tokens": 5003}
# Members in which servers say back what the client sent: long, or such that they look like a usage.
ECHOES: dict[str, object] = {
    "metadata": {"a" * 64: "b" * 512},
    "user": "u" * 50_000,
    "tools": [{"parameters": {"properties": {"output_tokens": 0, "completion_tokens": 1}}}],
    "text": {"format": {"schema": {"usage": {"output_tokens": 0, "completion_tokens": 0}}}},
    "instructions": '"usage": {"output_tokens": 99999}',
    "max_output_tokens": 777_777,
}


@pytest.mark.parametrize("size", [0, 1, 50, 4096])
@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("is_last", [True, False])
def test_no_echo_of_the_clients_words_changes_the_charge(echo: str, is_last: bool, size: int) -> None:
    said = {echo: ECHOES[echo]}
    body = {**said, "usage": USAGE} if is_last else {"usage": USAGE, **said}
    assert charged(json.dumps(body).encode(), size) == 5000


@pytest.mark.parametrize("name", [b"completion_tokens", b"output_tokens", b"candidatesTokenCount"])
@pytest.mark.parametrize(
    ("number", "tokens"),
    [(b"5000.0", 5000), (b"5e3", 5000), (b"-5", 0), (b"1000000000", 0), (b"9" * 40, 0), (b"05", 0), (b"5.5", 0)],
)
def test_only_a_number_that_is_a_count_is_charged(name: bytes, number: bytes, tokens: int) -> None:
    assert charged(b'{"usage":{"%b":%b}}' % (name, number), 1) == tokens


def test_a_server_that_says_a_count_under_both_names_is_charged_once() -> None:
    assert charged(b'{"usage":{"completion_tokens":7,"output_tokens":7}}') == 7


def test_a_request_that_reaches_no_upstream_is_given_back() -> None:
    account = Account()
    charge = Charge(account, KEY, pays_tokens=False)
    assert account.requests_total == 1
    charge.over()
    charge.over()
    assert account.requests_total == 0


def test_of_a_key_without_a_limit_of_tokens_only_the_request_counts() -> None:
    account = Account()
    charge = Charge(account, KEY, pays_tokens=False)
    charge.asked()
    charge.passed(json.dumps(CHAT).encode())
    charge.over()
    assert (account.requests_total, account.tokens_total) == (1, 0)


def test_of_an_answer_only_the_bytes_of_a_cut_number_are_held() -> None:
    charge = Charge(Account(), KEY, pays_tokens=True)
    for _ in range(100):
        charge.passed(b"x" * 5000)
        assert len(charge._tail) <= OVERLAP_BYTES


def test_events_that_pass_as_bytes_are_one_of_the_keys_streams_until_their_end() -> None:
    account = Account()
    first, second = (Charge(account, KEY, pays_tokens=True) for _ in range(2))
    assert first.open_stream() is None and account.streams_now == 1
    assert second.open_stream() is not None, "streams_max is 1"
    second.over()
    assert account.streams_now == 1
    first.over()
    first.over()
    assert account.streams_now == 0


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 1000])
@pytest.mark.parametrize(("usage", "tokens"), [(b"", 3), (b'data: {"usage":{"completion_tokens":70}}\n\n', 70)])
def test_events_that_pass_as_bytes_cost_their_usage_or_a_token_each(usage: bytes, tokens: int, size: int) -> None:
    account = Account()
    charge = Charge(account, KEY, pays_tokens=True)
    charge.asked()
    assert charge.open_stream() is None
    body = b'data: {"a": "data:"}\r\n\r\nevent: x\ndata: 1\n\ndata: [DONE]\n\n' + usage
    for start in range(0, len(body), size):
        charge.passed(body[start : start + size])
    charge.over()
    assert account.tokens_total == tokens
