"""Collector: the lines about the collector of OpenTelemetry, and a worker's start with it.

The packages are imported here, and only where `otlp_endpoint` is set: 12 MiB and a tenth of a second for each worker.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
from typing import Final

from streamd.addresses import UpstreamOrigin
from streamd.config import ConfigError, ConfigProblem
from streamd.daemon import logs
from streamd.daemon.request_log import without_secrets
from streamd.daemon.worker import Worker

# How long the threads of exports may hold the interpreter while the loop wants it: they encode for tens of
# milliseconds, and meanwhile the interpreter's usual 5 ms would be added to the tokens of each turn of the loop.
SWITCH_S: Final = 0.0005


class Lines:
    """Writes the lines of an outage: one at its beginning, one at its end."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def out(self, error: str) -> None:
        text = "collector out; spans that it doesn't take are lost"
        logs.event(logs.WARNING, text, endpoint=self._endpoint, error=error)

    def back(self, out_s: float, spans_lost: int) -> None:
        out_s = round(out_s, 1)
        logs.event(logs.INFO, "collector back", endpoint=self._endpoint, out_s=out_s, spans_lost=spans_lost)


def begin(worker: Worker, *, slot: int, started_at: float) -> None:
    """Trace the worker's generations from now on; in slot 0 the daemon's metrics are sent, too.

    `started_at`: of the daemon, monotonic seconds. Raises ConfigError for variables OTEL_… that the SDK doesn't take.
    OTEL_SDK_DISABLED=true turns all of it off, as in each program with the SDK.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return
    from streamd.otel.telemetry import Identity, Telemetry  # Why here: nothing of it is loaded without a collector

    def origin_of(name: str) -> UpstreamOrigin | None:
        return next((each.settings.origin for each in worker.upstreams if each.settings.name == name), None)

    try:
        telemetry = Telemetry(
            worker.runtime,
            Identity(instance_id(os.getppid(), started_at), _counts_since(worker, started_at)),
            origin_of=origin_of,
            shown=without_secrets,
            lines=Lines(worker.settings.otlp_endpoint),
            families=worker.metric_families if slot == 0 else None,
        )
    except ValueError as error:
        allowed = f"doesn't go with the environment's OTEL_ variables: {error}"
        raise ConfigError([ConfigProblem("environment", "otlp_endpoint", "", allowed)]) from None
    sys.setswitchinterval(SWITCH_S)
    worker.take_telemetry(telemetry.tracing, telemetry.tick, telemetry.finish)


def _counts_since(worker: Worker, started_at: float) -> float:
    """Since when the daemon's counts grow: of several workers the counts of the dead are kept, a single worker begins
    anew.
    """
    return started_at if worker.shared is not None else worker.loop.time()


def instance_id(parent: int, started_at: float) -> str:
    """An id of the daemon that all its workers, and their successors, agree on."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{parent}.{started_at}.{socket.gethostname()}"))
