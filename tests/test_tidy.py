"""House rules that a test holds, because they would come up in review again. Linters hold the rules that they can."""

from __future__ import annotations

import ast
import collections
import functools
import graphlib
import io
import re
import subprocess
import sys
import tokenize
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
FUNCTION_LINES_MAX = 70  # a screen without scrolling
CLASS_METHODS_MAX = 45  # of a class in net/ and engine/, where states, deadlines and callbacks meet
CLASS_ATTRIBUTES_MAX = 25

# Words without a meaning of their own. The dialect of Anthropic's /v1/messages has its name from outside.
EMPTY_WORDS = {
    "manager",
    "handler",
    "handling",
    "handle",
    "helper",
    "util",
    "utility",
    "item",
    "message",
    "misc",
    "common",
}
NAMES_FROM_OUTSIDE = {"messages", "Messages", "message_start", "message_delta", "message_stop"}

# The pure layers: bytes and time come in as arguments.
PURE = ("streamd/wire/", "streamd/core/")
NOT_IN_PURE = {"asyncio", "logging", "select", "selectors", "signal", "socket", "threading", "time", "uvloop"}


@functools.cache
def tracked() -> tuple[str, ...]:
    """The repository's files; without git (an unpacked archive) those of its folders."""
    try:
        ran = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True)
        names = ran.stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        folders = ("streamd", "tests", "fuzz", "loadtest", "systemd", "docs", "examples")
        names = [str(path.relative_to(PROJECT)) for folder in folders for path in (PROJECT / folder).rglob("*.*")]
    return tuple(sorted(name for name in names if (PROJECT / name).is_file()))


def modules(*folders: str) -> list[str]:
    return [name for name in tracked() if name.endswith(".py") and name.startswith(folders)]


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((PROJECT / name).read_text(encoding="utf-8"), name)


def definitions(name: str) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def words(identifier: str) -> set[str]:
    """The words of a name in either case, singular: `StreamHandlers` is {stream, handler}."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)
    return {part.lower().removesuffix("s") for part in parts}


def test_tracked_files_are_found() -> None:
    assert "streamd/config.py" in tracked()


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("StreamHandlers", {"stream", "handler"}),
        ("_http_utils", {"http", "util"}),
        ("HTTPManager", {"http", "manager"}),
        ("itemize", {"itemize"}),
    ],
)
def test_a_name_is_split_into_its_words(identifier: str, expected: set[str]) -> None:
    assert words(identifier) == expected


@pytest.mark.parametrize("name", modules("streamd/", "loadtest/", "systemd/", "tests/"))
def test_functions_fit_a_screen(name: str) -> None:
    lines = {
        node.name: (node.end_lineno or node.lineno) - node.lineno + 1
        for node in definitions(name)
        if not isinstance(node, ast.ClassDef)
    }
    assert {function: count for function, count in lines.items() if count > FUNCTION_LINES_MAX} == {}


@pytest.mark.parametrize("name", modules("streamd/", "loadtest/", "systemd/"))
def test_no_name_has_an_empty_word(name: str) -> None:
    identifiers = [Path(name).stem, *(node.name for node in definitions(name))]
    empty = [own for own in identifiers if words(own) & EMPTY_WORDS and own not in NAMES_FROM_OUTSIDE]
    assert empty == []


@pytest.mark.parametrize("name", modules("streamd/", "loadtest/", "systemd/"))
def test_every_module_has_a_docstring(name: str) -> None:
    assert ast.get_docstring(tree(name))


@pytest.mark.parametrize("name", modules("streamd/"))
def test_every_public_class_and_function_has_a_docstring(name: str) -> None:
    public = [
        node for node in tree(name).body if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    silent = [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert silent == []


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", modules(*PURE))
def test_the_pure_layers_import_no_io_and_no_clock(name: str) -> None:
    assert imports(name) & NOT_IN_PURE == set()


@pytest.mark.parametrize("name", modules("streamd/"))
def test_the_environment_is_read_only_at_the_edge(name: str) -> None:
    reads = [
        node.lineno
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.environb", "os.getenv")
    ]
    assert reads == [] or name.startswith(("streamd/cli.py", "streamd/daemon/"))


@pytest.mark.parametrize(
    ("folder", "module", "imported"), [("net", "client", "answer"), ("engine", "channels", "link")]
)
def test_packages_with_transports_have_no_import_circle(folder: str, module: str, imported: str) -> None:
    """Types count too: an import under TYPE_CHECKING, or inside of a function, is an arrow like any other."""
    arrows: dict[str, set[str]] = {}
    for name in modules(f"streamd/{folder}/"):
        found = [node.module for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom) and node.module]
        arrows[Path(name).stem] = {each.split(".")[2] for each in found if each.startswith(f"streamd.{folder}.")}
    assert module in arrows and imported in arrows[module]
    assert list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError with the circle


def attributes(node: ast.ClassDef) -> set[str]:
    """What a class's methods assign to on `self`, and what its body declares."""
    declared = {
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    stored = {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"
    }
    return declared | stored


@pytest.mark.parametrize("name", modules("streamd/net/", "streamd/engine/"))
def test_classes_with_transports_are_of_a_size_that_is_understood(name: str) -> None:
    classes = [node for node in tree(name).body if isinstance(node, ast.ClassDef)]
    methods = {
        node.name: sum(isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)) for each in node.body)
        for node in classes
    }
    assert {own: count for own, count in methods.items() if count > CLASS_METHODS_MAX} == {}
    large = {node.name: len(attributes(node)) for node in classes if len(attributes(node)) > CLASS_ATTRIBUTES_MAX}
    assert large == {}


def texts() -> Iterator[tuple[str, str]]:
    """Every tracked text file; others hold bytes for parsers, or pictures."""
    for name in tracked():
        try:
            yield name, (PROJECT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def found(pattern: str) -> list[str]:
    """The places of a pattern in the tracked texts, as file:line."""
    search = re.compile(pattern).search
    return [
        f"{name}:{number}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) < 10_000 and search(line)
    ]


def test_no_text_is_marked_for_later() -> None:
    # Why in pieces: this file is searched too.
    assert found(r"\b(" + "TO" + "DO|FIX" + "ME|XX" + "X)" + r"\b(?!=)") == []


def test_no_path_of_this_machine_is_in_the_tree() -> None:
    places = {str(PROJECT), str(PROJECT.parent / "shared"), "../" + "shared/"}
    if not Path(sys.prefix).is_relative_to(PROJECT) and not sys.prefix.startswith("/usr"):
        places.add(sys.prefix)
    long_enough = [re.escape(place) for place in places if place.count("/") > 1]
    assert found("|".join(rf"{place}(?![\w.-])" if place[-1] != "/" else place for place in long_enough)) == []


def test_no_private_package_index_is_named() -> None:
    ran = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    hosts = {urllib.parse.urlsplit(url).hostname for url in re.findall(r"https?://[^'\"\s]+", ran.stdout)}
    private = {
        host for host in hosts if host and host not in ("pypi.org", "files.pythonhosted.org", "localhost", "127.0.0.1")
    }
    assert [place for host in private for place in found(re.escape(host))] == []


def test_no_generated_file_is_tracked() -> None:
    assert [
        name for name in tracked() if re.search(r"(^|/)(__pycache__|\.venv|[^/]*\.egg-info|\.[a-z]+_cache)/", name)
    ] == []


# Plain English: pronouns in the place of nouns, per 1,000 words. In the comments and docstrings of h11, websockets,
# uvicorn, httpcore and h2 they are at most 1.7, 0.6, 2.6 and 0.
PRONOUNS = {
    "what": {"what"},
    "who": {"who", "whose", "whoever", "whom"},
    "one": {"one", "ones"},
    "body": {"anybody", "nobody", "somebody", "everybody"},
}
PLAIN = (2.5, 1.0, 4.0, 0.5)  # the bounds of comments and docstrings, in the order of PRONOUNS
COMMENT_BOUNDS = {
    "streamd/": PLAIN,
    "tests/": PLAIN,
    "fuzz/": PLAIN,
    "loadtest/": PLAIN,
}
DOCUMENT_BOUNDS = (2.0, 0.85, 4.5, 0.45)


def comments_of(source: str) -> Iterator[str]:
    """The comments and docstrings of a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def shares_of(texts: Iterable[str]) -> dict[str, float]:
    """The share of each group of pronouns, per 1,000 words."""
    counts = collections.Counter(re.findall(r"[a-z']+", " ".join(texts).lower()))
    assert counts, "there is no text"
    return {group: 1000 * sum(counts[each] for each in words) / counts.total() for group, words in PRONOUNS.items()}


def above(shares: dict[str, float], bounds: tuple[float, ...]) -> dict[str, float]:
    return {name: share for (name, share), bound in zip(shares.items(), bounds, strict=True) if share > bound}


def test_the_measure_of_pronouns_counts_comments_and_docstrings() -> None:
    source = '"""What is it?"""\nwhat = "who"  # one more, and nobody: whose\n'
    assert sorted(comments_of(source)) == ["What is it?", "one more, and nobody: whose"]
    assert shares_of(comments_of(source)) == {"what": 125, "who": 125, "one": 125, "body": 125}
    assert above({"what": 2.6, "who": 1.0, "one": 4.0, "body": 0.6}, PLAIN) == {"what": 2.6, "body": 0.6}


@pytest.mark.parametrize("folder", COMMENT_BOUNDS)
def test_comments_name_their_subjects_with_nouns(folder: str) -> None:
    apart = tuple(other for other in COMMENT_BOUNDS if other.startswith(folder) and other != folder)
    names = [name for name in modules(folder) if not name.startswith(apart)]
    texts = [text for name in names for text in comments_of((PROJECT / name).read_text(encoding="utf-8"))]
    assert above(shares_of(texts), COMMENT_BOUNDS[folder]) == {}


def test_documents_name_their_subjects_with_nouns() -> None:
    texts = [(PROJECT / name).read_text(encoding="utf-8") for name in tracked() if name.endswith(".md")]
    assert above(shares_of(texts), DOCUMENT_BOUNDS) == {}


# A pronoun that no name may have among its words, and pronouns that may not be all of a name.
POINTING = {"ours", "theirs", "mine", "yours", "whoever", "whose", "whom", *PRONOUNS["body"]}
ALONE = {"it", "its", "one", "ones", "that", "these", "they", "this", "those", "we", "what", "who"}


def test_no_class_name_exists_twice() -> None:
    names = [node.name for name in modules("streamd/") for node in definitions(name) if isinstance(node, ast.ClassDef)]
    twice = {name for name, count in collections.Counter(names).items() if count > 1}
    assert twice == set()


def names_given_in(module: ast.Module) -> Iterator[str]:
    """All names that a module gives: to classes, functions, arguments, variables and attributes."""
    for node in ast.walk(module):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def is_pronoun(identifier: str) -> bool:
    parts = set(re.findall(r"[a-z]+", identifier.lower()))
    return bool(parts & POINTING) or (bool(parts) and parts <= ALONE)


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [("_OURS", True), ("is_theirs", True), ("what", True), ("one_chunk", False), ("hours", False), ("_", False)],
)
def test_a_pronoun_is_recognized(identifier: str, expected: bool) -> None:
    assert is_pronoun(identifier) is expected


@pytest.mark.parametrize("name", modules("streamd/"))
def test_no_name_is_a_pronoun(name: str) -> None:
    assert {given for given in names_given_in(tree(name)) if is_pronoun(given)} == set()
