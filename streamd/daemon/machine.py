"""The machine's resources: memory limit, TCP memory, file descriptors, and the memory that streamd uses.

All files are read below an injectable root, so that tests can lay out machines of their own. A file that can't be read
(a sandbox with ProcSubset=pid hides /proc/sys) is never an error: the budget then uses the values that are known.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")

# A petabyte: a larger value means that there is no limit. cgroup v1 writes a page-aligned LONG_MAX for that.
UNLIMITED_BYTES: Final = 1 << 50


def memory_limit(setting_bytes: int, root: Path = ROOT) -> tuple[int, str]:
    """The bytes that all of streamd may use, and the source of this limit: "setting", "cgroup" or "machine".

    The setting (0: none) wins, else the lowest limit of all cgroup ancestors (v2 and v1), else the machine's memory.
    """
    if setting_bytes:
        return setting_bytes, "setting"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(_cgroup_limits(root), default=UNLIMITED_BYTES)
    return (limit, "cgroup") if limit < machine else (machine, "machine")


def tcp_memory(root: Path = ROOT) -> int | None:
    """The middle value of tcp_mem in bytes: above it TCP is under memory pressure. None if unreadable."""
    try:
        pages = int((root / "proc/sys/net/ipv4/tcp_mem").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def raise_descriptors() -> int:
    """Raise RLIMIT_NOFILE's soft limit to the hard limit, unless a sandbox forbids it. Returns the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def busy_s(root: Path = ROOT) -> float:
    """The seconds in which the calling thread had work: those in which it ran, and those in which it waited for a core.

    So a thread that has its core to itself, one that shares it, and one in a container with half a core all show the
    same share when they are full. Without the kernel's file (CONFIG_SCHED_INFO) the time of running alone.
    """
    try:
        ran_ns, waited_ns, _ = (root / "proc/thread-self/schedstat").read_text().split()
        return (int(ran_ns) + int(waited_ns)) / 1e9
    except (OSError, ValueError):
        return time.thread_time()


def resident_bytes(pid: int | str = "self", root: Path = ROOT) -> int:
    """User-space memory of a process: PSS (pages shared with others counted by their share), else RSS, else 0.

    The kernel walks all pages for it (10 ms for 500 MB): call it at start-up or in an idle moment, not in every sweep.
    """
    process = root / "proc" / str(pid)
    return _kilobytes(process / "smaps_rollup", "Pss:") or _kilobytes(process / "status", "VmRSS:")


def private_bytes(root: Path = ROOT) -> int:
    """User-space memory of this process alone, without file-backed pages (code, mappings); 0 if unreadable.

    It reads two of the kernel's counters in 10 us, which is cheap enough for every sweep.
    """
    try:
        _, resident, shared = (root / "proc/self/statm").read_text().split()[:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def sizes(root: Path = ROOT) -> tuple[int, int]:
    """The address space and the resident memory of this process, in bytes; 0 if unreadable."""
    try:
        virtual, resident = (root / "proc/self/statm").read_text().split()[:2]
    except (OSError, ValueError):
        return 0, 0
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return int(virtual) * page_bytes, int(resident) * page_bytes


def cpu_us() -> int:
    """The CPU time of this process so far, in microseconds."""
    used = os.times()
    return round((used.user + used.system) * 1_000_000)


def descriptors_max() -> int:
    """The file descriptors that this process may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _kilobytes(path: Path, key: str) -> int:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Every memory limit of this process: those of its own groups and of their ancestors, v2 and v1."""
    for mount, file, group in _memory_groups(root):
        inside = mount.joinpath(group.lstrip("/"))
        # In a container the group's path may be the host's (no such folder here): its limits are then at the mount.
        for folder in (inside, *inside.parents):
            yield from _limit(folder / file)
            if folder == mount:
                break


def _memory_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """(mount point, limit file, this process's group) of each hierarchy that counts memory."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                yield root / mount, "memory.max", group
        elif "memory" in controllers.split(","):
            yield root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", group


def _limit(path: Path) -> Iterator[int]:
    """The limit in a file; nothing for "max", for v1's "no limit", or if there is no such file."""
    with contextlib.suppress(OSError, ValueError):
        limit = int(path.read_text())
        if 0 < limit < UNLIMITED_BYTES:
            yield limit
