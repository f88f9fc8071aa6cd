"""Real servers as upstreams of a streamd, for `run.py`: how each is started, and what is asked of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inprocess import Live, live

from streamd import __version__
from streamd.config import UpstreamSettings

PROJECT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = PROJECT / ".venv-clients"
START_S_MAX = 120.0  # LiteLLM's proxy imports for half a minute on a busy machine

Started = AbstractContextManager[tuple[UpstreamSettings, str]]


@dataclass(frozen=True)
class Upstream:
    """A server: `start(mock)` gives its settings and version, `steps` ask it through streamd for "ok" or the fault."""

    name: str
    program: str
    start: Callable[[Live], Started]
    steps: dict[str, Callable[[str], str]]

    @property
    def missing(self) -> str:
        return "" if shutil.which(self.program) else f"{self.program} is not installed"


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def _events(body: bytes) -> list[bytes]:
    return re.findall(rb"^data: (.*)$", body, re.MULTILINE)


def _said(events: list[bytes]) -> str:
    said = ""
    for event in events:
        body = json.loads(event) if event.startswith(b"{") else {}
        for choice in body.get("choices") or ():
            said += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        delta = body.get("delta")
        said += delta.get("text", "") if isinstance(delta, dict) else delta or ""
    return said


def streams(path: str, body: dict[str, Any], end: bytes) -> Callable[[str], str]:
    """A stream that ends with its terminal event, and the same text again by its id."""

    def ask(url: str) -> str:
        with _post(url, path, {**body, "stream": True}) as answer:
            events, stream_id = _events(answer.read()), answer.headers["x-stream-id"]
        with urllib.request.urlopen(f"{url}/v1/streams/{stream_id}", timeout=60) as again:
            later = _events(again.read())
        if end not in events[-1] or b'"error":{' in events[-1]:
            return f"ends with {events[-1]!r}"
        return "ok" if _said(events) and _said(later) == _said(events) else f"{_said(events)!r}, later {_said(later)!r}"

    return ask


def refuses(path: str, body: dict[str, Any]) -> Callable[[str], str]:
    """A request that the server refuses: its own status and words arrive, also where it was asked for a stream."""

    def ask(url: str) -> str:
        try:
            with _post(url, path, body) as answer:
                return f"{answer.status} {answer.read()[:200]!r}"
        except urllib.error.HTTPError as error:
            told = error.read()
            return (
                "ok"
                if 400 <= error.code < 500 and error.headers["x-upstream"] and told
                else f"{error.code} {told[:200]!r}"
            )

    return ask


def lists(name: str) -> Callable[[str], str]:
    def ask(url: str) -> str:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
            listed = [entry["id"] for entry in json.load(answer)["data"]]
        return "ok" if name in listed else f"{listed}"

    return ask


@contextlib.contextmanager
def _running(command: list[str], ready: Callable[[], bool], environ: dict[str, str] | None = None) -> Iterator[None]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(environ or {})})
        try:
            until = time.monotonic() + START_S_MAX
            while not ready():
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _answers(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return True
        except OSError:
            return False

    return ready


def _version(program: str, package: str) -> str:
    script = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([program, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


LLAMA = str(ENVIRONMENTS / "llama/bin/python")
LITELLM = str(ENVIRONMENTS / "litellm/bin/litellm")
TINY_MODEL = Path(__file__).with_name("python") / "tiny_model.py"
LITELLM_KEY = f"sk-{secrets.token_hex(16)}"  # it starts with no shorter key
TRANSFORMERS = str(ENVIRONMENTS / "transformers/bin/transformers")


@contextlib.contextmanager
def _llama(mock: Live) -> Iterator[tuple[UpstreamSettings, str]]:
    command = [LLAMA, str(PROJECT / "loadtest/llama_server.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(line.split()[-1] for line in process.stdout if "listening on" in line)
            yield UpstreamSettings(name="llama", url=url), f"xllamacpp {_version(LLAMA, 'xllamacpp')}, Gemma 3 270M"
        finally:
            process.terminate()


@contextlib.contextmanager
def _litellm(mock: Live) -> Iterator[tuple[UpstreamSettings, str]]:
    port = _free_port()
    model = {"model": "openai/mock-llm", "api_base": f"{mock.mock.url}/v1", "api_key": "sk-none"}
    settings = {
        "model_list": [{"model_name": "mock-llm", "litellm_params": model}],
        "general_settings": {"master_key": LITELLM_KEY},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(settings))  # JSON is YAML
        command = [LITELLM, "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        with _running(command, _answers(f"{url}/health/liveliness"), {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}):
            version = _version(str(Path(LITELLM).with_name("python")), "litellm")
            yield UpstreamSettings(name="litellm", url=url, key=LITELLM_KEY), f"litellm {version}"


@contextlib.contextmanager
def _transformers(mock: Live) -> Iterator[tuple[UpstreamSettings, str]]:
    python = str(Path(TRANSFORMERS).with_name("python"))
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/tiny"
        subprocess.run([python, str(TINY_MODEL), model], check=True, capture_output=True)
        command = [TRANSFORMERS, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        url = f"http://127.0.0.1:{port}"
        # The server names the model by its path.
        settings = UpstreamSettings(name="transformers", url=url, aliases={"tiny": model})
        with _running(command, _answers(f"{url}/health"), {"HF_HUB_OFFLINE": "1"}):
            yield settings, f"transformers {_version(python, 'transformers')}, random weights"


@contextlib.contextmanager
def _streamd(mock: Live) -> Iterator[tuple[UpstreamSettings, str]]:
    with live(upstreams=(UpstreamSettings(name="mock", url=mock.mock.url),)) as second:
        yield UpstreamSettings(name="second", url=second.url), f"streamd {__version__}"


PROMPT = {"messages": [{"role": "user", "content": "Tell me about rivers."}], "max_tokens": 24}
MOCK = {"model": "mock-llm", **PROMPT}
GEMMA = {"model": "gemma-3-270m", **PROMPT}
UPSTREAMS = (
    Upstream(
        "llama.cpp's server",
        LLAMA,
        _llama,
        {
            "models": lists("gemma-3-270m"),
            "chat": streams("/v1/chat/completions", GEMMA, b"[DONE]"),
            "completions": streams(
                "/v1/completions", {"model": "gemma-3-270m", "prompt": "The river", "max_tokens": 24}, b"[DONE]"
            ),
            "messages": streams("/v1/messages", GEMMA, b"message_stop"),
            "refused": refuses(
                "/v1/chat/completions", {"model": "gemma-3-270m", "messages": "no list", "stream": True}
            ),
        },
    ),
    Upstream(
        "transformers serve",
        TRANSFORMERS,
        _transformers,
        {
            "models": lists("tiny"),
            "chat": streams("/v1/chat/completions", {"model": "tiny", **PROMPT}, b"finish_reason"),
            "responses": streams("/v1/responses", {"model": "tiny", "input": "Rivers"}, b"response.completed"),
            "refused": refuses("/v1/chat/completions", {"model": "tiny", "stream": True, "no such member": 1}),
        },
    ),
    Upstream(
        "LiteLLM's proxy, the mock behind it",
        LITELLM,
        _litellm,
        {
            "models": lists("mock-llm"),
            "chat": streams("/v1/chat/completions", MOCK, b"[DONE]"),
            "messages": streams("/v1/messages", MOCK, b"message_stop"),
            "refused": refuses("/v1/chat/completions", {"model": "no-such-model", **PROMPT, "stream": True}),
        },
    ),
    Upstream(
        "a second streamd, the mock behind it",
        "true",
        _streamd,
        {
            "models": lists("mock-llm"),
            "chat": streams("/v1/chat/completions", MOCK, b"[DONE]"),
            "responses": streams("/v1/responses", {"model": "mock-llm", "input": "Rivers"}, b"response.completed"),
            "messages": streams("/v1/messages", MOCK, b"message_stop"),
            "refused": refuses("/v1/chat/completions", {"model": "mock-llm", "stream": True}),
        },
    ),
)
