"""What a worker gives up before it opens a model: writing, other files, the network, other processes, and more memory.

A model may come from strangers and its runtime may have holes. What the kernel does not offer is told, never passed
over in silence.
"""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from models import landlock, seccomp

MEMORY_FACTOR: Final = 2
MEMORY_HEADROOM_MB: Final = 512
"""Added to twice the manifest's budget: what runtimes reserve for threads and arenas and never touch."""
MEMORY_SHARE: Final = 0.75
"""Of the box's memory, for a model whose manifest names no budget."""
MAX_FILES: Final = 256

_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2

_SYSTEM: Final = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/random",
    "/dev/urandom",
    "/dev/zero",
    # Runtimes read the processor's shape and their own memory map.
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/self",
    "/proc/stat",
    "/proc/sys/kernel/osrelease",
    "/sys/bus/pci/devices",
    "/sys/devices/system/cpu",
)


class _Program(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def memory_bytes(budget_mb: int, box_bytes: int) -> int:
    """Return how much memory a model may hold by its budget in MiB (0: none named), on a box of this size. Pure."""
    if budget_mb:
        return (MEMORY_FACTOR * budget_mb + MEMORY_HEADROOM_MB) << 20
    return int(box_bytes * MEMORY_SHARE)


def confine(folder: Path, *, memory_mb: int, devices: Sequence[str] = (), reads: Sequence[str] = ()) -> list[str]:
    """Confine this process, for good, to reading one artifact; return what could not be done and why.

    It must have a single thread: only those that it starts afterwards are confined with it. `devices` are the
    accelerators that it may use (with `*` for several), `reads` what their drivers read.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    version = landlock.interface(libc)
    missing: list[str] = []
    _attempt(missing, "threads", _expect_one_thread)
    _attempt(missing, "memory", lambda: _limit_memory(memory_mb))
    _attempt(missing, "limits", _limit)
    _attempt(missing, "dumps", lambda: _prctl(libc, _PR_SET_DUMPABLE, 0))
    _attempt(missing, "privileges", lambda: _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1))
    if version:
        nodes = device_nodes(devices)
        _attempt(missing, "files", lambda: landlock.restrict(libc, version, [*readable(folder), *reads], devices=nodes))
    filtered = _attempt(missing, "system calls", lambda: _filter(libc, writing=bool(devices)))
    return missing + landlock.lacking(version, filtered=filtered)


def readable(folder: Path) -> list[str]:
    """Return what a worker may read: Python and its packages, this package, the system's libraries, the artifact."""
    roots = tuple({f"{root}/" for root in (sys.prefix, sys.base_prefix)})
    packages = [path for path in sys.path if path.startswith(roots)]
    # ONNX Runtime looks for accelerators and complains where it may not.
    buses = [str(path) for path in Path("/sys/devices").glob("pci*")]
    return [*packages, str(Path(__file__).parent), *_SYSTEM, *buses, str(folder)]


def device_nodes(patterns: Iterable[str]) -> list[str]:
    """Return the devices that the patterns stand for; what is no device is left out."""
    found = {path for pattern in patterns for path in Path("/").glob(pattern.lstrip("/"))}
    return sorted(str(path) for path in found if stat.S_ISCHR(path.stat().st_mode))


def _attempt(missing: list[str], what: str, step: Callable[[], None]) -> bool:
    """Take one step; False, and a note in words, if the kernel refuses it."""
    try:
        step()
    except (OSError, ValueError) as error:
        missing.append(f"{what}: {error}")
        return False
    return True


def _expect_one_thread() -> None:
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise ValueError("some were started before and are not confined")


def _limit_memory(budget_mb: int) -> None:
    """Bound private writable memory; ONNX Runtime maps weights so that they count, LiteRT so that they do not."""
    box = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _lower(resource.RLIMIT_DATA, memory_bytes(budget_mb, box))


def _limit() -> None:
    """Leave no core file with askers' inputs, write no file, and keep few open."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_NOFILE, MAX_FILES)


def _lower(limit: int, value: int) -> None:
    """Set a limit, never above the one that is in force."""
    hard = resource.getrlimit(limit)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (bound, bound))


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _filter(libc: ctypes.CDLL, *, writing: bool) -> None:
    """Refuse the system calls that no model needs; raises OSError, or ValueError on an unknown architecture."""
    machine = os.uname().machine
    if machine not in seccomp.ARCHITECTURES:
        raise ValueError(f"no filter is written for {machine}")
    code = seccomp.program(machine, os.getpid(), writing=writing)
    loaded = _Program(len(code) // seccomp.INSTRUCTION_BYTES, code)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(loaded), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
