"""Landlock: what this process may read from now on; it may write nothing and reach no TCP port (linux/landlock.h)."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterable
from typing import Final

# The same numbers on every architecture.
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446

WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_FOLDER: Final = 1 << 3
USE_DEVICE: Final = 1 << 15
# How many file rights each version of the interface knows: REFER came second, TRUNCATE third, IOCTL_DEV fifth.
_FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK_SINCE: Final = 4
_DEVICES_SINCE: Final = 5
_SCOPES_SINCE: Final = 6
# Neither ports to listen on nor to connect to; neither abstract sockets nor signals to processes outside.
_PORTS: Final = 0b11
_SCOPES: Final = 0b11


def ruleset(version: int) -> bytes:
    """Return the `struct landlock_ruleset_attr` that takes away every right a version of the interface knows. Pure."""
    rights = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    words = [rights]
    if version >= _NETWORK_SINCE:
        words.append(_PORTS)
    if version >= _SCOPES_SINCE:
        words.append(_SCOPES)
    return struct.pack(f"={len(words)}Q", *words)


def beneath(descriptor: int, mode: int) -> bytes:
    """Return the `struct landlock_path_beneath_attr` that lets a file, or a folder's files, be read. Pure."""
    rights = READ_FILE | READ_FOLDER if stat.S_ISDIR(mode) else READ_FILE
    return struct.pack("=Qi", rights, descriptor)


def usable(descriptor: int, version: int) -> bytes:
    """Return the `struct landlock_path_beneath_attr` that lets a device be read, written and told what to do. Pure."""
    rights = READ_FILE | WRITE_FILE | (USE_DEVICE if version >= _DEVICES_SINCE else 0)
    return struct.pack("=Qi", rights, descriptor)


def lacking(version: int, *, filtered: bool) -> list[str]:
    """Return what a version of the interface (0: none at all) leaves open, beside a filter of system calls. Pure."""
    if version < 1:
        return ["files: this kernel has no Landlock, or it is switched off"]
    return [] if filtered or version >= _NETWORK_SINCE else [f"tcp: Landlock {version} knows no ports"]


def interface(libc: ctypes.CDLL) -> int:
    """Return the version of Landlock that the kernel offers; 0 where it has none."""
    return max(0, int(libc.syscall(_CREATE_RULESET, None, 0, 1)))


def restrict(libc: ctypes.CDLL, version: int, readable: Iterable[str], *, devices: Iterable[str] = ()) -> None:
    """Leave this thread, and those it starts, nothing but reading beneath these paths and using these devices.

    Raises OSError.
    """
    attributes = ruleset(version)
    rules = _call(libc, _CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path in readable:
            _allow(libc, rules, path, beneath)
        for path in devices:
            _allow(libc, rules, path, lambda descriptor, _: usable(descriptor, version))
        _call(libc, _RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _allow(libc: ctypes.CDLL, rules: int, path: str, rule: Callable[[int, int], bytes]) -> None:
    """Add the rule that is made from a path's descriptor and mode; what is not there needs none."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _call(libc, _ADD_RULE, rules, 1, rule(descriptor, os.fstat(descriptor).st_mode), 0)
    finally:
        os.close(descriptor)


def _call(libc: ctypes.CDLL, number: int, *arguments: int | bytes) -> int:
    result = int(libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
