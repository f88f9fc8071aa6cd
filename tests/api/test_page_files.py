"""The pages that streamd serves, as a browser gets them: which listener has which, and their policy."""

from __future__ import annotations

import configparser
import fnmatch
import re
from pathlib import Path

import pytest
from fakes import get, rig

from streamd.api.page_files import FOLDER, KINDS, names

PROJECT = Path(__file__).parents[2]
HTML = [name for name in names() if name.endswith(".html")]


def text_of(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def test_the_demo_has_a_chat_page_and_its_files_on_every_listener() -> None:
    with rig(demo=True) as r:
        page = r.client(get("/"), listener="loopback").answer
        assert (page.status, page.get("content-type")) == (200, "text/html; charset=utf-8")
        assert page.body.decode() == text_of("chat.html")
        for path in re.findall(r'(?:href|src)="(/pages/[^"]+)"', page.body.decode()):
            file = r.client(get(path), listener="public").answer
            assert (file.status, file.body.decode()) == (200, text_of(path.removeprefix("/pages/")))


def test_the_admin_surface_has_the_operations_page_and_its_files() -> None:
    with rig() as r:
        page = r.client(get("/"), listener="admin").answer
        assert (page.status, page.body.decode()) == (200, text_of("operations.html"))
        for path in re.findall(r'(?:href|src)="(/pages/[^"]+)"', page.body.decode()):
            assert r.client(get(path), listener="admin").answer.status == 200
        assert r.client(get("/"), listener="metrics").answer.status == 404


@pytest.mark.parametrize("listener", ["public", "loopback"])
def test_a_daemon_in_production_has_no_page(listener: str) -> None:
    with rig() as r:
        answer = r.client(get("/"), listener=listener).answer
        assert (answer.status, answer.body) == (200, b"streamd\n")
        assert r.client(get("/pages/chat.js"), listener=listener).answer.status == 404


def test_a_page_may_load_from_its_own_listener_alone_and_may_not_be_framed() -> None:
    with rig(demo=True) as r:
        for path in ("/", "/pages/chat.js", "/pages/base.css"):
            answer = r.client(get(path)).answer
            policy = dict(part.strip().split(" ", 1) for part in str(answer.get("content-security-policy")).split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert {policy[f"{each}-src"] for each in ("script", "style", "connect", "img")} == {"'self'"}
            assert policy["require-trusted-types-for"] == "'script'"
            assert answer.get("x-content-type-options") == "nosniff"
            assert answer.get("cross-origin-resource-policy") == "same-origin"
            assert answer.get("cache-control") == "no-store"


def test_no_file_outside_of_the_folder_is_served() -> None:
    with rig(demo=True) as r:
        for path in ("/pages/", "/pages/../config.py", "/pages/%2e%2e/config.py", "/pages/nothing.js"):
            assert r.client(get(path)).answer.status in (400, 404)


@pytest.mark.parametrize("name", names())
def test_no_file_names_another_host(name: str) -> None:
    places = set(re.findall(r"https?://[^\s\"'`]+", text_of(name)))
    assert places <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name", HTML)
def test_a_page_has_no_inline_script_or_style(name: str) -> None:
    text = text_of(name)
    assert re.findall(r"<script(?![^>]* src=)", text) == re.findall(r"<style|\sstyle=|\son\w+=", text) == []


def test_the_wheel_has_every_file() -> None:
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    patterns = re.split(r",\s*", setup["options.package_data"]["streamd"])
    assert set(names()) == {path.name for path in FOLDER.iterdir()}
    assert all(any(fnmatch.fnmatch(f"pages/{name}", each) for each in patterns) for name in names())
    assert {Path(name).suffix for name in names()} == set(KINDS)


def test_the_page_reads_streams_as_the_example_does() -> None:
    """streamd.js is there to copy, so it stands in examples/ as well."""
    assert text_of("streamd.js") == (PROJECT / "examples" / "streamd.js").read_text(encoding="utf-8")
