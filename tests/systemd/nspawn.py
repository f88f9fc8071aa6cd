"""A Debian with its own systemd, booted in a container on this machine.

The root is made once by debootstrap and kept, with the wheels that an installation needs, in the folder streamd of
${XDG_CACHE_HOME:-~/.cache}; a run writes into an overlay above it, which is thrown away. The container shares the
host's network: a port on loopback is the same inside and outside. A missing condition (root's rights, a program, a
mirror) raises Unavailable with a text that names it.

Missing inside: the memory controller on a host with cgroup v1, so that MemoryMax has no effect there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,curl,make"
PYTHON = "3.11"  # the version in that Debian suite
# The manylinux tags with published wheels that its C library (2.36) accepts.
MANYLINUX = ("2014", "_2_17", "_2_24", "_2_26", "_2_27", "_2_28", "_2_31", "_2_34")
PROJECT = Path(__file__).parents[2]
BOOT_S = 120  # a slow machine needs 10 to 20


class Unavailable(Exception):
    """This machine can't boot the container; the text names the missing part."""


def cache_dir() -> Path:
    """The folder that keeps the root and the wheels between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamd"


def debian_root() -> Path:
    """The Debian root, made if it isn't there (about a minute)."""
    if os.geteuid() != 0:
        raise Unavailable("only root can boot a container")
    if shutil.which("systemd-nspawn") is None:
        raise Unavailable("systemd-nspawn is not installed (apt-get install systemd-container)")
    return _made(f"{SUITE}-{_short_digest(PACKAGES)}", _debootstrap)


def wheels() -> Path:
    """The wheels of all packages that `make install` needs: the container may have no package index."""
    pinned = re.findall(r"^(\S+==\S+)", (PROJECT / "requirements.lock").read_text(), re.M)
    build = tomllib.loads((PROJECT / "pyproject.toml").read_text())["build-system"]["requires"]
    wanted = [*pinned, *build, "wheel"]
    return _made(f"wheels-{_short_digest(' '.join(wanted))}", lambda folder: _download(wanted, folder))


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder. It gets its name only when it is complete."""
    finished = cache_dir() / name
    if not finished.exists():
        cache_dir().mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=name + ".", dir=cache_dir()))
        unfinished.chmod(0o755)
        try:
            make(unfinished)
        except BaseException:
            shutil.rmtree(unfinished)
            raise
        unfinished.rename(finished)
    return finished


def _debootstrap(folder: Path) -> None:
    if shutil.which("debootstrap") is None:
        raise Unavailable("debootstrap is not installed")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(folder)]
    _run_or_unavailable(command, "debootstrap could not make a Debian root")
    # On a real machine the installer writes this file; without it localhost doesn't resolve.
    (folder / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")


def _download(wanted: Sequence[str], folder: Path) -> None:
    tags = [f"--platform=manylinux{tag}_{platform.machine()}" for tag in MANYLINUX]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", f"--python-version={PYTHON}"]
    _run_or_unavailable([*command, *tags, "--dest", str(folder), *wanted], "pip could not get the wheels")


def _run_or_unavailable(command: Sequence[str], words: str) -> None:
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ran.returncode != 0:
        raise Unavailable(f"{words}: {ran.stdout.strip().splitlines()[-1:]}")


@contextlib.contextmanager
def overlay(root: Path) -> Iterator[Path]:
    """A writable view of `root` that leaves `root` unchanged."""
    # Beside the root: an overlay's upper folder can't lie on another overlay, as /tmp may in a container.
    layers = Path(tempfile.mkdtemp(prefix="run.", dir=cache_dir()))
    for name in ("upper", "work", "merged"):
        (layers / name).mkdir()
    merged = layers / "merged"
    options = f"lowerdir={root},upperdir={layers / 'upper'},workdir={layers / 'work'}"
    _run_or_unavailable(
        ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], "no overlay could be mounted"
    )
    try:
        yield merged
    finally:
        subprocess.run(["umount", "--lazy", str(merged)], check=True)
        shutil.rmtree(layers)


class Machine:
    """A booted root. `run` runs a command inside; `poweroff` (or leaving the context) ends it."""

    def __init__(self, root: Path, binds: dict[Path, str], boot_log: Path) -> None:
        self.root = root
        self._log = boot_log
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--notify-ready=yes", "--boot"]
        command += ["--link-journal=no", "--directory", str(root), "--machine", f"streamd-{os.getpid()}"]
        command += [f"--bind-ro={outside}:{inside}" for outside, inside in binds.items()]
        with _notify_socket() as (address, heard), boot_log.open("ab") as log:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"NOTIFY_SOCKET": address}
            )
            try:
                self._leader_pid = self._booted(heard)
            except BaseException:
                self._nspawn.terminate()
                self._nspawn.wait()
                raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.poweroff()

    def run(self, *command: str, check: bool = True, timeout_s: float = 120) -> str:
        """Run a command inside as root; return its standard output. A failure is an AssertionError if `check` holds."""
        return self.ran(*command, check=check, timeout_s=timeout_s).stdout

    def ran(self, *command: str, check: bool = False, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Like `run`; return the exit code and both outputs."""
        environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        ran = subprocess.run(
            ["nsenter", "-t", str(self._leader_pid), "-m", "-u", "-i", "-p", "-r", "-w", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environ,
            check=False,
            timeout=timeout_s,
        )
        if check and ran.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: exit {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    def poweroff(self) -> None:
        """Shut down in an orderly way; kill the container if that takes too long."""
        if self._nspawn.poll() is not None:
            return
        # systemd's SIGRTMIN+4 is poweroff.target; it also works where dbus doesn't.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._leader_pid, signal.SIGRTMIN + 4)
        try:
            self._nspawn.wait(BOOT_S)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()

    def _booted(self, heard: socket.socket) -> int:
        """Wait for READY=1 of the systemd inside; return its process id on the host."""
        leader_pid = 0
        while True:
            try:
                lines = heard.recv(4096).decode().splitlines()
            except TimeoutError:
                if self._nspawn.poll() is None:
                    continue
                raise Unavailable(f"systemd-nspawn could not boot: {self._log.read_text()[-500:]}") from None
            for line in lines:
                if line.startswith("X_NSPAWN_LEADER_PID="):
                    leader_pid = int(line.partition("=")[2])
            if "READY=1" in lines and leader_pid:
                return leader_pid


@contextlib.contextmanager
def _notify_socket() -> Iterator[tuple[str, socket.socket]]:
    name = f"streamd-nspawn-{os.getpid()}-{os.urandom(4).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("\0" + name)
        heard.settimeout(1.0)
        yield "@" + name, heard
