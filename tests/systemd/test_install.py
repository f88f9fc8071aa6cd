"""make install: the Python that it accepts, and the page that the proxies' configurations serve."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
INTERPRETER = PROJECT / "systemd" / "interpreter.py"

spec = importlib.util.spec_from_file_location("interpreter", INTERPRETER)
assert spec is not None and spec.loader is not None
interpreter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interpreter)


def test_a_python_of_the_system_is_fit() -> None:
    assert interpreter.why_unfit([Path("/usr/bin/env").resolve()]) == ""


@pytest.mark.parametrize("home", interpreter.HOMES)
def test_a_python_below_a_home_is_unfit_whatever_its_mode(home: str) -> None:
    path = Path(home, "ann", ".pyenv", "bin", "python3.11")
    assert interpreter.why_unfit([path]).startswith(f"{path} is below a home directory")


def test_a_python_that_other_accounts_can_not_reach_or_read_is_unfit() -> None:
    with tempfile.TemporaryDirectory() as name:  # mode 0700
        python = Path(name, "python")
        python.write_text("")
        assert interpreter.why_unfit([python]) == f"{name} has mode 0700: other accounts can't use {python}"
        Path(name).chmod(0o755)
        python.chmod(0o750)
        assert interpreter.why_unfit([python]) == f"{python} has mode 0750: other accounts can't use {python}"
        python.chmod(0o755)
        assert interpreter.why_unfit([python]) == ""


def test_an_installation_is_refused_and_a_stage_for_packages_is_warned(tmp_path: Path) -> None:
    # A copy of the check that takes the folder of this test for a home: the same whatever Python runs the tests.
    copy = tmp_path / "interpreter.py"
    text = INTERPRETER.read_text().replace('HOMES = ("/home",', f'HOMES = ("{Path(sys.base_prefix).resolve()}",')
    copy.write_text(text)
    for destdir, status in (("", 1), ("stage", 0)):
        ran = subprocess.run([sys.executable, copy, destdir], capture_output=True, text=True, check=False)
        assert ran.returncode == status and "make install PYTHON=/usr/bin/python3" in ran.stderr


def test_the_check_comes_before_anything_is_installed() -> None:
    recipe = (PROJECT / "systemd" / "install.mk").read_text().partition("\ninstall-venv:\n")[2]
    assert recipe.splitlines()[0] == '\t@$(PYTHON) systemd/interpreter.py "$(DESTDIR)"'


def places() -> dict[str, str]:
    """The files that are put in their places, as make computes them: target by source."""
    command = ["make", "--no-print-directory", "--eval", "shown: ; @echo $(STREAMD_PLACES)", "shown"]
    ran = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return dict(pair.split("=", 1) for pair in ran.stdout.split())


def test_the_page_is_installed_whole_where_the_proxies_configurations_look_for_it() -> None:
    installed = places()
    page = (PROJECT / "examples" / "index.html").read_text() + (PROJECT / "examples" / "page.js").read_text()
    named = set(re.findall(r"""(?:src|href)="([\w.]+)"|from ['"]\./([\w.]+)['"]""", page))
    needed = {"index.html", *("".join(names) for names in named)} & {
        each.name for each in (PROJECT / "examples").iterdir()
    }
    assert {"index.html", "page.js", "streamd.js"} <= needed
    folders = {str(Path(installed[f"examples/{name}"]).parent) for name in needed}
    roots = [
        root
        for file in (PROJECT / "examples" / "proxies").iterdir()
        for root in re.findall(r"(/\S+/examples)\b", file.read_text())
    ]
    assert len(roots) >= 5 and set(roots) == folders
