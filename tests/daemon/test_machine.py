"""Limits read from machines laid out below a temporary root."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from streamd.daemon import machine

MIB = 1024 * 1024


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


class TestMemoryLimit:
    def test_the_setting_wins(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/self/cgroup", "0::/a\n")
        put(tmp_path, "sys/fs/cgroup/a/memory.max", "1048576\n")
        assert machine.memory_limit(5 * MIB, tmp_path) == (5 * MIB, "setting")

    def test_the_limit_of_the_own_cgroup_v2_is_found(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/self/cgroup", "0::/system.slice/streamd.service\n")
        put(tmp_path, "sys/fs/cgroup/system.slice/streamd.service/memory.max", f"{512 * MIB}\n")
        assert machine.memory_limit(0, tmp_path) == (512 * MIB, "cgroup")

    def test_the_tightest_limit_of_an_ancestor_in_cgroup_v2_wins(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/self/cgroup", "0::/system.slice/streamd.service\n")
        put(tmp_path, "sys/fs/cgroup/system.slice/streamd.service/memory.max", "max\n")
        put(tmp_path, "sys/fs/cgroup/system.slice/memory.max", f"{100 * MIB}\n")
        put(tmp_path, "sys/fs/cgroup/memory.max", f"{300 * MIB}\n")
        assert machine.memory_limit(0, tmp_path) == (100 * MIB, "cgroup")

    def test_limits_of_cgroup_v1_and_of_a_hybrid_mount_are_found(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/self/cgroup", "9:cpu,cpuacct:/\n8:memory:/box/one\n1:name=systemd:/x\n0::/\n")
        put(tmp_path, "sys/fs/cgroup/memory/box/one/memory.limit_in_bytes", "9223372036854771712\n")
        put(tmp_path, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{200 * MIB}\n")
        assert machine.memory_limit(0, tmp_path) == (200 * MIB, "cgroup")
        put(tmp_path, "sys/fs/cgroup/unified/memory.max", f"{150 * MIB}\n")
        assert machine.memory_limit(0, tmp_path) == (150 * MIB, "cgroup")

    def test_the_limit_of_a_container_is_found_at_its_mount(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/self/cgroup", "4:memory:/docker/4f2a\n")
        put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{64 * MIB}\n")
        assert machine.memory_limit(0, tmp_path) == (64 * MIB, "cgroup")

    @pytest.mark.parametrize("text", ["max\n", "9223372036854771712\n", "rubbish\n", ""])
    def test_without_a_limit_the_machine_is_the_limit(self, tmp_path: Path, text: str) -> None:
        put(tmp_path, "proc/self/cgroup", "0::/a\n")
        put(tmp_path, "sys/fs/cgroup/a/memory.max", text)
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert machine.memory_limit(0, tmp_path) == (pages, "machine")

    def test_a_limit_above_the_machine_counts_as_the_machine(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/self/cgroup", "0::/a\n")
        put(tmp_path, "sys/fs/cgroup/a/memory.max", f"{1 << 49}\n")
        assert machine.memory_limit(0, tmp_path)[1] == "machine"

    def test_without_cgroups_the_machine_is_the_limit(self, tmp_path: Path) -> None:
        assert machine.memory_limit(0, tmp_path)[1] == "machine"

    def test_the_real_machine_has_memory(self) -> None:
        limit, source = machine.memory_limit(0)
        assert limit > MIB
        assert source in ("cgroup", "machine")


class TestTcpMemory:
    def test_tcp_memory_is_the_middle_value_in_pages(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/sys/net/ipv4/tcp_mem", "287901\t383869\t575802\n")
        assert machine.tcp_memory(tmp_path) == 383_869 * os.sysconf("SC_PAGE_SIZE")

    @pytest.mark.parametrize("text", ["", "1\n", "a b c\n"])
    def test_an_unreadable_tcp_mem_is_ignored(self, tmp_path: Path, text: str) -> None:
        put(tmp_path, "proc/sys/net/ipv4/tcp_mem", text)
        assert machine.tcp_memory(tmp_path) is None

    def test_a_tcp_mem_that_a_sandbox_hides_is_ignored(self, tmp_path: Path) -> None:
        assert machine.tcp_memory(tmp_path) is None


class TestDescriptors:
    @pytest.fixture
    def limits(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        limits = [(1024, 20_000)]
        monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
        monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
        return limits

    def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_limit(self, limits: list[tuple[int, int]]) -> None:
        assert machine.raise_descriptors() == 20_000

    def test_where_raising_is_forbidden_the_soft_limit_stays(
        self, limits: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden(which: int, pair: tuple[int, int]) -> None:
            raise PermissionError(1, "not here")

        monkeypatch.setattr(resource, "setrlimit", forbidden)
        assert machine.raise_descriptors() == 1024


class TestResident:
    def test_a_thread_is_busy_while_it_runs_and_while_it_waits_for_a_core(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/thread-self/schedstat", "1500000000 250000000 42\n")
        assert machine.busy_s(tmp_path) == 1.75

    @pytest.mark.parametrize("text", [None, "", "none\n"])
    def test_without_the_kernels_file_it_is_busy_while_it_runs(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            put(tmp_path, "proc/thread-self/schedstat", text)
        before_s = time.thread_time()
        assert before_s <= machine.busy_s(tmp_path) <= time.thread_time()

    def test_resident_memory_is_the_pss(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/self/smaps_rollup", "55d0-7ffe ---p 0 00:00 0 [rollup]\nRss: 90 kB\nPss: 42 kB\n")
        assert machine.resident_bytes(root=tmp_path) == 42 * 1024

    def test_without_pss_resident_memory_is_the_rss(self, tmp_path: Path) -> None:
        put(tmp_path, "proc/77/status", "Name:\tx\nVmRSS:\t  90 kB\n")
        assert machine.resident_bytes(77, tmp_path) == 90 * 1024

    def test_without_either_resident_memory_is_0(self, tmp_path: Path) -> None:
        assert machine.resident_bytes(root=tmp_path) == 0

    def test_resident_memory_of_this_process_is_found(self) -> None:
        assert machine.resident_bytes() > MIB
