"""What `spillway doctor` makes of what it saw: a finding, its reason, what to type. Pure: no I/O, no clock."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

import msgspec

from agent.config import Config
from agent.probes import Child, Folder, Machine, Unit
from models.backend_settings import BackendSettings

PYTHONS: Final = ((3, 11), (3, 14))
LOW_MB: Final = 512
RESERVE_MB: Final = 256
LOW_NODES: Final = 0.02
HOT_CELSIUS: Final = 80.0
OLD_NUMPY: Final = 2
ILLEGAL: Final = -4
"""Exit status of a process that met an instruction which its processor does not have (SIGILL)."""
SOON_S: Final = 30 * 86_400.0
SHARED: Final = "/dev/shm"  # noqa: S108 - the kernel's own
CMDLINE: Final = "/boot/firmware/cmdline.txt (one line), then reboot"
PIP: Final = "/opt/spillway/bin/pip install"
PROVIDERS: Final = {
    "acl": "ACLExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}


class Finding(msgspec.Struct, frozen=True):
    """One line: what was looked at, how it is, and where it is not right why that matters and what to type."""

    level: Literal["ok", "warning", "fault"]
    what: str
    told: str
    why: str = ""
    mend: str = ""


Findings = Iterator[Finding]


def ok(what: str, told: str) -> Finding:
    """Return a finding that nothing is wrong with."""
    return Finding("ok", what, told)


def of_machine(machine: Machine) -> Findings:
    """Judge processor, Python, memory, heat and clock."""
    if machine.bits == 64 and machine.architecture in {"x86_64", "aarch64"}:
        yield ok("processor", f"{machine.architecture}, 64-bit{f', {machine.model}' if machine.model else ''}")
    else:
        why = "the runtimes have wheels for 64-bit x86 and ARM alone"
        yield Finding(
            "fault", "processor", f"{machine.architecture}, {machine.bits}-bit", why, "install a 64-bit system"
        )
    python = ".".join(map(str, machine.python))
    if PYTHONS[0] <= machine.python <= PYTHONS[1]:
        yield ok("python", python)
    else:
        why, mend = "Spillway runs on 3.11 to 3.14", "make /opt/spillway anew with such a python3 -m venv"
        yield Finding("fault", "python", python, why, mend)
    yield from _of_memory(machine)
    yield from _of_heat(machine)
    yield from _of_clock(machine)


def _of_memory(machine: Machine) -> Findings:
    told = f"{machine.free_mb} of {machine.memory_mb} MiB free"
    if machine.free_mb < LOW_MB:
        why = f"under {LOW_MB} MiB little fits beside the agent, and the kernel may end workers"
        yield Finding("warning", "memory", told, why, "systemctl status | head -40   # what else runs here")
    else:
        yield ok("memory", told)
    if machine.swap_used_mb * 2 > machine.swap_mb > 0:
        why = "a model that is swapped out answers late, and cards wear out"
        yield Finding(
            "warning",
            "swap",
            f"{machine.swap_used_mb} of {machine.swap_mb} MiB used",
            why,
            "free -m; ps aux --sort -rss | head",
        )
    if machine.memory_limits is False:
        why = "MemoryMax of the unit has no effect: one model too large can stop the whole board"
        mend = f"add `cgroup_enable=memory` to {CMDLINE}"
        yield Finding("warning", "memory limits", "the kernel's memory controller is off", why, mend)
    if machine.overcommit == 2:
        why = "runtimes reserve memory that they never touch, which this setting refuses"
        yield Finding("warning", "overcommit", "vm.overcommit_memory is 2", why, "sysctl vm.overcommit_memory=0")
    if machine.shm_free_mb < RESERVE_MB // 4:
        why = "large inputs cross to workers through shared memory"
        yield Finding("warning", SHARED, f"{machine.shm_free_mb} MiB free", why, "mount -o remount,size=25% /dev/shm")
    else:
        yield ok(SHARED, f"{machine.shm_free_mb} MiB free")


def _of_heat(machine: Machine) -> Findings:
    heat = machine.heat
    told = "unknown" if heat.celsius is None else f"{heat.celsius:.0f} °C"
    if any("under-voltage" in words for words in heat.throttled):
        why = "the board lowers its clock, and cards lose what is written"
        yield Finding(
            "warning", "power", ", ".join(heat.throttled), why, "use the board's own power supply and a short cable"
        )
    elif heat.throttled or (heat.celsius or 0.0) >= HOT_CELSIUS:
        told = ", ".join([told, *heat.throttled])
        yield Finding("warning", "heat", told, "a hot board lowers its clock", "give it a heat sink, a fan or shade")
    else:
        yield ok("heat", told)


def _of_clock(machine: Machine) -> Findings:
    now = dt.datetime.fromtimestamp(machine.now_s, dt.UTC)
    told = f"{now:%Y-%m-%d %H:%M} UTC"
    if machine.now_s < machine.built_s - 86_400:
        why = "it stands before this program was installed: TLS fails, and updates go forward only"
        yield Finding("fault", "clock", told, why, "timedatectl set-ntp true   # or set it: timedatectl set-time ...")
    elif machine.synchronized is False:
        why = "nothing sets it, so it drifts, and is wrong after a power cut"
        yield Finding("warning", "clock", f"{told}, not synchronized", why, "timedatectl set-ntp true")
    else:
        yield ok("clock", told)


def of_signed_time(issued: str, now_s: float) -> Findings:
    """Judge the clock by the newest signed file that the box has seen; `issued` is empty where it has seen none."""
    try:
        floor_s = dt.datetime.fromisoformat(issued).timestamp()
    except ValueError:
        return
    if now_s < floor_s:
        why = "what the fleet signed is newer than this clock: TLS may fail, and updates go forward only"
        mend = "timedatectl set-ntp true   # or set it: timedatectl set-time ..."
        yield Finding("fault", "clock and signatures", f"the fleet signed something at {issued}", why, mend)


def of_runtimes(children: Mapping[str, Child], *, writes_text: bool) -> Findings:
    """Judge the packages that models run on, and those that bring them here."""
    yield from _of_package("onnxruntime", children["onnxruntime"], "ONNX models do not run", f"{PIP} onnxruntime")
    yield from _of_litert(children)
    forms = children["llguidance"]
    if forms.told:
        yield ok("llguidance", forms.told["version"])
    elif writes_text:
        why = "no answer can be held to a JSON schema"
        yield Finding("warning", "llguidance", "not installed", why, f"{PIP} llguidance")
    else:
        yield ok("llguidance", f"not installed; for answers held to a JSON schema: {PIP} llguidance")
    for name, package, why in (
        ("numpy", "numpy", "no model runs without"),
        ("tokenizers", "tokenizers", "text models do not run"),
        ("PIL", "pillow", "picture models do not run"),
        ("tuf", "'tuf~=7.0'", "no new version can be trusted"),
        ("boto3", "boto3", "versions in an S3 bucket cannot be fetched"),
    ):
        yield from _of_package(package.strip("'").partition("~")[0], children[name], why, f"{PIP} {package}")


def _of_package(name: str, child: Child, why: str, mend: str) -> Findings:
    if child.told:
        yield ok(name, child.told["version"])
    elif child.code == ILLEGAL:
        told = "its wheel needs instructions that this processor does not have"
        yield Finding("fault", name, told, why, f"{mend}==VERSION   # an older one, or a wheel of the board's maker")
    else:
        told = "not installed" if "ModuleNotFoundError" in child.words else child.words or f"exit status {child.code}"
        yield Finding("fault", name, told, why, mend)


def _of_litert(children: Mapping[str, Child]) -> Findings:
    """Judge LiteRT, or tflite-runtime in its place; the latter breaks with numpy 2."""
    new, old = children["ai_edge_litert"], children["tflite_runtime"]
    if new.told or not old.told:
        mend = f"{PIP} --require-hashes -r requirements/tflite.txt" if new.code == ILLEGAL else f"{PIP} ai-edge-litert"
        yield from _of_package("ai-edge-litert", new, "LiteRT models do not run", mend)
        return
    numpy = str((children["numpy"].told or {}).get("version", "0"))
    if int(numpy.partition(".")[0]) >= OLD_NUMPY:
        told = f"{old.told['version']} beside numpy {numpy}"
        yield Finding("fault", "tflite-runtime", told, "it breaks with numpy 2", f"{PIP} 'numpy<2'")
    else:
        yield ok("tflite-runtime", old.told["version"])


def of_accelerators(
    machine: Machine, backends: BackendSettings, onnxruntime: Child, loaded: Mapping[str, Child]
) -> Findings:
    """Judge what is configured against what is there, and what is there against what is configured."""
    offered = set((onnxruntime.told or {}).get("providers", []))
    for name in backends.onnx.providers:
        if PROVIDERS[name] in offered:
            yield ok(f"provider {name}", "offered by this onnxruntime")
        else:
            why = "it is configured, and models run on the processor instead"
            has = ", ".join(sorted(offered)) or "none"
            mend = "install the onnxruntime wheel that is built with it, or take it out of `backends.onnx.providers`"
            yield Finding("fault", f"provider {name}", f"this onnxruntime has {has}", why, mend)
    for path, child in loaded.items():
        if child.told:
            yield ok(f"delegate {path}", "can be loaded")
        else:
            why = "it is configured, and LiteRT models run on the processor instead"
            yield Finding(
                "fault",
                f"delegate {path}",
                child.words,
                why,
                "install it, or take it out of `backends.tflite.delegates`",
            )
    if machine.jetson:
        yield from _of_jetson(machine, backends, offered)
    if machine.corals and not backends.tflite.delegates:
        told = f"{', '.join(machine.corals)}, unused"
        lacks = "" if "libedgetpu" in machine.libraries else "apt install libedgetpu1-std, then "
        mend = f"{lacks}`[[backends.tflite.delegates]]` with library = its whole path, and `backends.devices`"
        yield Finding("warning", "Edge TPU", told, "models compiled for it run many times faster there", mend)


def _of_jetson(machine: Machine, backends: BackendSettings, offered: set[str]) -> Findings:
    if (
        PROVIDERS["cuda"] in offered
        and "cuda" not in backends.onnx.providers
        and "tensorrt" not in backends.onnx.providers
    ):
        mend = '`backends.onnx.providers = ["tensorrt", "cuda"]`, and the devices of systemd/README.md'
        yield Finding("warning", "Jetson", "its GPU is unused", "ONNX models run on the processor", mend)
    elif PROVIDERS["cuda"] not in offered:
        lacks = [name for name in ("libcudart", "libcudnn", "libnvinfer") if name not in machine.libraries]
        told = f"this onnxruntime has no CUDA{f', and {chr(44).join(lacks)} are not there' if lacks else ''}"
        mend = "apt install nvidia-jetpack, then the onnxruntime-gpu wheel that NVIDIA builds for it"
        yield Finding("warning", "Jetson", told, "ONNX models run on the processor", mend)
    else:
        yield ok("Jetson", f"GPU by {', '.join(backends.onnx.providers)}")


def of_sandbox(child: Child) -> Findings:
    """Judge how well this kernel confines a worker."""
    if child.told is None:
        yield Finding("fault", "sandbox", child.words, "workers cannot confine themselves", "journalctl -k | tail")
    elif not child.told:
        yield ok("sandbox", "this kernel confines workers in full")
    for words in child.told or []:
        what = str(words).partition(":")[0]
        mend = "a newer kernel confines it: apt full-upgrade"
        if "Landlock" in words:
            mend = f"a kernel from 5.13 on, with `lsm=landlock,...` if it is off: {CMDLINE}"
        yield Finding("warning", f"sandbox, {what}", words, "a hostile model is held back less", mend)


def of_state(state: Folder) -> Findings:
    """Judge the state folder and the disk it lies on."""
    if not state.there:
        mend = f"install -d -m 700 -o spillway -g spillway {state.path}   # systemd makes it at the first start"
        yield Finding("warning", "state folder", f"{state.path} is not there", "nothing has run here yet", mend)
        return
    if state.read_only:
        mend = "mount -o remount,rw on its file system; dmesg | tail tells why it is so"
        yield Finding("fault", "state folder", "its file system is read-only", "no version or request is kept", mend)
    elif not state.writable and state.owner == state.me:
        yield Finding("fault", "state folder", "may not be written", "no version is kept", f"chmod 700 {state.path}")
    elif state.mode & 0o022:
        why = "others could put models there"
        yield Finding("fault", "state folder", f"mode {state.mode:o}: others may write", why, f"chmod 700 {state.path}")
    elif state.in_memory:
        why = "models and queued requests are lost with each start"
        yield Finding(
            "warning", "state folder", f"{state.path} lies in memory", why, "name a folder on a disk: `state.directory`"
        )
    else:
        yield ok("state folder", f"{state.path}, of {state.owner}, mode {state.mode:o}")
    if state.free_mb < RESERVE_MB:
        mend = f"du -xh {state.path} / | sort -h | tail"
        yield Finding("fault", "disk", f"{state.free_mb} MiB free", "no new version fits", mend)
    elif state.free_nodes_share < LOW_NODES:
        told = f"{state.free_nodes_share:.0%} of its inodes are free"
        yield Finding(
            "fault",
            "disk",
            told,
            "no new file can be made",
            "find / -xdev -type f | cut -d/ -f2-4 | sort | uniq -c | sort -n | tail",
        )
    else:
        yield ok("disk", f"{state.free_mb} MiB free")


def of_keys(modes: Mapping[str, int | str]) -> Findings:
    """Judge the files with secrets; a mode, or why there is none."""
    for path, mode in modes.items():
        if isinstance(mode, str):
            yield Finding(
                "fault",
                f"key {path}",
                mode,
                "the agent does not start without",
                f"ls -l {path}   # see docs/operations.md",
            )
        elif mode & 0o077:
            yield Finding(
                "fault",
                f"key {path}",
                f"mode {mode:o}: others may read it",
                "whoever reads it can speak as this box",
                f"chmod 600 {path}",
            )
        else:
            yield ok(f"key {path}", f"mode {mode:o}")


def of_identity(child: Child, device: str, now_s: float) -> Findings:
    """Judge the certificate of the cloud link."""
    mend = f"spillway-fleet enrol {device} --out {device}   # on the admin's machine, and carry it over"
    if not child.told:
        why = "hand-offs cannot be signed"
        yield Finding("fault", "certificate", child.words, why, mend)
    elif device not in child.told["names"]:
        told = f"is of {', '.join(child.told['names'])}"
        yield Finding("fault", "certificate", told, f"gateways know this box as {device}", mend)
    elif child.told["ends"] < now_s:
        yield Finding("fault", "certificate", "has run out", "the cloud's broker and gateways refuse it", mend)
    elif child.told["ends"] < now_s + SOON_S:
        left = (child.told["ends"] - now_s) / 86_400
        yield Finding("warning", "certificate", f"runs out in {left:.0f} days", "then hand-offs stop", mend)
    else:
        yield ok("certificate", f"fits its key and {device}")


def of_broker(section: str, config: Config, problem: str) -> Findings:
    """Judge whether a broker takes the configured credentials."""
    link = config.local if section == "local" else config.cloud
    assert link is not None
    what, where = f"{section} broker", f"{link.host}:{link.port}"
    if not problem:
        yield ok(what, f"{where} takes this box")
        return
    why = "nobody can ask this box" if section == "local" else "nothing can be handed off, and no report gets out"
    mend = f"mosquitto_sub -h {link.host} -p {link.port} -t '$SYS/broker/version' -C 1 -d   # and its log"
    lower = problem.lower()
    if ("no such file" in lower and "/" in problem) or "permission denied" in lower:
        mend = f"mend the files that `{section}` names; run this as root"
    elif "refused:" in lower or "not authori" in lower or "bad user" in lower:
        mend = f"mend `{section}.username` and `{section}.password_file`, or the broker's user and access list"
    elif "certificate" in lower or "ssl" in lower or "tls" in lower:
        mend = f"`{section}.ca` is to be its certificate's authority, {link.host} a name in it, the clock right"
    elif "name or service" in lower or "name resolution" in lower or "getaddrinfo" in lower:
        mend = f"getent hosts {link.host}   # the name is not known here"
    elif "connection refused" in lower and link.host in {"127.0.0.1", "localhost", "::1"}:
        mend = "systemctl enable --now mosquitto"
    yield Finding("fault", what, f"{where}: {problem}", why, mend)


def of_unit(unit: Unit) -> Findings:
    """Judge the service."""
    if not unit.known:
        why, mend = "nothing starts the agent again", "systemd/README.md says what its unit does"
        yield Finding("warning", "service", "there is no systemd here", why, mend)
    elif unit.load != "loaded":
        mend = (
            "install -D -m 644 systemd/spillway.service /etc/systemd/system/spillway.service; systemctl daemon-reload"
        )
        yield Finding(
            "fault", "service", "spillway.service is not installed", "the agent does not start by itself", mend
        )
    elif unit.active != "active":
        mend = "systemctl start spillway; journalctl -u spillway -n 30"
        if unit.status == "78":
            mend = "spillway check --config /etc/spillway/spillway.toml   # then systemctl start spillway"
        yield Finding("fault", "service", f"is {unit.active}, last exit code {unit.status}", "nothing is served", mend)
    elif unit.enabled != "enabled":
        yield Finding(
            "warning", "service", f"is {unit.enabled}", "it does not start with the box", "systemctl enable spillway"
        )
    elif unit.restarts:
        told = f"was started again {unit.restarts} times"
        yield Finding(
            "warning", "service", told, "the agent ended when it should not", "journalctl -u spillway -p warning"
        )
    else:
        yield ok("service", "active and enabled")


def of_failures(failed: Sequence[tuple[str, str, str]]) -> Findings:
    """Judge versions that failed on this box: label, code, message."""
    for label, code, message in failed:
        why = "it is not tried here again"
        mend = "mend the model and publish it under a new version"
        yield Finding("warning", f"version {label}", f"{code}: {message}", why, mend)
