"""A worker's start with a collector: nothing is loaded without it, and the environment's mistakes are told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from fakes import WHOLE, Rig, post, rig, whole_answer

from streamd.config import ConfigError, Settings
from streamd.core.admission import Demands
from streamd.daemon import collector
from streamd.daemon.budget import OTEL_BYTES, budget_of
from streamd.otel import telemetry
from streamd.otel.telemetry import resource_of

OUT_OF_REACH = "http://127.0.0.1:1"


def test_nothing_of_opentelemetry_is_loaded_without_a_collector() -> None:
    program = "import sys, streamd.daemon.worker_process; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ran.stdout.split()} | set(ran.stdout.split())
    assert loaded & {"opentelemetry", "google", "requests", "urllib3", "streamd.otel"} == set()


def test_all_workers_and_their_successors_have_the_daemons_id() -> None:
    assert collector.instance_id(7, 1.5) == collector.instance_id(7, 1.5)
    assert collector.instance_id(7, 1.5) != collector.instance_id(8, 1.5)


def test_the_environment_may_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resource_of("i").attributes["service.name"] == "streamd"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=own,k8s.pod.name=p")
    found = resource_of("i").attributes
    assert (found["service.name"], found["service.instance.id"], found["k8s.pod.name"]) == ("mine", "own", "p")


def test_a_variable_that_the_sdk_refuses_is_a_mistake_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "100000")
    with rig(otlp_endpoint=OUT_OF_REACH) as r, pytest.raises(ConfigError, match="OTEL_ variables"):
        collector.begin(r.worker, slot=0, started_at=0.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A rig that traces into a processor that takes nothing, with room for 40 spans."""
    interval = sys.getswitchinterval()
    monkeypatch.setattr(telemetry, "SPANS_MAX", 40)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "40")
    with rig(otlp_endpoint=OUT_OF_REACH, otlp_metrics_interval_s=0.0) as r:
        collector.begin(r.worker, slot=1, started_at=0.0)
        made = telemetry_of(r)
        made._processor.shutdown()
        monkeypatch.setattr(made._processor, "on_end", lambda span: None)
        yield r
    sys.setswitchinterval(interval)


def telemetry_of(r: Rig) -> telemetry.Telemetry:
    found = getattr(r.worker._finish_telemetry, "__self__", None)
    assert isinstance(found, telemetry.Telemetry)
    return found


def test_a_full_queue_loses_spans_and_counts_them(small: Rig) -> None:
    r, made = small, telemetry_of(small)
    for k in range(42):
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        assert r.runtime.counters.otlp_spans_lost == max(0, k - 39)
    made._exporter.taken += 2
    r.client(post(WHOLE))
    r.reply(whole_answer(b"{}"))
    assert r.runtime.counters.otlp_spans_lost == 2


def test_generations_that_end_together_are_made_into_spans_slice_by_slice(
    small: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    r, made, slices = small, telemetry_of(small), [0]
    write = made._spans.write
    monkeypatch.setattr(made._spans, "write", lambda *span: (slices.__setitem__(-1, slices[-1] + 1), write(*span)))
    run = made._make_spans
    monkeypatch.setattr(made, "_make_spans", lambda *count: (slices.append(0), run(*count)))
    for client in [r.client(post(WHOLE)) for _ in range(39)]:
        client.transport.reset()
    r.turn()
    assert slices == [0, 16, 16, 7] and r.runtime.counters.otlp_spans_lost == 0


def test_a_span_that_cannot_be_made_is_a_bug_and_the_next_is_made(small: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    r, made = small, telemetry_of(small)
    with monkeypatch.context() as patched:
        patched.setattr(made._spans, "write", lambda trace, request: 1 / 0)
        assert_whole(r)
    assert_whole(r)
    assert [type(error) for error in r.bugs] == [ZeroDivisionError] and made._waiting == 1
    assert r.runtime.counters.otlp_spans_lost == 1
    r.bugs.clear()
    r.runtime.counters.bugs = 0


def assert_whole(r: Rig) -> None:
    c = r.client(post(WHOLE))
    r.reply(whole_answer(b"{}"))
    assert c.statuses == [200]


def test_the_sdks_own_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "True")
    with rig(otlp_endpoint=OUT_OF_REACH) as r:
        collector.begin(r.worker, slot=0, started_at=0.0)
        assert r.runtime.tracing is None and r.worker._finish_telemetry is None


def test_counts_begin_anew_with_a_single_worker_alone(small: Rig) -> None:
    assert collector._counts_since(small.worker, 0.5) == small.loop.time()
    small.worker.shared = object()  # type: ignore[assignment]
    assert collector._counts_since(small.worker, 0.5) == 0.5
    small.worker.shared = None


def test_the_packages_and_the_queue_are_in_the_budget() -> None:
    fixed = [dict(budget_of(Settings(otlp_endpoint=url)).fixed)["1 worker(s)"] for url in ("", OUT_OF_REACH)]
    assert fixed == [Demands().process_bytes, Demands().process_bytes + OTEL_BYTES]
