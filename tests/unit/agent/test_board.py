from __future__ import annotations

from pathlib import Path

from agent import board
from agent.board import Heat, Load
from agent.measuring import Cell, Loaded, Report, busy_share, doubts, render
from agent.telling import table, text_of


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_heat_clock_and_throttling_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    write(tmp_path, "class/thermal/thermal_zone0/temp", "48300\n")
    write(tmp_path, "class/thermal/thermal_zone1/temp", "61000\n")
    write(tmp_path, "class/thermal/thermal_zone2/temp", "-274000\n")
    write(tmp_path, "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1500000")
    write(tmp_path, "devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "2400000")
    write(tmp_path, "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "7")
    write(tmp_path, "devices/platform/soc/soc:firmware/get_throttled", "50005\n")
    assert board.heat(tmp_path) == Heat(
        celsius=61.0,
        mhz=1500,
        max_mhz=2400,
        throttled=["under-voltage", "throttled"],
        throttle_events=7,
    )


def test_a_board_without_such_files_has_unknown_heat(tmp_path: Path) -> None:
    assert board.heat(tmp_path) == Heat()


def test_what_happened_since_the_start_is_told_apart_from_now() -> None:
    assert board.throttled(0) == []
    assert board.throttled(0x50000) == ["under-voltage since the start", "throttled since the start"]
    assert board.throttled(0x10001) == ["under-voltage"]


def load(busy: float, total: float, *, stolen: float = 0.0, swapped: int = 0) -> Load:
    return Load(busy_s=busy, stolen_s=stolen, total_s=total, swapped=swapped)


def test_the_share_of_others_is_what_was_busy_and_not_ours() -> None:
    assert busy_share(load(10, 100), load(30, 140), 10.0) == 0.25
    assert busy_share(load(10, 100), load(30, 140), 50.0) == 0.0


def cell(**facts: int) -> Cell:
    answers = facts.get("answers", 100)
    return Cell(
        threads=1,
        in_flight=8,
        answers=answers,
        errors=facts.get("errors", 0),
        p50_ms=1.0,
        p95_ms=2.0,
        p99_ms=3.0,
        model_p50_ms=0.5,
        answers_per_s=100.0,
        mean_batch=4.0,
        tokens_out_per_s=0.0,
    )


def test_figures_of_a_quiet_cool_board_are_not_doubted() -> None:
    still = (load(0, 0), load(1, 100))
    assert doubts([cell()], still, (Heat(celsius=40), Heat(celsius=50)), 0.02) == []


def test_whatever_speaks_against_the_figures_is_said() -> None:
    loads = (load(0, 0), load(1, 100, stolen=10, swapped=5))
    heats = (Heat(), Heat(celsius=90, mhz=1000, max_mhz=2000, throttled=["throttled"], throttle_events=3))
    told = " | ".join(doubts([cell(answers=3, errors=1)], loads, heats, 0.4))
    for word in (
        "40%",
        "hypervisor took 10%",
        "swapped",
        "throttled",
        "for heat",
        "90 °C",
        "1000 of 2000",
        "1x8",
        "errors",
    ):
        assert word in told


def test_a_report_is_a_table_with_what_speaks_against_it() -> None:
    report = Report(
        model="digits@1",
        task="image-classification",
        format="onnx",
        variant="default",
        seconds=20,
        cells=[cell()],
        loads=[Loaded(threads=1, load_s=0.2, idle_mb=38, used_mb=40)],
        heat_before=Heat(celsius=40),
        heat_after=Heat(celsius=50),
        others_share=0.3,
        doubts=["other programs used 30% of the processors"],
    )
    shown = render(report)
    assert "THREADS  IN FLIGHT" in shown
    assert "worker's memory 38 MiB, after the work 40 MiB" in shown
    assert "temperature 40 °C before, 50 °C after" in shown
    assert shown.endswith("doubt: other programs used 30% of the processors")


def test_columns_are_even_and_figures_stand_to_the_right() -> None:
    assert table(["NAME", "MS"], [["a", "10.5"], ["longer", "-"]]).splitlines() == [
        "NAME      MS",
        "a       10.5",
        "longer     -",
    ]


def test_an_answer_is_shown_as_its_text_or_as_json() -> None:
    assert text_of({"choices": [{"delta": {"content": "x"}}]}) == "x"
    assert text_of({"outputs": {"generated_text": "y"}}) == "y"
    assert text_of({"outputs": [1.5]}) == "[1.5]"
    assert text_of({"error": {"code": "a", "message": "b"}}) == "a: b"
    assert text_of({"model_name": "m"}) == '{"model_name":"m"}'
