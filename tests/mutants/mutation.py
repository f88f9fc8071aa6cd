"""A mutant: an edit of a product file, made in a copy, and the tests that have to notice it."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Final, NamedTuple

# The tests of modules without a test file of the same name.
TESTS_OF: Final = {
    "api/rights.py": ("tests/api/test_rights.py",),
    "api/publish.py": ("tests/api/test_publish.py", "tests/api/test_rights.py"),
    "api/relay.py": ("tests/live/test_resume.py", "tests/api/test_relaying.py", "tests/api/test_rights.py"),
    "api/relayed_ask.py": ("tests/live/test_resume.py", "tests/api/test_relaying.py", "tests/api/test_rights.py"),
    "api/relayed_request.py": ("tests/live/test_resume.py", "tests/api/test_relaying.py", "tests/api/test_rights.py"),
    "api/streams.py": ("tests/live/test_resume.py", "tests/api/test_publish.py", "tests/api/test_relaying.py"),
    "core/fanout.py": ("tests/core/test_fanout.py", "tests/core/test_stream.py"),
    "core/hub.py": ("tests/core/test_hub.py", "tests/core/test_hub_stateful.py"),
    "net/answer.py": ("tests/net/test_answer.py", "tests/net/test_client.py", "tests/api/test_rights.py"),
    "net/client.py": ("tests/net/test_client.py", "tests/api/test_rights.py"),
    "net/fetch.py": ("tests/api/test_operating.py",),
    "net/intake.py": ("tests/net/test_client.py",),
    "net/origin.py": ("tests/net/test_client.py",),
    "net/outlet.py": ("tests/net/test_client.py",),
    "net/tls.py": ("tests/net/test_tls_input.py", "tests/live/test_tls.py"),
    "net/upstream.py": ("tests/net/test_upstream.py", "tests/net/test_exchange.py"),
    "wire/dialects/api.py": ("tests/wire/test_dialect.py",),
    "wire/dialects/chat.py": ("tests/wire/test_template.py", "tests/wire/test_dialect.py"),
    "wire/dialects/gemini.py": ("tests/wire/test_dialect.py", "tests/api/test_gemini.py"),
    "wire/dialects/members.py": ("tests/wire/test_dialect.py",),
}

# The files that the simulator plays: readers and upstreams over a virtual network, with streams between them.
SIMULATED: Final = frozenset(
    {
        *("core/stream.py", "core/ring.py", "core/replay.py", "core/fanout.py", "core/hub.py", "core/admission.py"),
        *(
            "wire/http1.py",
            "wire/chunked.py",
            "wire/fast_chunk.py",
            "wire/sse.py",
            "wire/template.py",
            "wire/dialect.py",
        ),
        *("wire/dialects/api.py", "wire/dialects/chat.py", "wire/dialects/gemini.py", "wire/dialects/members.py"),
        *("net/client.py", "net/answer.py", "net/intake.py", "net/origin.py", "net/outlet.py"),
        *("net/upstream.py", "net/exchange.py", "net/attempt.py", "net/sweep.py"),
        *("net/turns.py", "net/reading.py", "net/read_batch.py"),
    }
)

# The files that the simulator of nodes plays: copies of streams, and their followers, over a model of the engine.
SIMULATED_NODES: Final = frozenset(
    {
        "core/log_record.py",
        *("engine/channels.py", "engine/cluster.py", "engine/connection.py", "engine/entry.py", "engine/follow.py"),
        *("engine/followed.py", "engine/link.py", "engine/members.py", "engine/notes.py", "engine/owner.py"),
        *("engine/reading.py", "engine/sentinels.py"),
    }
)


class Mutant(NamedTuple):
    """An edit of a file, and its effect on users."""

    harm: str
    file: str  # below streamd/
    inside: str  # the qualified name of a class or function; "": the module
    was: str  # occurs once inside
    becomes: str
    tests: tuple[str, ...] = ()
    reason: str = ""  # why no test kills it

    @property
    def test_files(self) -> tuple[str, ...]:
        """The test files that have to notice the edit."""
        folder, _, name = self.file.rpartition("/")
        return self.tests or TESTS_OF.get(self.file, (f"tests/{folder}/test_{name}",))

    @property
    def simulated(self) -> bool:
        """Whether the simulator runs this code."""
        return self.file in SIMULATED or self.file in SIMULATED_NODES

    @property
    def simulator_flags(self) -> tuple[str, ...]:
        """The flags by which the simulator plays the world that runs this code."""
        return ("--nodes",) if self.file in SIMULATED_NODES else ()


class Stale(ValueError):
    """A row that no longer fits the code; the text gives the reason."""


@functools.cache
def _place(source: str, qualified: str) -> tuple[int, int]:
    """The place of a class or function in the source, in characters. Raises Stale."""
    if not qualified:
        return 0, len(source)
    body: list[ast.stmt] = ast.parse(source).body
    node: ast.stmt | None = None
    for name in qualified.split("."):
        node = next((each for each in body if getattr(each, "name", None) == name), None)
        if node is None:
            raise Stale(f"there is no {qualified}")
        body = getattr(node, "body", [])
    assert node is not None and node.end_lineno is not None
    lines = source.splitlines(keepends=True)
    return len("".join(lines[: node.lineno - 1])), len("".join(lines[: node.end_lineno]))


def applied(mutant: Mutant, streamd: Path) -> str:
    """The file's text with the edit made. Raises Stale."""
    source = (streamd / mutant.file).read_text(encoding="utf-8")
    start, end = _place(source, mutant.inside)
    count = source.count(mutant.was, start, end)
    if count != 1:
        raise Stale(f"{mutant.was!r} stands {count} times in {mutant.file} {mutant.inside}")
    at = source.index(mutant.was, start, end)
    return source[:at] + mutant.becomes + source[at + len(mutant.was) :]
