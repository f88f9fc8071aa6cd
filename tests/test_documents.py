"""The names in the documents exist: links, settings, flags, headers, metrics, codes, routes, targets, files.

This is a simple scan. It can't tell whether a sentence is true, but it fails for a name that was changed in the code
and not in a document.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import sys
import tomllib
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import get, rig

from streamd import cli, reference
from streamd.api import publish, streams, tables
from streamd.config import ROUTE_ROWS, ROWS, UPSTREAM_ROWS, Settings
from streamd.core import fanout, health, replay, ring, stream
from streamd.core.admission import Demands
from streamd.counters import GAUGES, Counters
from streamd.daemon import listen
from streamd.demo.command import DEMO
from streamd.measure import measures_of
from streamd.metrics import ENGINE
from streamd.net import fetch, sweep, tunnel
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.wire import chunked
from streamd.wire import publish as wire_publish
from streamd.wire.dialect import APIS

PROJECT = Path(__file__).parents[1]
README_LINES_MAX = 150

sys.path.insert(0, str(PROJECT / "loadtest"))
one_stalled: Any = importlib.import_module("one_stalled")
DOCUMENTS = sorted(
    str(path.relative_to(PROJECT))
    for pattern in ("*.md", "docs/*.md", "loadtest/*.md", "fuzz/*.md", "tests/*.md", "tests/corpus/*.md")
    for path in PROJECT.glob(pattern)
)
DEFAULTS = Settings()
KEYS = {row.key for row in (*ROWS, *UPSTREAM_ROWS, *ROUTE_ROWS)}

# Headers of other programs: servers, proxies, and the prefix of the mock's headers.
FOREIGN_HEADERS = {"X-Stainless", "X-Mock"}
FOREIGN_WORDS = {"lb_try_duration", "input_items"}  # of Caddy, of OpenAI
PLACEHOLDERS = {"{id}": "s_AAAAAAAAAAAAAAAAAAAAAAAAAAA", "{name}": "a-name", "{path}": "embeddings"}


def text_of(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Fenced blocks of any of the languages."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield block


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> set[str]:
    """The texts in backticks."""
    return set(re.findall(r"`([^`\n]+)`", prose(text)))


@functools.cache
def source() -> str:
    """All code, units and example files as one text."""
    places = ("streamd", "systemd", "examples", "loadtest", "fuzz", "tests/sim")
    files = [path for place in places for path in (PROJECT / place).rglob("*") if path.suffix != ".md"]
    files += [*PROJECT.glob("*.mk"), PROJECT / "Makefile", PROJECT / "setup.cfg"]
    made = {"__pycache__", "results"}
    return "\n".join(
        path.read_text(encoding="utf-8", errors="ignore")
        for path in files
        if path.is_file() and not made & set(path.parts)
    )


@functools.cache
def words() -> set[str]:
    return set(re.findall(r"\w+", source()))


@functools.cache
def words_of_tests() -> set[str]:
    """Names of the tests' own modules, for the documents about tests."""
    files = (path for path in (PROJECT / "tests").rglob("*.py") if path.name != Path(__file__).name)
    return set(re.findall(r"\w+", "\n".join(f"{path.stem} {path.read_text(encoding='utf-8')}" for path in files)))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes: lower case, blanks to hyphens, without punctuation."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The scan sees


def test_the_scan_finds_names() -> None:
    assert {"README.md", "docs/HTTP.md", "docs/PROTOCOL.md", "docs/ARCHITECTURE.md"} <= set(DOCUMENTS)
    assert anchors("# One & two\n```sh\n# no heading\n```\n## Three, four\n") == {"one--two", "three-four"}
    assert list(blocks("```sh\na\n```\n```toml\nb\n```\n", "toml")) == ["b\n"]
    assert spans("`a` and\n```\n`b`\n```\n") == {"a"}


# Links and files


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_to_a_file_and_heading(name: str) -> None:
    text, folder = text_of(name), (PROJECT / name).parent
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = folder / path if path else PROJECT / name
        if not found.exists() or (anchor and anchor not in anchors(found.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_named_file_exists(name: str) -> None:
    named = {
        span for span in spans(text_of(name)) if re.fullmatch(r"(streamd|tests|loadtest|systemd|docs)/[\w./-]+", span)
    }
    here = {span for span in named if span not in ("loadtest/results", "loadtest/results/")}
    assert [span for span in sorted(here) if not (PROJECT / span).exists()] == []


@pytest.mark.parametrize("module", [path.name for path in sorted((PROJECT / "tests").glob("*.py"))])
def test_the_readme_of_the_tests_names_every_helper(module: str) -> None:
    named = spans(text_of("tests/README.md"))
    assert module in named or module.startswith(("test_", "conftest"))


# Settings, flags, targets


def test_the_reference_of_settings_is_generated() -> None:
    """To generate it again: .venv/bin/streamd config-reference > docs/CONFIGURATION.md"""
    assert text_of("docs/CONFIGURATION.md") == reference.markdown()


def keys_in(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for each in value:
                yield from keys_in(each)
        elif isinstance(value, dict) and key not in KEYS:
            yield from keys_in(value, f"{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_setting_in_an_example_exists(name: str) -> None:
    keys = {key for block in blocks(text_of(name), "toml") for key in keys_in(tomllib.loads(block))}
    assert sorted(keys - KEYS) == []


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The commands by name."""
    commands = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found |= flags_of(below)
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_named_flag_exists(name: str) -> None:
    known = {command: flags_of(parser) for command, parser in parsers().items()}
    text = text_of(name).replace("\\\n", " ")
    unknown = []
    for command, rest in re.findall(r"\bstreamd ([a-z-]+)((?: [^\n`|#]*)?)", text):
        if f" streamd {command} " not in f" {text} " or command not in known:
            continue
        unknown += [flag for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", rest) if flag not in known[command]]
    assert unknown == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_named_make_target_exists(name: str) -> None:
    makefiles = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "Makefile", *PROJECT.glob("**/*.mk")))
    targets = set(re.findall(r"^([a-z-]+):", makefiles, re.MULTILINE))
    text = text_of(name)
    code = [*spans(text), *blocks(text, "sh", "console")]
    named = {
        target for part in code for target in re.findall(r"(?:^|[ $])make ((?!DESTDIR)[a-z-]+)", part, re.MULTILINE)
    }
    assert sorted(named - targets) == []


def test_help_lists_every_target() -> None:
    for path in (PROJECT / "Makefile", *PROJECT.glob("*.mk"), PROJECT / "systemd" / "install.mk"):
        text = path.read_text(encoding="utf-8")
        phony = " ".join(re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)).split()
        silent = [target for target in phony if not re.search(rf"^{target}:[^=\n]*## ", text, re.MULTILINE)]
        assert set(silent) <= {"install-venv", "install-files"}, path.name


# Numbers


def constant_of(name: str, constant: str) -> float:
    """The value of a constant of a test file, which isn't imported here."""
    (found,) = re.findall(rf"^{constant} = ([\d.]+)", text_of(name), re.MULTILINE)
    return float(found)


# Sentences of documents that repeat a constant: the number in braces is compared with the code's.
REPEATED = [
    ("docs/ARCHITECTURE.md", "32 to {} slots", ring.RING_SLOTS_MAX),
    ("docs/ARCHITECTURE.md", "{} to 128 slots", ring.RING_SLOTS_MIN),
    ("docs/ARCHITECTURE.md", "the pass, every {} ms", sweep.INTERVAL_S * 1000),
    ("docs/ARCHITECTURE.md", "one sweep every {} ms", sweep.INTERVAL_S * 1000),
    ("docs/ARCHITECTURE.md", "{} members a slice", sweep.SLICE_MAX),
    ("docs/ARCHITECTURE.md", "With more than {} readers", stream.DIRECT_READERS_MAX),
    ("docs/ARCHITECTURE.md", "goes over the readers {} a loop turn", fanout.SLICE_MAX),
    ("docs/ARCHITECTURE.md", "immutable `bytes` of at most {} bytes", replay.SEGMENT_BYTES_MAX),
    (
        "docs/ARCHITECTURE.md",
        "A test compares them with a running daemon (±{} %)",
        100 * constant_of("tests/test_prices.py", "TOLERANCE"),
    ),
    ("docs/ARCHITECTURE.md", "functions of at most {} lines", constant_of("tests/test_tidy.py", "FUNCTION_LINES_MAX")),
    ("docs/HTTP.md", "takes longer than {} s is left out", fetch.TIMEOUT_S),
    ("docs/HTTP.md", "`?limit=` ({}, at most 1,000)", streams.PAGE_STREAMS),
    ("docs/HTTP.md", "`?limit=` (100, at most {})", streams.PAGE_STREAMS_MAX),
    ("docs/HTTP.md", "| a duration up to {} h |", publish.RETENTION_S_MAX / 3600),
    ("docs/HTTP.md", "within a second. `?limit=` ({}, at most 1,000)", tables.ROWS),
    ("docs/HTTP.md", "within a second. `?limit=` (100, at most {})", tables.ROWS_MAX),
    ("docs/OPERATIONS.md", "a reserve of {} connections", Demands().reserve_connections),
    ("docs/OPERATIONS.md", "the {} readers that lag most", tables.ROWS),
    ("docs/PROTOCOL.md", "a published line above {} KiB has the bounds", wire_publish.PARSED_LINE_BYTES_MAX / 1024),
    ("docs/ARCHITECTURE.md", "An event of {} KiB or more reaches every reader", replay.LARGE_EVENT_BYTES_MIN / 1024),
    ("docs/ARCHITECTURE.md", "A published line above {} KiB is scanned", wire_publish.PARSED_LINE_BYTES_MAX / 1024),
    ("docs/PROTOCOL.md", "at most {} KiB of text unless", replay.COALESCED_TEXT_BYTES_MAX / 1024),
    ("docs/PROTOCOL.md", "is left out for {} to 30 s", health.LEFT_OUT_S_MIN),
    ("docs/PROTOCOL.md", "is left out for 0.5 to {} s", health.LEFT_OUT_S_MAX),
    ("docs/PROTOCOL.md", "chunk extensions up to {} B", chunked.EXTENSION_BYTES_MAX),
    ("docs/PROTOCOL.md", "at most {}, 4 KiB; dropped", chunked.TRAILERS_MAX),
    ("docs/PROTOCOL.md", "at most 32, {} KiB; dropped", chunked.TRAILER_BYTES_MAX / 1024),
    ("docs/PROTOCOL.md", "head {} KiB (431)", DEFAULTS.head_bytes_max / 1024),
    ("docs/PROTOCOL.md", "{} fields (431)", DEFAULTS.headers_max),
    ("docs/PROTOCOL.md", "target {} KiB (414)", DEFAULTS.target_bytes_max / 1024),
    ("docs/PROTOCOL.md", "body {} MiB (413", DEFAULTS.body_bytes_max / 1024**2),
    ("docs/PROTOCOL.md", "A head within {} s", DEFAULTS.head_timeout_s),
    ("docs/PROTOCOL.md", "a body at {} KB/s", DEFAULTS.body_bytes_per_s_min / 1000),
    ("docs/PROTOCOL.md", "once {} s have passed", DEFAULTS.body_grace_s),
    ("docs/PROTOCOL.md", "at most {} KiB of further requests", DEFAULTS.pipeline_bytes_max / 1024),
    ("docs/PROTOCOL.md", "drain for {} s, and on", DEFAULTS.close_timeout_s),
    ("docs/PROTOCOL.md", "listened on through {} dups each", listen.DUPS),
    ("docs/PROTOCOL.md", "SO_SNDBUF {} KiB", tunnel.UNIX_SNDBUF_BYTES / 1024),
]


@pytest.mark.parametrize(("name", "sentence", "value"), REPEATED)
def test_a_number_that_repeats_a_constant_equals_it(name: str, sentence: str, value: float) -> None:
    number = f"{value:,g}" if value >= 1000 else f"{value:g}"
    text = " ".join(text_of(name).split())
    assert sentence.replace("{}", number).lower() in text.lower()


def repeated_defaults(text: str) -> list[tuple[str, str]]:
    """Settings followed by a number, as in `commit_after` (10 s)."""
    found = re.findall(r"`(\w+)` \((\d[\d.,]* ?(?:ms|s|m|h|KiB|MiB|GiB)?)\b", " ".join(text.split()))
    return [(key, value.replace(",", "")) for key, value in found if key in KEYS]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_repeated_default_equals_the_settings_default(name: str) -> None:
    by_key = {row.key: row for row in ROWS}
    wrong = [
        (key, value, by_key[key].written)
        for key, value in repeated_defaults(text_of(name))
        if by_key[key].parse(value) != by_key[key].parse(by_key[key].written)
    ]
    assert wrong == []


def test_the_scan_for_defaults_finds_them() -> None:
    assert repeated_defaults("`commit_after` (10 s) and `head_bytes_max`\n(16 KiB of text)") == [
        ("commit_after", "10 s"),
        ("head_bytes_max", "16 KiB"),
    ]


# Names


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_name_in_backticks_exists(name: str) -> None:
    """Settings, codes, fields, functions: every word with an underscore occurs in the code."""
    named = {
        word
        for span in spans(text_of(name))
        for word in re.findall(r"(?<![\w.$-])[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b", span)
    }
    reasons = {reason.word for reason in CloseReason}
    known = KEYS | reasons | words() | FOREIGN_WORDS | (words_of_tests() if name.startswith("tests/") else set())
    elsewhere = ("streamd_", "test_")  # metrics and files have tests of their own
    assert sorted(word for word in named - known if not word.startswith(elsewhere)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_named_header_exists(name: str) -> None:
    code = source().lower()
    named = set(re.findall(r"\bX-[A-Z][\w]*(?:-[A-Z]\w*)*", text_of(name)))
    assert sorted(h for h in named if h.lower() not in code and not h.startswith(tuple(FOREIGN_HEADERS))) == []


def engine_metrics() -> set[str]:
    """Those that /metrics shows only with an engine."""
    rows = (*GAUGES, *measures_of(Counters))
    return {row.metric for row in rows if row.metric.startswith(ENGINE)} | {f"{ENGINE}up"}


@functools.cache
def metrics() -> frozenset[str]:
    with rig() as r:
        text = r.client(get("/metrics"), listener="admin").answer.body.decode()
    names = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) | set(re.findall(r"^(\w+)", text, re.MULTILINE))
    names |= {f"{name}{end}" for name in engine_metrics() for end in ("", "_total")}
    return frozenset(names | {name.removesuffix("_total") for name in names})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_named_metric_exists(name: str) -> None:
    named = set(re.findall(r"\bstreamd_[a-z_]+[a-z]\b", text_of(name))) - {"streamd_token"}
    assert sorted(named - metrics()) == []


# Lists of policies and of APIs


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_names_a_policy_names_them_all(name: str) -> None:
    policies = {policy.value for policy in Policy}
    if spans(text_of(name)) & (policies - {"close"}):  # `close` is a word of HTTP too
        assert [policy for policy in sorted(policies) if not re.search(rf"\b{policy}\b", text_of(name))] == []


@pytest.mark.parametrize("path", sorted({path for api in APIS for path in (*api.paths, *api.below)}))
def test_the_reference_of_http_names_the_paths_of_every_api(path: str) -> None:
    assert path.removesuffix("/") in text_of("docs/HTTP.md")


# The HTTP reference


def routes() -> list[tuple[str, str]]:
    return re.findall(r"^### `([A-Z]+) (\S+)`$", text_of("docs/HTTP.md"), re.MULTILINE)


@pytest.mark.parametrize(("method", "path"), routes())
def test_documented_routes_are_wired(method: str, path: str) -> None:
    for name, value in PLACEHOLDERS.items():
        path = path.replace(name, value)
    if path == "/drain":
        return  # it would drain the rig: tests/daemon/test_drain.py tests it
    preflight = ("Origin: https://a.test", "Access-Control-Request-Method: POST") if method == "OPTIONS" else ()
    with rig() as r:
        client = r.client(listener="admin")
        client.send(get(path, "Content-Length: 0", *preflight, method="POST" if method == "ANY" else method))
        if r.links:  # it went upstream
            return
        r.pass_time(6)
        answer = client.answer
        for _ in range(2):  # an opened stream is sealed, then forgotten
            if answer.status == 201:
                r.client(get(answer.get("location") or "", method="DELETE"), listener="admin")
        code = json.loads(answer.body)["error"]["code"] if answer.status in (404, 405, 501) else ""
        assert code not in ("not_found", "method_not_allowed", "not_relayed"), answer.body


def test_wired_routes_are_documented() -> None:
    reference_text = text_of("docs/HTTP.md")
    literals = {
        literal
        for file in (PROJECT / "streamd" / "api").glob("*.py")
        for literal in re.findall(r"(?<!f)\"(/[a-z0-9/-]+)\"", file.read_text(encoding="utf-8"))
    }
    assert {"/healthz", "/drain", "/v1/stream"} <= literals
    assert sorted(literal for literal in literals if literal.rstrip("/") not in reference_text) == []


def codes_in_code() -> set[str]:
    files = [path for place in ("api", "net", "core") for path in (PROJECT / "streamd" / place).glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"code=\"(\w+)\"", text))
    named |= set(re.findall(r"Refusal\(\s*CloseReason\.\w+,\s*\"(\w+)\"", text))
    heads = text_of("streamd/wire/http1.py") + text_of("streamd/wire/chunked.py") + text_of("streamd/wire/publish.py")
    named |= set(re.findall(r"Error\(\s*(?:f?\"[^\"]*\"\s*)+,\s*\"(\w+)\"", heads))
    return named - {
        "bad_status_line",
        "unasked_upgrade",
    }  # codes of upstreams' answers: a reader gets upstream_protocol


def test_every_error_code_is_documented() -> None:
    documented = spans(text_of("docs/HTTP.md"))
    assert len(codes_in_code()) > 60
    assert sorted(codes_in_code() - documented) == []


# Examples


@pytest.mark.parametrize(("language", "file"), [("nginx", "nginx.conf"), ("caddyfile", "Caddyfile")])
def test_configurations_of_proxies_in_documents_are_lines_of_the_tested_files(language: str, file: str) -> None:
    (block,) = blocks(text_of("docs/REVERSE-PROXIES.md"), language)
    tested = {line.strip() for line in text_of(f"examples/proxies/{file}").splitlines()}
    assert [line for line in block.splitlines() if line.strip() not in tested] == []


def test_the_readme_is_read_in_one_go() -> None:
    assert len(text_of("README.md").splitlines()) <= README_LINES_MAX


def test_the_readme_asks_the_synthetic_model_as_make_run_does() -> None:
    """The same path and body that `make run` prints, on the address that the Makefile listens on."""
    curl = next(block for block in blocks(text_of("README.md"), "sh") if "curl" in block)
    assert f"http://{listen_of_make_run()}{DEMO.path} " in curl
    assert json.loads(curl.partition("-d '")[2].rpartition("'")[0]) == DEMO.body


def listen_of_make_run() -> str:
    (address,) = re.findall(r"^LISTEN \?= (\S+)$", text_of("Makefile"), re.MULTILINE)
    return str(address)


def test_the_chart_of_the_readme_is_drawn_from_the_measured_figures() -> None:
    """Anew: .venv/bin/python loadtest/one_stalled.py --draw"""
    figures = json.loads(text_of("loadtest/results/one_stalled.json"))
    assert text_of("loadtest/results/one_stalled.svg") == one_stalled.chart_of(figures)


@pytest.mark.parametrize("picture", re.findall(r"!\[[^]]*\]\(([^)]+\.svg)\)", text_of("README.md")))
def test_pictures_are_readable_on_a_light_and_on_a_dark_page(picture: str) -> None:
    svg = text_of(picture)
    assert xml.etree.ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme" in svg


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_in_documents_is_python(name: str) -> None:
    for block in blocks(text_of(name), "python"):
        compile(block.replace("…", "..."), name, "exec")
