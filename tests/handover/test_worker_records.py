"""What connections share moves to a worker's successor: ids, standings of upstreams, limits of keys, makers."""

from __future__ import annotations

import pytest
from fakes import WHOLE, Rig, get, post, rig, whole_answer
from moving import house_of

from streamd.core.auth import Key
from streamd.core.keys import Keys
from streamd.core.makers import Made
from streamd.handover.record import pack, unpack
from streamd.handover.workers import WORKER, WorkerFacts, take, worker_facts

KEY = Key("k1", "alice", b"", b"", requests_per_minute=2, tokens_per_minute=100)


def told(r: Rig) -> WorkerFacts:
    facts: WorkerFacts = unpack(WORKER, pack(WORKER, worker_facts(house_of(r))))
    assert facts == worker_facts(house_of(r))
    return facts


def test_ids_of_the_worker_before_are_its_successors() -> None:
    with rig() as before, rig() as after:
        name = before.runtime.hub.new_id()
        assert after.client(get(f"/v1/streams/{name}")).answer.status == 410
        take(house_of(after), told(before))
        assert after.client(get(f"/v1/streams/{name}")).answer.status == 404
        assert after.runtime.hub.new_id()[:7] == name[:7]


def test_a_server_that_is_out_stays_out() -> None:
    with rig() as before, rig() as after:
        before.client(post(WHOLE))
        before.reply(whole_answer(b"{}", "503 Busy"))
        (upstream,) = before.worker.upstreams
        assert upstream.left_out(before.loop.time())
        take(house_of(after), told(before))
        (then,) = after.worker.upstreams
        assert then.left_out(before.loop.time()) and then.health.state() == upstream.health.state()
        assert then.health.view(before.loop.time()) == upstream.health.view(before.loop.time())


def test_a_deploy_refills_no_limit_and_forgives_no_spending() -> None:
    with rig() as before, rig() as after:
        for r in (before, after):
            r.worker.rights.take_keys(Keys({KEY.id: KEY}))
        account, then = (r.worker.rights.account_of(KEY.id) for r in (before, after))
        now = before.loop.time()
        for _ in range(2):
            assert account.refuse_request(KEY, now) is None
            account.count_request()
        account.count_tokens(150)
        account.publish(now)
        take(house_of(after), told(before))
        assert then.spent() == account.spent() and then.usage(KEY, now) == account.usage(KEY, now)
        refusal = then.refuse_request(KEY, now)
        assert refusal is not None and refusal == account.refuse_request(KEY, now)


def test_the_makers_of_objects_and_nothing_that_is_not_here_are_taken() -> None:
    with rig() as before, rig() as after:
        before.worker.kept.makers.learn("resp_1", "k1", "up")
        before.worker.rights.take_keys(Keys({KEY.id: KEY}))
        before.worker.rights.account_of(KEY.id).count_request()
        take(house_of(after), told(before))
        assert list(after.worker.kept.makers) == [("resp_1", Made("k1", "up"))]
        assert not after.worker.rights.account_states(), "the key isn't in this worker's file"


@pytest.mark.parametrize("wrong", ["", "abc", "abcde", "ab c", "ab\u00e4c"])
def test_an_incarnation_that_no_worker_has_is_refused(wrong: str) -> None:
    with rig() as r:
        member = r.runtime.hub.member
        with pytest.raises(ValueError, match="incarnation"):
            take(house_of(r), worker_facts(house_of(r))._replace(incarnation=wrong))
        assert r.runtime.hub.member == member
