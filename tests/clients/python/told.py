"""What every client program shares: the addresses that `run.py` gives it, and the lines that it prints for `run.py`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import uuid
from collections.abc import Callable
from typing import Any

URL = os.environ["STREAMD_URL"]
CUT_URL = os.environ["CUT_URL"]  # the same streamd behind a relay that resets the first connection in mid-answer
KEY = "sk-none"
MODEL = os.environ.get("MODEL", "mock-llm")
PROMPT = "Tell me about rivers."
REFUSED = {"X-Mock-Fault": "status=429"}
BROKEN = {"X-Mock-Fault": "break-fin=3"}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "depth": {"type": "integer"}},
    "required": ["place", "depth"],
}


def tell(step: str, value: object) -> None:
    """Print a step's result."""
    print(json.dumps([step, str(value)]), flush=True)


def tell_version(*packages: str) -> None:
    tell("version", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))


def tell_error(step: str, call: Callable[[], object]) -> None:
    """Print the error that a call raises, and that it raised none."""
    try:
        call()
    except Exception as error:
        status = getattr(error, "status_code", None) or getattr(error, "code", "")
        tell(step, f"{type(error).__name__} {status} {str(error)[:200]}")
    else:
        tell(step, "no error")


def tell_resumed(ask: Callable[[dict[str, str]], Any]) -> None:
    """Read by `ask(headers)` until the connection breaks, then ask again with the same Idempotency-Key.

    `ask` gives the pieces of a text, in order.
    """
    headers = {"Idempotency-Key": str(uuid.uuid4()), "X-Stream-Detach-Grace": "60"}
    said = ""
    try:
        for piece in ask(headers):
            said += piece
    except Exception as error:
        again = "".join(ask(headers))
        tell("resume", again if again.startswith(said) else f"{said!r} is no beginning of {again!r}")
        tell("broken by", type(error).__name__)
    else:
        tell("resume", f"nothing broke: {said!r}")
