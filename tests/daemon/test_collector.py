"""A worker's start with a collector: nothing is loaded without it, and the environment's mistakes are told."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fakes import WHOLE, post, rig, whole_answer

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


def test_a_full_queue_loses_spans_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SPANS_MAX", 2)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    interval = sys.getswitchinterval()
    with rig(otlp_endpoint=OUT_OF_REACH, otlp_metrics_interval_s=0.0) as r:
        collector.begin(r.worker, slot=1, started_at=0.0)
        assert r.worker._finish_telemetry is not None and r.runtime.tracing is not None
        made = r.worker._finish_telemetry.__self__  # type: ignore[attr-defined]
        made._processor.shutdown()  # its thread takes nothing any more
        monkeypatch.setattr(made._processor, "on_end", lambda span: None)
        for _ in range(3):
            r.client(post(WHOLE))
            r.reply(whole_answer(b"{}"))
        assert r.runtime.counters.otlp_spans_lost == 1
        made._exporter.taken += 2
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        assert r.runtime.counters.otlp_spans_lost == 1
    sys.setswitchinterval(interval)


def test_the_packages_and_the_queue_are_in_the_budget() -> None:
    fixed = [dict(budget_of(Settings(otlp_endpoint=url)).fixed)["1 worker(s)"] for url in ("", OUT_OF_REACH)]
    assert fixed == [Demands().process_bytes, Demands().process_bytes + OTEL_BYTES]
