"""What `spillway doctor` looks at, gathered as plain values; whatever is heavy or can crash is tried in a child."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from agent import board
from agent.config import Config
from cloud_sync.link import Link
from cloud_sync.messages import LinkSettings

CHILD_S: Final = 60.0
CHILDREN: Final = 2
"""Runtimes that are tried at once: each takes tens of megabytes, on boards that have few."""
BROKER_S: Final = 8.0
MAX_WORDS: Final = 300

RUNTIMES: Final = {
    "onnxruntime": "import onnxruntime as r; "
    "told = {'version': r.__version__, 'providers': r.get_available_providers()}",
    "ai_edge_litert": "import ai_edge_litert.interpreter as r, importlib.metadata as m; "
    "told = {'version': m.version('ai-edge-litert')}",
    "tflite_runtime": "import tflite_runtime as r, tflite_runtime.interpreter; told = {'version': r.__version__}",
    "llguidance": "import llguidance, importlib.metadata as m; told = {'version': m.version('llguidance')}",
    "numpy": "import numpy as r; told = {'version': r.__version__}",
    "tokenizers": "import tokenizers as r; told = {'version': r.__version__}",
    "PIL": "import PIL as r; told = {'version': r.__version__}",
    "boto3": "import boto3 as r; told = {'version': r.__version__}",
    "tuf": "import tuf as r; told = {'version': r.__version__}",
}
"""How each package shows in a child that it can be used."""

_SANDBOX: Final = """
import tempfile, pathlib, models.sandbox as s
told = s.confine(pathlib.Path(tempfile.gettempdir()), memory_mb=256)
"""
_IDENTITY: Final = """
import sys, pathlib, cryptography.x509 as x, cloud_sync.identity as i
certificate, key, device = sys.argv[1:4]
mine = i.load_identity(pathlib.Path(certificate), pathlib.Path(key), device)
public = x.load_der_x509_certificate(mine.certificate)
i.verify_signature(public.public_key(), mine.sign(b"doctor"), b"doctor")
names = [a.value for a in public.subject.get_attributes_for_oid(x.NameOID.COMMON_NAME)]
told = {"names": names, "ends": public.not_valid_after_utc.timestamp()}
"""
_PRINT: Final = "\nimport json; print(json.dumps(told))"


_QUALIFIED = re.compile(r"^(?:[a-z_]+\.)+[A-Za-z]+: ")
"""Where an exception of a module begins: what follows is for people."""


class Child(msgspec.Struct, frozen=True):
    """What a child said, or why it said nothing: `code` is its exit status, below 0 the signal that ended it."""

    told: Any = None
    code: int = 0
    words: str = ""


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """The service as systemd sees it; empty where there is no systemd."""

    known: bool = False
    load: str = ""
    active: str = ""
    enabled: str = ""
    status: str = ""
    restarts: int = 0


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine itself."""

    bits: int
    architecture: str
    system: str
    python: tuple[int, int]
    model: str
    memory_mb: int
    free_mb: int
    swap_mb: int
    swap_used_mb: int
    shm_free_mb: int
    memory_limits: bool | None
    overcommit: int
    heat: board.Heat
    synchronized: bool | None
    now_s: float
    built_s: float
    jetson: bool
    libraries: list[str]
    corals: list[str]


class Folder(msgspec.Struct, frozen=True, kw_only=True):
    """A folder on the disk; `owner` and `me` are users' names."""

    path: str
    there: bool = False
    owner: str = ""
    me: str = ""
    mode: int = 0
    writable: bool = False
    readable: bool = False
    free_mb: int = 0
    free_nodes_share: float = 1.0
    in_memory: bool = False
    read_only: bool = False


async def run_child(program: str, *arguments: str) -> Child:
    """Run a few lines of Python and return the `told` that they set, never more than a line of what went wrong."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-I", "-c", program + _PRINT, *arguments)
    child = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(CHILD_S):
            out, told = await child.communicate()
    except TimeoutError:
        child.kill()
        await child.wait()
        return Child(code=1, words=f"no answer within {CHILD_S:.0f} s")
    if child.returncode:
        last = (told.decode(errors="replace").strip().splitlines() or [""])[-1]
        return Child(code=child.returncode, words=_QUALIFIED.sub("", last)[:MAX_WORDS])
    return Child(told=msgspec.json.decode(out.splitlines()[-1]))


async def runtimes() -> dict[str, Child]:
    """Return what each package says in a child of its own."""
    room = asyncio.Semaphore(CHILDREN)

    async def look(program: str) -> Child:
        async with room:
            return await run_child(program)

    told = await asyncio.gather(*map(look, RUNTIMES.values()))
    return dict(zip(RUNTIMES, told, strict=True))


async def sandbox() -> Child:
    """Return what this kernel cannot keep a worker from."""
    return await run_child(_SANDBOX)


async def identity(config: Config) -> Child:
    """Return the names in the box's certificate and when it ends, once its key has signed for it."""
    return await run_child(_IDENTITY, config.device.certificate, config.device.key, config.device.name)


async def libraries(paths: list[str]) -> dict[str, Child]:
    """Return whether each shared library can be loaded."""
    program = "import sys, ctypes; ctypes.CDLL(sys.argv[1]); told = True"
    return dict(zip(paths, await asyncio.gather(*(run_child(program, path) for path in paths)), strict=True))


async def broker(settings: LinkSettings, name: str) -> str:
    """Connect once as another client with the same credentials; return what went wrong, or nothing."""
    try:
        link = Link(
            msgspec.structs.replace(settings, client_id=name, clean_start=True, session_expiry_s=0),
            on_message=lambda _: None,
        )
        async with asyncio.timeout(BROKER_S):
            await link.probe()
    except TimeoutError:
        return f"no answer within {BROKER_S:.0f} s"
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


async def unit(name: str = "spillway.service") -> Unit:
    """Return what systemd knows of the service."""
    program = shutil.which("systemctl")
    if program is None or not os.path.isdir("/run/systemd/system"):  # noqa: PTH112, ASYNC240 - one look
        return Unit()
    wanted = "LoadState,ActiveState,UnitFileState,ExecMainStatus,NRestarts"
    child = await asyncio.create_subprocess_exec(
        program, "show", name, "-p", wanted, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await child.communicate()
    facts = dict(line.partition("=")[::2] for line in out.decode(errors="replace").splitlines())
    return Unit(
        known=True,
        load=facts.get("LoadState", ""),
        active=facts.get("ActiveState", ""),
        enabled=facts.get("UnitFileState", ""),
        status=facts.get("ExecMainStatus", ""),
        restarts=int(facts.get("NRestarts") or 0),
    )


async def machine() -> Machine:
    """Return what is to be known of the machine."""
    synchronized = await _synchronized()
    return await asyncio.to_thread(_machine, synchronized)


async def _synchronized() -> bool | None:
    program = shutil.which("timedatectl")
    if program is None:
        return None
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    command = (program, "show", "-p", "NTPSynchronized", "--value")
    child = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=nothing)
    out, _ = await child.communicate()
    return {"yes": True, "no": False}.get(out.decode(errors="replace").strip())


def _machine(synchronized: bool | None) -> Machine:  # noqa: FBT001 - a fact
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    name = _text("/proc/device-tree/model").rstrip("\x00")
    return Machine(
        bits=64 if sys.maxsize > 1 << 32 else 32,
        architecture=platform.machine(),
        system=platform.system(),
        python=(sys.version_info.major, sys.version_info.minor),
        model=name,
        memory_mb=memory.total >> 20,
        free_mb=memory.available >> 20,
        swap_mb=swap.total >> 20,
        swap_used_mb=swap.used >> 20,
        shm_free_mb=_free_mb("/dev/shm"),  # noqa: S108 - the kernel's own
        memory_limits=_memory_limits(),
        overcommit=int(_text("/proc/sys/vm/overcommit_memory") or 0),
        heat=board.heat(),
        synchronized=synchronized,
        now_s=time.time(),
        built_s=Path(__file__).stat().st_mtime,
        jetson="jetson" in name.lower() or Path("/etc/nv_tegra_release").exists(),
        libraries=_found("libcudart.so*", "libcudnn.so*", "libnvinfer.so*", "libedgetpu.so*"),
        corals=_corals(),
    )


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text("utf-8", "replace").strip()
    return ""


def _free_mb(path: str) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(path).free >> 20
    return 0


def _memory_limits() -> bool | None:
    """Whether the kernel bounds the memory of services; None where it cannot be told."""
    controllers = _text("/sys/fs/cgroup/cgroup.controllers")
    if controllers:
        return "memory" in controllers.split()
    return True if Path("/sys/fs/cgroup/memory").is_dir() else None


def _found(*patterns: str) -> list[str]:
    """Return the accelerators' libraries that lie where the loader looks."""
    folders = ["/usr/lib", "/usr/lib/aarch64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/usr/local/cuda/lib64"]
    names = {pattern.partition(".")[0] for folder in folders for pattern in patterns if any(Path(folder).glob(pattern))}
    return sorted(names)


def _corals() -> list[str]:
    """Return the Edge TPUs that are plugged in."""
    found = [str(path) for path in Path("/dev").glob("apex_*")]
    for path in Path("/sys/bus/usb/devices").glob("*/idVendor"):
        with contextlib.suppress(OSError):
            if f"{path.read_text().strip()}:{(path.parent / 'idProduct').read_text().strip()}" in {
                "1a6e:089a",
                "18d1:9302",
            }:
                found.append(f"USB {path.parent.name}")
    return found


def signed_at(state: Path) -> str:
    """Return when the newest signed file was issued that the box has trusted, empty where there is none."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
        raw = (state / "trust" / "floor-a.json").read_bytes().partition(b"\n")[2]
        return max(
            (str(one.get("issued", "")) for one in msgspec.json.decode(raw, type=list[dict[str, Any]])), default=""
        )
    return ""


def folder(path: Path) -> Folder:
    """Return what is to be known of a folder."""
    if not path.is_dir():
        return Folder(path=str(path))
    facts, room = path.stat(), os.statvfs(path)
    return Folder(
        path=str(path),
        there=True,
        owner=_user(facts.st_uid),
        me=_user(os.geteuid()),
        mode=facts.st_mode & 0o777,
        writable=os.access(path, os.W_OK),
        readable=os.access(path, os.R_OK | os.X_OK),
        free_mb=room.f_bavail * room.f_frsize >> 20,
        free_nodes_share=room.f_favail / room.f_files if room.f_files else 1.0,
        in_memory=_kind(path) in {"tmpfs", "ramfs", "overlay"},
        read_only=bool(room.f_flag & os.ST_RDONLY),
    )


def _user(number: int) -> str:
    import pwd  # noqa: PLC0415 - one look

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _kind(path: Path) -> str:
    """Return the kind of file system that a path lies on."""
    best, kind = "", ""
    for line in _text("/proc/self/mounts").splitlines():
        _, where, what, *_ = line.split()
        if str(path.resolve()).startswith(where) and len(where) > len(best):
            best, kind = where, what
    return kind
