"""The system calls that a worker may not make, as a filter for the kernel. Pure: no I/O, no clock.

The filter is a classic BPF program over `struct seccomp_data` (linux/seccomp.h, linux/filter.h): number at byte 0,
architecture at 4, arguments from 16, each as two little-endian words. A refused call fails with EPERM, so that a
runtime that tries goes on without; one of a foreign architecture ends the process.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

import msgspec

ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h by what `uname -m` says."""

ALLOW: Final = 0x7FFF0000
KILL_PROCESS: Final = 0x80000000
REFUSE: Final = 0x00050000 | errno.EPERM
UNKNOWN: Final = 0x00050000 | errno.ENOSYS

_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_AT_LEAST: Final = 0x35
_AND: Final = 0x54
_RETURN: Final = 0x06
_X32_BIT: Final = 0x40000000

_INSTRUCTION: Final = struct.Struct("=HBBI")
INSTRUCTION_BYTES: Final = _INSTRUCTION.size

Instruction = tuple[int, int, int, int]
"""Operation, jump if true, jump if false, operand."""


class Check(msgspec.Struct, frozen=True):
    """Let a call pass where `argument & mask == value` (or, with `equal` false, where not); `wide` looks at 64 bits."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF
    equal: bool = True
    wide: bool = False


_THREAD: Final = 0x00010000
_NAMESPACES: Final = 0x7E020000
_CREATING: Final = 0o100 | 0o1000
_WRITING: Final = 0o1 | 0o2 | _CREATING
_TERMINAL_INPUT: Final = 0x5412

# Call by call its number on x86-64 and on aarch64, -1 where it has none.
_REFUSED: Final = {
    "accept": (43, 202),
    "accept4": (288, 242),
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bind": (49, 200),
    "bpf": (321, 280),
    "capset": (126, 91),
    "chmod": (90, -1),
    "chown": (92, -1),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "connect": (42, 203),
    "creat": (85, -1),
    "delete_module": (176, 106),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fallocate": (285, 47),
    "fanotify_init": (300, 262),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "finit_module": (313, 273),
    "fork": (57, -1),
    "fremovexattr": (199, 16),
    "fsconfig": (431, 431),
    "fsetxattr": (190, 7),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "ftruncate": (77, 46),
    "futimesat": (261, -1),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, -1),
    "iopl": (172, -1),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lchown": (94, -1),
    "link": (86, -1),
    "linkat": (265, 37),
    "listen": (50, 201),
    "lremovexattr": (198, 15),
    "lsetxattr": (189, 6),
    "migrate_pages": (256, 238),
    "mkdir": (83, -1),
    "mkdirat": (258, 34),
    "mknod": (133, -1),
    "mknodat": (259, 33),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "removexattr": (197, 14),
    "rename": (82, -1),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "request_key": (249, 218),
    "rmdir": (84, -1),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "sendmmsg": (307, 269),
    "sendmsg": (46, 211),
    "setdomainname": (171, 162),
    "setgid": (106, 144),
    "setgroups": (116, 159),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "setregid": (114, 143),
    "setresgid": (119, 149),
    "setresuid": (117, 147),
    "setreuid": (113, 145),
    "settimeofday": (164, 170),
    "setuid": (105, 146),
    "setxattr": (188, 5),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "symlink": (88, -1),
    "symlinkat": (266, 36),
    "syslog": (103, 116),
    "tkill": (200, 130),
    "truncate": (76, 45),
    "umount2": (166, 39),
    "unlink": (87, -1),
    "unlinkat": (263, 35),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "utime": (132, -1),
    "utimensat": (280, 88),
    "utimes": (235, -1),
    "vfork": (58, -1),
    "vhangup": (153, 58),
}
_CHECKED: Final = {
    "clone": (56, 220),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "open": (2, -1),
    "openat": (257, 56),
    "prlimit64": (302, 261),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sendto": (44, 206),
    "tgkill": (234, 131),
}


def _checks(pid: int, writing: int) -> dict[str, Check]:
    """Return what a checked call must carry; `pid` is the worker's own, `writing` the refused bits of an opening."""
    ourselves = Check(0, pid)
    return {
        # Threads, and neither processes nor namespaces.
        "clone": Check(0, _THREAD, _THREAD | _NAMESPACES),
        # Nobody types into the owner's terminal.
        "ioctl": Check(1, _TERMINAL_INPUT, equal=False),
        "kill": ourselves,
        "rt_sigqueueinfo": ourselves,
        "rt_tgsigqueueinfo": ourselves,
        "tgkill": ourselves,
        "open": Check(1, 0, writing),
        "openat": Check(2, 0, writing),
        "prlimit64": Check(0, 0),
        # What the socket to the agent takes; an address would be somebody else's.
        "sendto": Check(4, 0, wide=True),
    }


# Their arguments lie in memory, where a filter cannot look; callers fall back to `clone` and `openat`.
_UNREADABLE: Final = {"clone3": (435, 435), "openat2": (437, 437)}


def program(machine: str, pid: int, *, writing: bool = False) -> bytes:
    """Return the filter for a machine in `ARCHITECTURES`; raises KeyError for another.

    `writing` lets files be opened for writing, for a process that must write to devices and to nothing else.
    """
    column = list(ARCHITECTURES).index(machine)
    checks = _checks(pid, _CREATING if writing else _WRITING)
    code: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        code += [(_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, KILL_PROCESS)]
    for name, numbers in _CHECKED.items():
        code += _when(numbers[column], _examine(checks[name]))
    for numbers in _UNREADABLE.values():
        code += _when(numbers[column], [(_RETURN, 0, 0, UNKNOWN)])
    for numbers in _REFUSED.values():
        code += _when(numbers[column], [(_RETURN, 0, 0, REFUSE)])
    code.append((_RETURN, 0, 0, ALLOW))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def numbers_of(machine: str) -> dict[str, int]:
    """Return the number of every call that the filter knows of, on a machine in `ARCHITECTURES`."""
    column = list(ARCHITECTURES).index(machine)
    known = {**_CHECKED, **_UNREADABLE, **_REFUSED}
    return {name: numbers[column] for name, numbers in known.items() if numbers[column] >= 0}


def _when(number: int, then: list[Instruction]) -> list[Instruction]:
    """Return code that runs `then`, which must return, for one call; none where the machine lacks the call."""
    return [(_EQUAL, 0, len(then), number), *then] if number >= 0 else []


def _examine(check: Check) -> list[Instruction]:
    """Return code that allows or refuses by one argument."""
    low = 16 + 8 * check.argument
    verdicts = [(_RETURN, 0, 0, ALLOW), (_RETURN, 0, 0, REFUSE)]
    if not check.equal:
        verdicts.reverse()
    upper = [(_LOAD, 0, 0, low + 4), (_EQUAL, 0, 4, 0)] if check.wide else []
    return [*upper, (_LOAD, 0, 0, low), (_AND, 0, 0, check.mask), (_EQUAL, 0, 1, check.value), *verdicts]
