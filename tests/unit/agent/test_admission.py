"""Who may be in memory, and what the files of /proc and /sys say of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.admission import (
    IDLE_S,
    STALL_PERCENT,
    Held,
    Memory,
    group_folders,
    leak_bound_mb,
    limit_free_mb,
    needed_mb,
    parse_kb,
    plan_load,
    stalled_percent,
    usable_mb,
)
from agent.memory import read_memory

BOX = Memory(total_mb=1000, free_mb=564)
"""Of which 500 MiB may be used: the reserve is 64."""

CGROUP2 = "0::/system.slice/spillway.service\n"
CGROUP2_MOUNTS = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
CGROUP1 = "5:memory:/box/spillway\n3:cpu,cpuacct:/other\n"
CGROUP1_MOUNTS = (
    "34 31 0:31 /box /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "35 31 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
)


def test_e19_what_fits_beyond_the_reserve_is_loaded() -> None:
    assert plan_load(500, BOX, []).short_mb == 0
    refused = plan_load(501, BOX, [])
    assert (refused.short_mb, refused.unload) == (1, [])
    assert refused.why == "it needs 501 MiB and 500 can be had"


def test_e19_the_longest_idle_make_room_and_no_more_of_them_than_must() -> None:
    held = [Held("b", 100, 200), Held("a", 100, 300), Held("c", 100, 100)]
    assert plan_load(550, BOX, held).unload == ["a"]
    assert plan_load(650, BOX, held).unload == ["a", "b"]


def test_e19_nothing_is_unloaded_for_what_would_not_fit_all_the_same() -> None:
    plan = plan_load(900, BOX, [Held("a", 100, 300), Held("b", 100, 300)])
    assert (plan.unload, plan.short_mb) == ([], 200)


def test_e19_a_model_that_is_busy_or_was_asked_just_now_stays() -> None:
    for stays in (Held("a", 300, 1000, movable=False), Held("a", 300, IDLE_S - 1)):
        assert plan_load(600, BOX, [stays]).unload == []
    assert plan_load(600, BOX, [Held("a", 300, IDLE_S)]).unload == ["a"]


def test_e19_loads_under_way_are_counted_before_they_take_their_memory() -> None:
    assert plan_load(300, BOX, [], promised_mb=200).short_mb == 0
    assert plan_load(301, BOX, [], promised_mb=200).short_mb == 1


def test_nothing_is_loaded_while_the_box_waits_for_memory() -> None:
    stalled = Memory(total_mb=1000, free_mb=900, stalled_percent=STALL_PERCENT)
    plan = plan_load(10, stalled, [Held("a", 300, 1000)])
    assert (plan.unload, plan.short_mb) == ([], 10)
    assert "waits for memory 10 %" in plan.why


def test_the_service_s_own_limit_binds_where_it_is_tighter() -> None:
    assert usable_mb(Memory(total_mb=8000, free_mb=6000)) == 5600
    assert usable_mb(Memory(total_mb=8000, free_mb=6000, limit_free_mb=264)) == 200


@given(
    st.floats(0, 5000),
    st.floats(0, 2000),
    st.lists(st.builds(Held, st.text(max_size=3), st.floats(0, 900), st.floats(0, 99), st.booleans()), max_size=8),
)
def test_a_plan_either_fits_or_unloads_nothing(need_mb: float, free_mb: float, held: list[Held]) -> None:
    memory = Memory(total_mb=2000, free_mb=free_mb)
    plan = plan_load(need_mb, memory, held)
    if plan.short_mb:
        assert not plan.unload
        return
    idle = sorted((one for one in held if one.movable and one.idle_s >= IDLE_S), key=lambda one: -one.idle_s)
    gained = sum(one.mb for one in idle[: len(plan.unload)])
    assert usable_mb(memory) + gained >= need_mb
    assert plan.unload == [one.name for one in idle[: len(plan.unload)]]


def test_what_was_measured_here_goes_before_the_budget_and_the_budget_before_a_guess() -> None:
    assert needed_mb(measured_mb=100, budget_mb=400, files_mb=10) == pytest.approx(110)
    assert needed_mb(measured_mb=0, budget_mb=400, files_mb=10) == 400
    assert needed_mb(measured_mb=0, budget_mb=0, files_mb=100) == 314


def test_a_leak_is_what_goes_far_beyond_the_budget_and_beyond_what_the_trial_showed() -> None:
    assert leak_bound_mb(measured_mb=40, budget_mb=200) == 364
    assert leak_bound_mb(measured_mb=40, budget_mb=0) == 376
    assert leak_bound_mb(measured_mb=0, budget_mb=0) == 0


def test_figures_of_proc_are_read_by_name() -> None:
    text = "MemTotal:       1024 kB\nMemAvailable:    512 kB\nThreads:\t3\nVmRSS:\t  2048 kB\n"
    assert parse_kb(text, ("MemTotal", "VmRSS", "Absent")) == {"MemTotal": 1, "VmRSS": 2, "Absent": 0}


def test_pressure_is_that_of_the_last_ten_seconds_in_which_nothing_ran() -> None:
    text = "some avg10=50.00 avg60=1.00 avg300=0.00 total=1\nfull avg10=12.34 avg60=1.00 avg300=0.00 total=1\n"
    assert stalled_percent(text) == pytest.approx(12.34)
    assert stalled_percent("") == 0


def test_every_group_around_the_service_is_looked_at_in_either_version() -> None:
    assert group_folders(CGROUP2, CGROUP2_MOUNTS) == [
        ("/sys/fs/cgroup/system.slice/spillway.service", 2),
        ("/sys/fs/cgroup/system.slice", 2),
        ("/sys/fs/cgroup", 2),
    ]
    assert group_folders(CGROUP1, CGROUP1_MOUNTS) == [
        ("/sys/fs/cgroup/memory/spillway", 1),
        ("/sys/fs/cgroup/memory", 1),
    ]
    assert group_folders(CGROUP1, "") == []


def test_a_limit_leaves_what_is_not_used_and_the_caches_that_the_kernel_would_give_back() -> None:
    used = {"memory.current": str(600 << 20), "memory.stat": f"anon 5\ninactive_file {100 << 20}\n"}
    assert limit_free_mb(2, {"memory.max": str(1000 << 20), **used}) == 500
    assert limit_free_mb(2, {"memory.max": "max\n", **used}) is None
    old = {"memory.usage_in_bytes": str(600 << 20), "memory.stat": f"total_inactive_file {50 << 20}\n"}
    assert limit_free_mb(1, {"memory.limit_in_bytes": str(1000 << 20), **old}) == 450
    assert limit_free_mb(1, {"memory.limit_in_bytes": "9223372036854771712\n", **old}) is None
    assert limit_free_mb(2, {}) is None


def lay(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_the_tightest_limit_of_all_groups_counts(tmp_path: Path) -> None:
    lay(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n",
            "proc/self/cgroup": CGROUP2,
            "proc/self/mountinfo": CGROUP2_MOUNTS,
            "proc/pressure/memory": "full avg10=1.50 avg60=0.00 avg300=0.00 total=1\n",
            "sys/fs/cgroup/system.slice/spillway.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/memory.max": str(300 << 20),
            "sys/fs/cgroup/system.slice/memory.current": str(100 << 20),
        },
    )
    assert read_memory(tmp_path) == Memory(total_mb=1024, free_mb=512, limit_free_mb=200, stalled_percent=1.5)


def test_a_kernel_without_these_files_sets_no_bound_but_memory_itself(tmp_path: Path) -> None:
    lay(tmp_path, {"proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n"})
    assert read_memory(tmp_path) == Memory(total_mb=1024, free_mb=512)


def test_this_machine_has_memory() -> None:
    memory = read_memory()
    assert 0 < memory.free_mb <= memory.total_mb
