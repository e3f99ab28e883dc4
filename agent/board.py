"""The board as its kernel shows it: cores, load, swap, heat, throttling. A look reads a few files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import msgspec
import psutil

THROTTLED_BITS: Final = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Bits of a Raspberry Pi's firmware word; 16 bits higher they tell that it happened since the start."""
_SYS: Final = Path("/sys")


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """Temperature (°C, the hottest zone; None: unknown), clock (MHz of the most a core may), throttling."""

    celsius: float | None = None
    mhz: int = 0
    max_mhz: int = 0
    throttled: list[str] = []
    throttle_events: int = 0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that all processors were busy, stolen by a hypervisor, and there; pages swapped in and out."""

    busy_s: float
    stolen_s: float
    total_s: float
    swapped: int


def cores() -> int:
    """Return the number of physical cores."""
    return max(1, psutil.cpu_count(logical=False) or psutil.cpu_count() or 1)


def load() -> Load:
    """Return the counters of processors and swap since the system's start."""
    times = psutil.cpu_times()
    total = sum(times)
    swap = psutil.swap_memory()
    idle = times.idle + getattr(times, "iowait", 0.0)
    return Load(busy_s=total - idle, stolen_s=getattr(times, "steal", 0.0), total_s=total, swapped=swap.sin + swap.sout)


def process_s(pid: int) -> float:
    """Return the processor seconds of a process, 0 where it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def heat(sys: Path = _SYS) -> Heat:
    """Return temperature, clock and throttling now."""
    celsius = [value / 1000 for value in _numbers(sys, "class/thermal/thermal_zone*/temp") if 0 < value < 200_000]
    now = _numbers(sys, "devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    most = _numbers(sys, "devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq")
    return Heat(
        celsius=max(celsius) if celsius else None,
        mhz=max(now) // 1000 if now else 0,
        max_mhz=max(most) // 1000 if most else 0,
        throttled=throttled(_firmware_word(sys)),
        throttle_events=sum(_numbers(sys, "devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")),
    )


def throttled(word: int) -> list[str]:
    """Return what a Raspberry Pi's firmware word says. Pure."""
    now = [words for bit, words in THROTTLED_BITS.items() if word >> bit & 1]
    before = [f"{words} since the start" for bit, words in THROTTLED_BITS.items() if word >> (bit + 16) & 1]
    return now + [words for words in before if words.removesuffix(" since the start") not in now]


def _firmware_word(sys: Path) -> int:
    for path in sys.glob("devices/platform/soc*/soc*:firmware/get_throttled"):
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text().strip(), 16)
    return 0


def _numbers(sys: Path, pattern: str) -> list[int]:
    found: list[int] = []
    for path in sys.glob(pattern):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text()))
    return found
