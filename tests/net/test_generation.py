"""The figures of a generation at its end, against streams whose times the test sets."""

from __future__ import annotations

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Rig, chunk, event, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.counters import Counters
from streamd.measure import Histogram
from streamd.net import totals
from streamd.net.generation import observe_end
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

UP = (UpstreamSettings(name="up", url="http://up.test:1", models=("m", "*"), aliases={"fast": "m"}),)
PAIR = ("up", "m")
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'


def observed(table: dict[tuple[str, str], Histogram]) -> dict[tuple[str, str], tuple[int, float]]:
    """The number and the sum of each pair's observations."""
    return {pair: (sum(each.counts), round(each.sum, 2)) for pair, each in table.items()}


def waiting(r: Rig) -> float:
    """The oldest wait for a first token, in seconds."""
    return totals.of_worker(r.runtime, r.worker.upstreams).upstreams["up"]["first_token_wait_ms"] / 1000


def test_the_first_token_is_counted_as_it_comes_and_not_at_the_end() -> None:
    with rig(upstreams=UP) as r:
        reader = r.client(post(CHAT))
        counters = r.runtime.counters
        r.pass_time(2)
        r.reply(SSE_HEAD + chunk(ROLE))
        assert sum(counters.first_event_s.counts) == 1 and observed(counters.first_token_s) == {}
        r.pass_time(1)
        r.reply(chunk(event("a")))
        assert observed(counters.first_token_s) == {PAIR: (1, 3.0)}
        r.reply(chunk(event("b"), DONE) + LAST)
        assert observed(counters.first_token_s) == {PAIR: (1, 3.0)} and sum(counters.first_event_s.counts) == 1
        reader.fin()


def test_a_text_that_joins_the_template_of_an_empty_one_is_found_by_the_next_sweep() -> None:
    """Some servers send the role with each chunk."""
    with rig(upstreams=UP) as r:
        reader = r.client(post(CHAT))
        role = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"%b"}}]}\n\n'
        r.reply(SSE_HEAD + chunk(role % b""))
        r.reply(chunk(role % b"a"))
        r.pass_time(2)
        assert observed(r.runtime.counters.first_token_s)[PAIR][0] == 1
        reader.fin()


def test_a_hung_first_token_shows_within_a_second_and_ends_with_the_token() -> None:
    with rig(upstreams=UP, commit_after_s=60) as r:
        readers = [r.client(post(CHAT))]
        r.pass_time(3)
        readers.append(r.client(post(CHAT)))
        assert 3 <= waiting(r) < 4
        line = next(
            line
            for line in r.client(get("/metrics"), listener="metrics").answer.body.decode().splitlines()
            if line.startswith('streamd_upstream_first_token_wait_seconds{upstream="up"}')
        )
        assert 3 <= float(line.split()[-1]) < 4
        r.links[0].feed(SSE_HEAD + chunk(ROLE))
        r.turn()
        assert waiting(r) >= 3, "the role alone is no token"
        r.links[0].feed(chunk(event("a")))
        r.turn()
        assert waiting(r) < 1
        for reader in readers:
            reader.fin()
        assert waiting(r) == 0


def test_a_stream_that_has_begun_without_texts_waits_for_nothing() -> None:
    with rig(upstreams=UP) as r:
        reader = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(*[ROLE] * totals.PREAMBLE_EVENTS_MAX))
        r.pass_time(5)
        assert waiting(r) == 0
        reader.fin()


def test_gaps_of_a_stream_are_observed_at_its_end() -> None:
    with rig(upstreams=UP) as r:
        reader = r.client(post(CHAT))
        counters = r.runtime.counters
        r.reply(SSE_HEAD + chunk(event("a")))
        for pause_s in (1, 4, 1):
            r.pass_time(pause_s)
            r.reply(chunk(event("b")))
        assert observed(counters.token_gap_s) == {} == observed(counters.longest_gap_s)
        r.reply(chunk(DONE) + LAST)
        assert observed(counters.token_gap_s) == {PAIR: (1, 2.0)}, "6 s for the three tokens behind the first"
        (longest_s,) = [each.sum for each in counters.longest_gap_s.values()]
        assert 4 - 0.26 <= longest_s <= 4.0
        assert observed(counters.e2e_s) == {PAIR: (1, 6.0)}
        reader.fin()


def test_a_short_gap_is_at_least_the_mean() -> None:
    with rig(upstreams=UP) as r:
        stream = r.runtime.hub.open(Dialect.CHAT, 1000.0)
        for k in range(3):
            stream.append(event("a"), 1000.0 + k / 10)
        stream.seal(CloseReason.COMPLETE, 1000.2, clean=True)
        counters = Counters()
        observe_end(counters, r.worker.upstreams.served("up", "m"), stream)
        assert observed(counters.longest_gap_s) == observed(counters.token_gap_s) == {PAIR: (1, 0.1)}
        r.runtime.hub.remove(stream)


def test_a_silence_that_ends_a_stream_is_its_longest_gap_and_no_mean() -> None:
    with rig(upstreams=UP, idle_timeout_s=20) as r:
        reader = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        r.reply(chunk(event("b")))
        r.pass_time(21)
        (longest_s,) = [each.sum for each in r.runtime.counters.longest_gap_s.values()]
        assert 19 < longest_s <= 20 and r.runtime.counters.token_gap_s == {}
        reader.fin()


def test_tokens_are_counted_for_streams_and_whole_answers_by_upstream_and_model() -> None:
    with rig(upstreams=UP) as r:
        counters = r.runtime.counters
        reader = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), event("b"), USAGE, DONE) + LAST)
        assert (counters.prompt_tokens, counters.generation_tokens) == ({PAIR: 7}, {PAIR: 3})
        whole = b'{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":10,"completion_tokens":20}}'
        r.client(post({**WHOLE, "model": "fast"}))
        r.reply(whole_answer(whole, "200 OK", "content-type: application/json; charset=utf-8"))
        assert counters.generation_tokens == {PAIR: 3, ("up", "fast"): 20}
        assert counters.prompt_tokens == {PAIR: 7, ("up", "fast"): 10}
        r.client(post({**WHOLE, "model": "a-clients-invention"}))
        r.reply(whole_answer(whole, "200 OK", "content-type: application/json; charset=utf-8"))
        assert counters.generation_tokens["up", "other"] == 20
        assert all("invention" not in model for _, model in (*counters.e2e_s, *counters.prompt_tokens))
        reader.fin()


@pytest.mark.parametrize("wire", [whole_answer(b'{"error":{}}', "500 Oops"), whole_answer(b"{}", "404 Not Found")])
def test_a_failed_request_is_no_latency_of_a_generation(wire: bytes) -> None:
    with rig(upstreams=UP) as r:
        r.client(post(WHOLE))
        r.reply(wire)
        assert r.runtime.counters.e2e_s == {} == r.runtime.counters.generation_tokens


def test_a_listed_model_is_named_and_the_models_of_each_upstream_are_told() -> None:
    with rig(
        upstreams=(UpstreamSettings(name="up", url="http://up.test:1"),),
        metrics_listen="127.0.0.1:0",
        models_refresh_s=3600,  # later than the end of the test, where nothing may be under way
    ) as r:
        r.worker.upstreams.start()
        r.turn()
        assert bytes(r.link.sent).startswith(b"GET /v1/models "), "a scraper wants the names"
        r.reply(whole_answer(b'{"object":"list","data":[{"id":"listed"}]}'))
        r.client(post({**WHOLE, "model": "listed"}))
        r.reply(whole_answer(b"{}"))
        assert list(r.runtime.counters.e2e_s) == [("up", "listed")]
        text = r.client(get("/metrics"), listener="metrics").answer.body.decode()
        assert 'streamd_upstream_model_info{model="listed",upstream="up"} 1.0' in text
        r.pass_time(1)
