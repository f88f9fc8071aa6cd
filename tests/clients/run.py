"""Real SDKs, frameworks and readers through streamd, and real servers behind it: `make test-clients`.

Each client is a program of its own in an environment of its own. It prints a line `[step, value]` for each step, and
this module judges them: the streamed text is the whole text, a refusal is told with its status, an answer that breaks
off never ends cleanly, tools arrive, and a reader that lost its connection comes to the same text. What is missing on
this machine is named and skipped. `--write FILE` keeps the transcript.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

import upstreams  # noqa: E402
from inprocess import Live, live  # noqa: E402

from streamd import __version__  # noqa: E402
from streamd.mockllm import MockOptions  # noqa: E402

ENVIRONMENTS = PROJECT / ".venv-clients"
# Slow enough that a connection can be cut in mid-answer, and that an EventSource sees its stream live.
PACE = MockOptions(interval_s=0.005, ttft_s=0, tokens=40)
# Bytes of the first connection's answer that pass before it is reset: a head and some of forty events.
CUT_AFTER_BYTES = 3000
RETENTION_S = 8.0  # event-source-polyfill stops at the 404 of a stream that is forgotten
CLIENT_S_MAX = 120.0  # a client that takes longer hangs: the slowest imports for ten seconds
SAID = "This is mock-llm speaking"

LEGEND = """\
Upstream: streamd's mock. The steps: *whole* and *stream* say the same text; a call of *tools* arrives; *refused* is an
error with the upstream's 429; *cut* is an error, because the upstream breaks off after three tokens; *resume*: the
connection is reset in mid-answer, and the client comes to the whole text by an Idempotency-Key or a Last-Event-ID."""

Steps = dict[str, str]


@dataclass(frozen=True)
class Client:
    """A program, and the steps that it has to pass."""

    name: str
    command: tuple[str, ...]
    steps: tuple[str, ...]

    @property
    def missing(self) -> str:
        """The thing that this machine lacks for it, or nothing."""
        program = self.command[0]
        return (
            ""
            if shutil.which(program)
            else f"{Path(program).relative_to(PROJECT) if '/' in program else program} is not installed"
        )


def python(environment: str, program: str) -> tuple[str, ...]:
    return (str(ENVIRONMENTS / environment / "bin/python"), str(HERE / "python" / program))


def node(program: str) -> tuple[str, ...]:
    return ("node", str(HERE / "js" / program))


SDK = ("whole", "stream", "tools", "refused", "cut")
SDK_RESUMES = (*SDK, "resume")
BY_ID = ("stream", "resume", "connections", "closed for good")
CLIENTS = (
    Client("openai (Python)", python("sdks", "openai_sdk.py"), (*SDK_RESUMES, "responses")),
    Client("anthropic (Python)", python("sdks", "anthropic_sdk.py"), SDK_RESUMES),
    Client("google-genai (Python)", python("sdks", "genai_sdk.py"), SDK_RESUMES),
    Client("openai-agents", python("agents", "agents_sdk.py"), (*SDK, "responses")),
    Client("pydantic-ai", python("agents", "pydantic_ai_sdk.py"), (*SDK, "messages")),
    Client("LangChain", python("langchain", "langchain_sdk.py"), (*SDK_RESUMES, "messages")),
    Client("openai (JavaScript)", node("openai.mjs"), (*SDK_RESUMES, "responses")),
    Client("anthropic (JavaScript)", node("anthropic.mjs"), SDK_RESUMES),
    Client("AI SDK", node("ai_sdk.mjs"), SDK_RESUMES),
    Client("AI SDK, useChat", node("use_chat.mjs"), ("resume", "resume behind the end", "resume of nothing")),
    Client("eventsource", node("eventsource.mjs"), BY_ID),
    Client("event-source-polyfill", node("event_source_polyfill.mjs"), BY_ID),
    Client(
        "Java HttpClient",
        ("java", str(HERE / "java" / "HttpClientReader.java")),
        ("whole", "stream", "refused", "cut", "resume"),
    ),
)

# step -> whether its value is right, given all steps
JUDGES: dict[str, Callable[[str, Steps], bool]] = {
    "whole": lambda value, steps: value.startswith(SAID),
    "stream": lambda value, steps: value == steps.get("whole", value) and value.startswith(SAID),
    "responses": lambda value, steps: SAID.startswith(value) and value != "",
    "messages": lambda value, steps: SAID.startswith(value) and value != "",
    "tools": lambda value, steps: "look_up" in value and "a mock" in value and "7" in value,
    "refused": lambda value, steps: "429" in value,
    "cut": lambda value, steps: value != "no error",
    "resume": lambda value, steps: value == steps.get("published", steps.get("stream")),
    "resume behind the end": lambda value, steps: value == steps["published"],
    "resume of nothing": lambda value, steps: value == "204",
    "connections": lambda value, steps: value == "2",
    "closed for good": lambda value, steps: value == "yes",
}


class Transcript:
    """The lines of a run, shown as they come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed = 0
        self.skipped = 0

    def add(self, line: str = "") -> None:
        self.lines.append(line)
        print(line, flush=True)

    def judge(self, name: str, wanted: tuple[str, ...], steps: Steps, errors: str) -> None:
        """A row for a part: each step that was wanted with ok or its value."""
        told = []
        for step in wanted:
            value = steps.get(step)
            right = value is not None and JUDGES[step](value, steps)
            self.failed += not right
            told.append(step if right else f"**{step}: {(value or errors or 'nothing came')[-300:]!r}**")
        notes = [f"{step} {steps[step]}" for step in ("broken by",) if step in steps]
        self.add(f"| {name} | {steps.get('version', '')} | {', '.join([*told, *notes])} |")

    def skip(self, name: str, why: str) -> None:
        self.skipped += 1
        self.add(f"| {name} | | skipped: {why} |")


def steps_of(client: Client, url: str, cut_url: str) -> tuple[Steps, str]:
    """Run a client; its steps, and its standard error."""
    environ = {**os.environ, "STREAMD_URL": url, "CUT_URL": cut_url, "PYTHONWARNINGS": "ignore"}
    try:
        ran = subprocess.run(client.command, env=environ, capture_output=True, text=True, timeout=CLIENT_S_MAX)
    except subprocess.TimeoutExpired as late:
        return _steps_in((late.stdout or b"").decode()), f"not done after {CLIENT_S_MAX:g} s"
    return _steps_in(ran.stdout), ran.stderr.strip()


def _steps_in(output: str) -> Steps:
    return dict(json.loads(line) for line in output.splitlines() if line.startswith("["))


def run_clients(transcript: Transcript, only: str) -> None:
    transcript.add("## Clients\n")
    transcript.add(f"{LEGEND}\n")
    transcript.add("| client | version | steps |\n| --- | --- | --- |")
    for client in CLIENTS:
        if only not in client.name:
            continue
        if client.missing:
            transcript.skip(client.name, client.missing)
            continue
        with live(PACE, retention_s=RETENTION_S) as served:
            relay = served.relay(lambda number: CUT_AFTER_BYTES if number == 0 else None)
            steps, errors = steps_of(client, served.url, relay.url)
        transcript.judge(client.name, client.steps, steps, errors)


def run_upstreams(transcript: Transcript, only: str) -> None:
    transcript.add("\n## Upstreams\n")
    transcript.add("Client: a socket. Each stream was read live and again by its id.\n")
    transcript.add("| upstream | version | steps |\n| --- | --- | --- |")
    for upstream in upstreams.UPSTREAMS:
        if only not in upstream.name:
            continue
        if upstream.missing:
            transcript.skip(upstream.name, upstream.missing)
            continue
        with _behind(upstream) as (served, version):
            told = {step: ask(served.url) for step, ask in upstream.steps.items()}
        wrong = {step: value for step, value in told.items() if value != "ok"}
        transcript.failed += len(wrong)
        shown = [step if step not in wrong else f"**{step}: {wrong[step][:300]}**" for step in told]
        transcript.add(f"| {upstream.name} | {version} | {', '.join(shown)} |")


@contextlib.contextmanager
def _behind(upstream: upstreams.Upstream) -> Iterator[tuple[Live, str]]:
    with (
        live(PACE) as mock,
        upstream.start(mock) as (settings, version),
        live(upstreams=(settings,)) as served,
    ):
        yield served, version


def machine() -> str:
    """The machine, for the transcript."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    return f"{os.cpu_count()} vCPU, {model}; Linux {platform.release()}; CPython {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only parts with this in their name")
    parser.add_argument("--write", type=Path, help="keep the transcript in this file")
    chosen = parser.parse_args()
    transcript = Transcript()
    transcript.add("# Real clients and servers\n")
    transcript.add(f"`make test-clients` with streamd {__version__}, {time.strftime('%Y-%m-%d')}. {machine()}.\n")
    run_clients(transcript, chosen.only)
    run_upstreams(transcript, chosen.only)
    transcript.add(f"\n{transcript.failed} steps failed, {transcript.skipped} parts skipped.")
    if chosen.write is not None:
        chosen.write.write_text("\n".join(transcript.lines) + "\n")
    return 1 if transcript.failed else 0


if __name__ == "__main__":
    sys.exit(main())
