from __future__ import annotations

import errno
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import landlock, seccomp
from models.sandbox import device_nodes, memory_bytes

MACHINES = sorted(seccomp.ARCHITECTURES)
PID = 4711
REFUSED = 0x50000 | errno.EPERM
NOT_THERE = 0x50000 | errno.ENOSYS
ALLOWED = 0x7FFF0000
KILLED = 0x80000000


def judged(program: bytes, machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """Run a filter as the kernel does (classic BPF of linux/filter.h) and return its verdict."""
    arch = seccomp.ARCHITECTURES[machine] if architecture is None else architecture
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code: list[tuple[int, int, int, int]] = list(struct.iter_unpack("=HBBI", program))
    register, at = 0, 0
    while True:
        operation, yes, no, operand = code[at]
        at += 1
        match operation:
            case 0x20:
                (register,) = struct.unpack_from("<I", data, operand)
            case 0x54:
                register &= operand
            case 0x15:
                at += yes if register == operand else no
            case 0x35:
                at += yes if register >= operand else no
            case 0x06:
                return operand
            case _:
                raise AssertionError(f"unknown operation {operation:#x}")


def called(machine: str, name: str, *arguments: int) -> int:
    return judged(seccomp.program(machine, PID), machine, seccomp.numbers_of(machine)[name], *arguments)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "name",
    [
        *("socket", "socketpair", "connect", "bind", "sendmsg", "execve", "execveat", "ptrace", "process_vm_readv"),
        *("process_vm_writev", "mount", "bpf", "io_uring_setup", "io_uring_enter", "kexec_load", "open_by_handle_at"),
        *("keyctl", "userfaultfd", "perf_event_open", "unshare", "setns", "pidfd_open", "tkill", "unlinkat", "mkdirat"),
        *("fchmodat", "fchownat", "renameat2", "setxattr", "truncate", "init_module", "personality"),
    ],
)
def test_e14_what_no_model_needs_is_refused(machine: str, name: str) -> None:
    assert called(machine, name) == REFUSED


@pytest.mark.parametrize("name", ["fork", "vfork", "creat", "unlink", "chmod", "iopl"])
def test_e14_old_calls_of_x86_are_refused_too(name: str) -> None:
    assert called("x86_64", name) == REFUSED
    assert name not in seccomp.numbers_of("aarch64")


@pytest.mark.parametrize("machine", MACHINES)
def test_a_thread_may_be_started_and_a_process_or_namespace_not(machine: str) -> None:
    pthread = 0x3D0F00
    assert called(machine, "clone", pthread) == ALLOWED
    assert called(machine, "clone", 17) == REFUSED
    assert called(machine, "clone", pthread | 0x40000000) == REFUSED
    assert called(machine, "clone", 0) == REFUSED
    assert called(machine, "clone3") == NOT_THERE


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flags", [0o1, 0o2, 0o100, 0o1000, 0o2 | 0o20000000 | 0o200000, 0o2001])
def test_a_file_is_opened_for_reading_alone(machine: str, flags: int) -> None:
    assert called(machine, "openat", 0, 0, 0o2000000) == ALLOWED
    assert called(machine, "openat", 0, 0, flags) == REFUSED
    assert called(machine, "openat2") == NOT_THERE


@pytest.mark.parametrize("machine", MACHINES)
def test_with_accelerators_a_file_may_be_opened_for_writing_and_none_made(machine: str) -> None:
    program, number = seccomp.program(machine, PID, writing=True), seccomp.numbers_of(machine)["openat"]
    assert judged(program, machine, number, 0, 0, 0o2) == ALLOWED
    for flags in (0o100, 0o1002, 0o2101):
        assert judged(program, machine, number, 0, 0, flags) == REFUSED


@pytest.mark.parametrize("machine", MACHINES)
def test_signals_reach_the_worker_itself_alone(machine: str) -> None:
    for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        assert called(machine, name, PID, 6) == ALLOWED
        for other in (1, 0, PID + 1, 0xFFFFFFFF, 2**64 - PID):
            assert called(machine, name, other, 9) == REFUSED


@pytest.mark.parametrize("machine", MACHINES)
def test_the_socket_to_the_agent_is_written_without_an_address(machine: str) -> None:
    assert called(machine, "sendto", 3, 0x7F0000001000, 10, 0, 0, 0) == ALLOWED
    for address in (0x7F0000001000, 1 << 32, 1):
        assert called(machine, "sendto", 3, 0x7F0000001000, 10, 0, address, 16) == REFUSED


@pytest.mark.parametrize("machine", MACHINES)
def test_limits_of_others_and_the_owners_terminal_are_out_of_reach(machine: str) -> None:
    assert (called(machine, "prlimit64", 0), called(machine, "prlimit64", 1)) == (ALLOWED, REFUSED)
    assert (called(machine, "ioctl", 1, 0x5401), called(machine, "ioctl", 1, 0x5412)) == (ALLOWED, REFUSED)


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        ("x86_64", {"read": 0, "write": 1, "mmap": 9, "brk": 12, "recvfrom": 45, "futex": 202, "exit_group": 231}),
        ("aarch64", {"read": 63, "write": 64, "mmap": 222, "brk": 214, "recvfrom": 207, "futex": 98, "exit_group": 94}),
    ],
)
def test_what_every_worker_does_is_allowed(machine: str, names: dict[str, int]) -> None:
    program = seccomp.program(machine, PID)
    assert {judged(program, machine, number) for number in names.values()} == {ALLOWED}


@given(machine=st.sampled_from(MACHINES), number=st.integers(0, 2**32 - 1), architecture=st.integers(0, 2**32 - 1))
def test_a_call_of_another_architecture_ends_the_process(machine: str, number: int, architecture: int) -> None:
    program = seccomp.program(machine, PID)
    ours = architecture == seccomp.ARCHITECTURES[machine]
    assert (judged(program, machine, number, architecture=architecture) == KILLED) is (
        not ours or (machine == "x86_64" and number >= 1 << 30)
    )


def test_the_second_set_of_calls_of_x86_ends_the_process() -> None:
    assert judged(seccomp.program("x86_64", PID), "x86_64", 1 << 30 | 41) == KILLED


@pytest.mark.parametrize("machine", MACHINES)
def test_no_number_is_listed_twice_and_the_kernel_takes_the_length(machine: str) -> None:
    numbers = list(seccomp.numbers_of(machine).values())
    assert len(numbers) == len(set(numbers))
    assert len(seccomp.program(machine, PID)) // seccomp.INSTRUCTION_BYTES <= 4096


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (1, [0x1FFF]),
        (2, [0x3FFF]),
        (3, [0x7FFF]),
        (4, [0x7FFF, 3]),
        (5, [0xFFFF, 3]),
        (6, [0xFFFF, 3, 3]),
        (9, [0xFFFF, 3, 3]),
    ],
)
def test_landlock_takes_away_all_that_its_version_knows(version: int, words: list[int]) -> None:
    assert landlock.ruleset(version) == struct.pack(f"={len(words)}Q", *words)


def test_landlock_gives_back_reading_alone() -> None:
    assert landlock.beneath(5, stat.S_IFDIR) == struct.pack("=Qi", 0b1100, 5)
    assert landlock.beneath(6, stat.S_IFREG) == struct.pack("=Qi", 0b0100, 6)


def test_landlock_lets_a_device_be_used_as_far_as_its_version_knows_how() -> None:
    assert [landlock.usable(5, version) for version in (4, 5)] == [
        struct.pack("=Qi", 0b110, 5),
        struct.pack("=Qi", 0x8006, 5),
    ]


def test_a_device_is_found_by_its_pattern_and_nothing_else_is() -> None:
    assert device_nodes(["/dev/nul*", "/dev/zero"]) == ["/dev/null", "/dev/zero"]
    assert device_nodes(["/dev", "/etc/passwd", "/dev/no-such-device*"]) == []


def test_what_the_kernel_lacks_is_said() -> None:
    told = [[words.split(":")[0] for words in landlock.lacking(version, filtered=False)] for version in range(5)]
    assert told == [["files"], ["tcp"], ["tcp"], ["tcp"], []]


def test_a_filter_of_system_calls_makes_up_for_ports_but_not_for_files() -> None:
    assert [len(landlock.lacking(version, filtered=True)) for version in range(5)] == [1, 0, 0, 0, 0]


def test_memory_is_bounded_by_the_budget_or_by_a_share_of_the_box() -> None:
    assert memory_bytes(200, 1 << 40) == 912 << 20
    assert memory_bytes(0, 8 << 30) == 6 << 30
