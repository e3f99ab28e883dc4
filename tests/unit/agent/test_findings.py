from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import findings, probes
from agent.board import Heat
from agent.config import parse_config
from agent.doctor import render
from agent.exits import at_rest
from agent.findings import Finding
from agent.probes import Child, Folder, Machine, Unit
from models.backend_settings import BackendSettings

MACHINE = Machine(
    bits=64,
    architecture="aarch64",
    system="Linux",
    python=(3, 11),
    model="Raspberry Pi 5",
    memory_mb=8000,
    free_mb=6000,
    swap_mb=200,
    swap_used_mb=0,
    shm_free_mb=4000,
    memory_limits=True,
    overcommit=0,
    heat=Heat(celsius=50.0),
    synchronized=True,
    now_s=1_800_000_000.0,
    built_s=1_790_000_000.0,
    jetson=False,
    libraries=[],
    corals=[],
)
GOOD = Child(told={"version": "2.4.0", "providers": ["CPUExecutionProvider"]})
ABSENT = Child(code=1, words="ModuleNotFoundError: No module named 'x'")
ALL = dict.fromkeys(
    (
        "onnxruntime",
        "ai_edge_litert",
        "tflite_runtime",
        "llguidance",
        "numpy",
        "tokenizers",
        "PIL",
        "tuf",
        "boto3",
    ),
    GOOD,
)
CONFIG = parse_config(
    """
[device]
name = "kitchen"
certificate = "/run/credentials/spillway.service/keys_device.pem"
key = "/run/credentials/spillway.service/keys_device.key"
[local]
password_file = "/run/credentials/spillway.service/keys_local-password"
[cloud]
host = "mqtt.example.org"
[repository]
url = "file:///srv/models"
"""
)


def bad(found: Any) -> list[Finding]:
    """What is not right; each says why and what to do."""
    wrong = [one for one in found if one.level != "ok"]
    assert all(one.why and one.mend for one in wrong)
    return wrong


def test_a_board_that_is_well_has_nothing_to_mend() -> None:
    assert bad(findings.of_machine(MACHINE)) == []
    assert bad(findings.of_runtimes(ALL, writes_text=True)) == []


@pytest.mark.parametrize(
    ("facts", "level", "what", "word"),
    [
        ({"bits": 32, "architecture": "armv7l"}, "fault", "processor", "64-bit"),
        ({"bits": 32}, "fault", "processor", "64-bit"),
        ({"python": (3, 10)}, "fault", "python", "venv"),
        ({"python": (3, 15)}, "fault", "python", "venv"),
        ({"free_mb": 100}, "warning", "memory", "systemctl"),
        ({"swap_used_mb": 150}, "warning", "swap", "free -m"),
        ({"memory_limits": False}, "warning", "memory limits", "cgroup_enable=memory"),
        ({"overcommit": 2}, "warning", "overcommit", "sysctl"),
        ({"shm_free_mb": 1}, "warning", "/dev/shm", "remount"),
        ({"heat": Heat(celsius=85.0)}, "warning", "heat", "fan"),
        ({"heat": Heat(throttled=["throttled"])}, "warning", "heat", "fan"),
        ({"heat": Heat(throttled=["under-voltage"])}, "warning", "power", "power supply"),
        ({"synchronized": False}, "warning", "clock", "set-ntp"),
        ({"now_s": 0.0}, "fault", "clock", "set-ntp"),
    ],
)
def test_what_is_wrong_with_a_machine_is_one_finding_with_what_to_type(
    facts: dict[str, Any], level: str, what: str, word: str
) -> None:
    (found,) = bad(findings.of_machine(msgspec.structs.replace(MACHINE, **facts)))
    assert (found.level, found.what) == (level, what)
    assert word in found.mend


@pytest.mark.parametrize(
    ("children", "what", "told", "word"),
    [
        ({"onnxruntime": ABSENT}, "onnxruntime", "not installed", "pip install onnxruntime"),
        ({"onnxruntime": Child(code=-4)}, "onnxruntime", "instructions that this processor does not have", "VERSION"),
        ({"ai_edge_litert": ABSENT, "tflite_runtime": ABSENT}, "ai-edge-litert", "not installed", "ai-edge-litert"),
        ({"ai_edge_litert": Child(code=-4), "tflite_runtime": ABSENT}, "ai-edge-litert", "processor", "tflite.txt"),
        ({"ai_edge_litert": ABSENT}, "tflite-runtime", "beside numpy 2.4.0", "numpy<2"),
        ({"llguidance": ABSENT}, "llguidance", "not installed", "llguidance"),
        ({"tuf": Child(code=1, words="ImportError: libx.so")}, "tuf", "ImportError: libx.so", "tuf~=7.0"),
    ],
)
def test_a_runtime_that_is_missing_or_broken_is_told_with_its_package(
    children: dict[str, Child], what: str, told: str, word: str
) -> None:
    (found,) = bad(findings.of_runtimes({**ALL, **children}, writes_text=True))
    assert found.what == what
    assert told in found.told
    assert word in found.mend


def test_an_old_litert_beside_an_old_numpy_is_right_and_llguidance_is_for_models_that_write_text() -> None:
    old = Child(told={"version": "1.26.4"})
    assert bad(findings.of_runtimes({**ALL, "ai_edge_litert": ABSENT, "numpy": old}, writes_text=False)) == []
    assert bad(findings.of_runtimes({**ALL, "llguidance": ABSENT}, writes_text=False)) == []


def accelerators(
    machine: Machine = MACHINE, settings: Any = None, offered: Child = GOOD, **loaded: Child
) -> list[Finding]:
    backends = msgspec.convert(settings or {}, BackendSettings)
    return bad(findings.of_accelerators(machine, backends, offered, loaded))


def test_what_is_configured_and_not_offered_is_a_fault() -> None:
    assert accelerators() == []
    (found,) = accelerators(settings={"onnx": {"providers": ["cuda", "cpu"]}})
    assert (found.what, found.level) == ("provider cuda", "fault")
    (found,) = accelerators(libedge=Child(code=1, words="OSError: no such library"))
    assert (found.what, found.level) == ("delegate libedge", "fault")


def test_an_accelerator_that_is_there_and_unused_is_a_warning_with_what_to_write() -> None:
    (found,) = accelerators(msgspec.structs.replace(MACHINE, corals=["USB 1-1"]))
    assert "libedgetpu1-std" in found.mend
    jetson = msgspec.structs.replace(MACHINE, jetson=True)
    (found,) = accelerators(jetson)
    assert "no CUDA, and libcudart, libcudnn, libnvinfer" in found.told.replace(",libcudnn,", ", libcudnn, ")
    cuda = Child(told={"providers": ["CUDAExecutionProvider"]})
    (found,) = accelerators(jetson, offered=cuda)
    assert "backends.onnx.providers" in found.mend
    assert accelerators(jetson, {"onnx": {"providers": ["cuda"]}}, cuda) == []


def test_a_clock_behind_what_the_fleet_signed_is_a_fault(tmp_path: Path) -> None:
    assert probes.signed_at(tmp_path) == ""
    (tmp_path / "trust").mkdir()
    (tmp_path / "trust" / "floor-a.json").write_text('sum\n[{"issued": "2026-01-02T03:04:05Z"}, {"issued": ""}]')
    issued = probes.signed_at(tmp_path)
    (found,) = bad(findings.of_signed_time(issued, 1_000_000_000.0))
    assert "2026-01-02" in found.told
    assert bad(findings.of_signed_time(issued, 1_800_000_000.0)) == []
    assert bad(findings.of_signed_time("", 0.0)) == []


def test_what_the_kernel_lacks_to_confine_workers_is_told() -> None:
    assert bad(findings.of_sandbox(Child(told=[]))) == []
    (found,) = bad(findings.of_sandbox(Child(told=["files: this kernel has no Landlock, or it is switched off"])))
    assert (found.level, found.what) == ("warning", "sandbox, files")
    assert "lsm=landlock" in found.mend
    (found,) = bad(findings.of_sandbox(Child(code=1, words="PermissionError")))
    assert found.level == "fault"


STATE = Folder(path="/s", there=True, owner="spillway", me="root", mode=0o700, writable=True, free_mb=9000)


@pytest.mark.parametrize(
    ("facts", "what", "word"),
    [
        ({"there": False}, "state folder", "install -d"),
        ({"read_only": True}, "state folder", "remount,rw"),
        ({"writable": False, "me": "spillway"}, "state folder", "chmod"),
        ({"mode": 0o777}, "state folder", "chmod 700"),
        ({"in_memory": True}, "state folder", "state.directory"),
        ({"free_mb": 10}, "disk", "du -xh"),
        ({"free_nodes_share": 0.001}, "disk", "find"),
    ],
)
def test_what_is_wrong_with_the_state_folder_is_told(facts: dict[str, Any], what: str, word: str) -> None:
    assert bad(findings.of_state(STATE)) == []
    (found,) = bad(findings.of_state(msgspec.structs.replace(STATE, **facts)))
    assert found.what == what
    assert word in found.mend


def test_keys_that_others_may_read_and_certificates_that_end_are_told() -> None:
    found = bad(findings.of_keys({"/k/a": 0o600, "/k/b": 0o640, "/k/c": "No such file or directory"}))
    assert [(one.what, one.level) for one in found] == [("key /k/b", "fault"), ("key /k/c", "fault")]
    day = 86_400.0

    def certificate(**facts: Any) -> list[Finding]:
        return bad(findings.of_identity(Child(told={"names": ["kitchen"], "ends": 100 * day, **facts}), "kitchen", day))

    assert certificate() == []
    assert [one.told for one in certificate(names=["garage"])] == ["is of garage"]
    assert [one.told for one in certificate(ends=0.0)] == ["has run out"]
    assert [one.level for one in certificate(ends=11 * day)] == ["warning"]
    assert len(bad(findings.of_identity(Child(code=1, words="no key"), "kitchen", 0.0))) == 1


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        ("refused: Not authorized", "password_file"),
        ("[Errno 111] Connection refused", "mosquitto"),
        ("certificate verify failed: unable to get local issuer certificate", "`local.ca`"),
        ("[Errno -2] Name or service not known", "getent"),
        ("[Errno 2] No such file or directory: '/x'", "root"),
        ("no answer within 8 s", "mosquitto_sub"),
    ],
)
def test_a_broker_that_does_not_take_the_box_is_told_with_what_fits_its_reason(problem: str, word: str) -> None:
    assert bad(findings.of_broker("local", CONFIG, "")) == []
    (found,) = bad(findings.of_broker("local", CONFIG, problem))
    assert found.what == "local broker"
    assert problem in found.told
    assert word in found.mend


@pytest.mark.parametrize(
    ("unit", "level", "word"),
    [
        (Unit(), "warning", "systemd"),
        (Unit(known=True, load="not-found"), "fault", "install"),
        (Unit(known=True, load="loaded", active="failed", status="78"), "fault", "spillway check"),
        (Unit(known=True, load="loaded", active="inactive", status="0"), "fault", "systemctl start"),
        (Unit(known=True, load="loaded", active="active", enabled="disabled"), "warning", "enable"),
        (Unit(known=True, load="loaded", active="active", enabled="enabled", restarts=3), "warning", "journalctl"),
    ],
)
def test_a_service_that_does_not_run_as_it_should_is_told(unit: Unit, level: str, word: str) -> None:
    (found,) = bad(findings.of_unit(unit))
    assert found.level == level
    assert word in found.mend


def test_a_service_that_runs_is_right_and_a_version_that_failed_is_told() -> None:
    assert bad(findings.of_unit(Unit(known=True, load="loaded", active="active", enabled="enabled"))) == []
    (found,) = bad(findings.of_failures([("digits@2", "trial_failed", "too slow")]))
    assert "trial_failed: too slow" in found.told


def test_credentials_of_the_service_are_looked_for_where_systemd_takes_them_from() -> None:
    there = at_rest(CONFIG)
    assert there.device.key == "/etc/spillway/keys/device.key"
    assert there.local.password_file == "/etc/spillway/keys/local-password"
    assert Path(there.device.certificate).name == "device.pem"


def test_people_read_each_finding_with_its_reason_and_remedy_and_a_sum() -> None:
    shown = render([findings.ok("python", "3.11"), Finding("fault", "disk", "full", "no room", "rm it")])
    assert shown.splitlines() == [
        "ok      python: 3.11",
        "FAULT   disk: full",
        "        no room",
        "        > rm it",
        "",
        "1 faults, 0 warnings",
    ]
