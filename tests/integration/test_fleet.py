"""The admin's program against a folder: what it signs, what it refuses, and two admins at once."""

from __future__ import annotations

import json
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from agent.config import load_config
from cloud_sync.fleet.cli import _parser, main
from cloud_sync.fleet.home import Home
from cloud_sync.fleet.repository import edit, time_text
from cloud_sync.sync_settings import SyncOutcome
from models.manifest import parse_manifest
from tests.fakes.fleets import Fleet, error_of, outcome_of, sync

SAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"
FILES = {"model.onnx": b"model " * 3000, "config.json": b"{}"}


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_a_sample_model_is_published_deployed_and_staged_whole(fleet: Fleet) -> None:
    folder = SAMPLES / "digits"
    report = fleet.run("publish", str(folder), "--name", "digits", "--version", "1.0.0")
    fleet.run("deploy", "all", "digits=1.0.0")
    code, events = sync(fleet.settings())
    assert code == 0
    model = outcome_of(events).models[0]
    assert (model.digest, model.staged, model.variant) == (report["digest"], True, "default")
    staged = Path(model.folder)
    assert (staged / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert not (staged / "golden").exists()
    manifest = parse_manifest((staged / "manifest.json").read_bytes())
    assert len(manifest.golden) == 3
    assert "label" in bytes(manifest.golden[0].expected).decode()


def test_the_repository_lies_as_the_protocol_says(fleet: Fleet) -> None:
    digest = fleet.publish("1.0.0", FILES)
    fleet.run("deploy", "all", "digits=1.0.0")
    keys = {path.relative_to(fleet.objects).as_posix() for path in fleet.objects.rglob("*") if path.is_file()}
    assert f"targets/models/digits/{digest}.1.0.0.json" in keys
    assert {"metadata/timestamp.json", "metadata/1.root.json", "metadata/2.models.json"} <= keys
    pack = next(key for key in keys if key.startswith("packs/"))
    assert pack.split("/")[1] == pack.split("/")[2][:2]
    timestamp = json.loads((fleet.objects / "metadata/timestamp.json").read_bytes())["signed"]
    assert datetime.fromisoformat(timestamp["issued"]) <= datetime.now(UTC)


def test_keys_are_for_their_owner_alone(fleet: Fleet) -> None:
    fleet.run("enrol", "box-1", "--out", str(fleet.folder / "box"))
    fleet.run("pool-key", "main", "--out", str(fleet.folder / "main.json"))
    secrets = [*(fleet.folder / "home/keys").iterdir(), fleet.folder / "home/ca/ca.key"]
    for path in [*secrets, fleet.folder / "box/device.key", fleet.folder / "main.json"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_version_never_changes_and_may_be_published_again_as_it_is(fleet: Fleet) -> None:
    first = fleet.publish("1.0.0", FILES)
    assert fleet.publish("1.0.0", FILES) == first
    folder = fleet.model_folder({"model.onnx": b"other"}, "changed")
    code, report = fleet.ask("publish", str(folder), "--name", "digits", "--version", "1.0.0")
    assert code == 1
    assert "never changes" in report["error"]["message"]


def test_a_dry_run_leaves_the_repository_alone(fleet: Fleet) -> None:
    before = {path: path.read_bytes() for path in fleet.objects.rglob("*") if path.is_file()}
    folder = fleet.model_folder(FILES)
    report = fleet.run("publish", str(folder), "--name", "digits", "--version", "1.0.0", "--dry-run")
    assert not report["published"]
    assert {path: path.read_bytes() for path in fleet.objects.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ("task = 1", "task"),
        ('task = "tensor"', "is none of"),
        ('task = "tensors"\nformat = "pickle"', "pickle"),
        ('task = "tensors"\nformat = "onnx"\nsurprise = 1', "surprise"),
        ('task = "tensors"\nformat = "onnx"\n[[golden]]\ntolerance = 1.0', "one of file, text and json"),
        ('task = "tensors"\nformat = "onnx"\n[[golden]]\nfile = "../../x"\ncontent_type = "text/plain"', "outside"),
        ('task = "tensors"\nformat = "onnx"\n[[golden]]\ntext = "x"', "digits@1"),
        ("[", "spillway.toml"),
    ],
)
def test_a_description_that_is_wrong_is_refused_by_name(fleet: Fleet, description: str, says: str) -> None:
    folder = fleet.model_folder(FILES)
    (folder / "spillway.toml").write_text(description)
    code, report = fleet.ask("publish", str(folder), "--name", "digits", "--version", "1.0.0")
    assert code == 1
    assert says in report["error"]["message"]


def test_a14_links_are_not_published(fleet: Fleet) -> None:
    folder = fleet.model_folder(FILES)
    (folder / "weights").symlink_to("/etc/passwd")
    code, report = fleet.ask("publish", str(folder), "--name", "digits", "--version", "1.0.0")
    assert code == 1
    assert "link" in report["error"]["message"]
    (folder / "weights").unlink()
    (folder / "weights").hardlink_to(folder / "model.onnx")
    assert fleet.ask("publish", str(folder), "--name", "digits", "--version", "1.0.0")[0] == 1


def test_a_deployment_grows_and_remembers_what_ran_before(fleet: Fleet) -> None:
    for version in ("1", "2", "3"):
        fleet.publish(version, {"model.onnx": version.encode()})
    assert fleet.run("deploy", "all", "digits=1")["models"]["digits"]["previous"] is None
    raised = fleet.run("deploy", "all", "digits=2", "--share", "10")["models"]["digits"]
    assert (raised["previous"], raised["share"]) == ("1", 1000)
    whole = fleet.run("deploy", "all", "digits=2", "--share", "50")
    assert whole["models"]["digits"]["salt"] == raised["salt"]
    assert whole["sequence"] == 3
    assert fleet.run("deploy", "all", "digits=3")["models"]["digits"]["previous"] == "1"
    assert fleet.run("deploy", "all", "--halt", "digits")["models"]["digits"]["halt"]
    assert not fleet.run("deploy", "all", "--resume", "digits")["models"]["digits"]["halt"]
    assert not fleet.run("deploy", "all", "--remove", "digits")["models"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["all", "digits=9"], "not published"),
        (["all", "digits"], "NAME=VALUE"),
        (["All", "digits=1"], "no name"),
        (["all", "--halt", "digits"], "nothing named"),
        (["all", "--share", "101"], "between"),
        (["all", "--pool", "main=xyz"], "public key"),
    ],
)
def test_a_deployment_that_cannot_be_meant_is_refused(fleet: Fleet, arguments: list[str], says: str) -> None:
    code, report = fleet.ask("deploy", *arguments)
    assert code == 1
    assert says in report["error"]["message"]


def test_a_deployment_that_changes_nothing_is_not_signed(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.publish("1", {"model.onnx": b"1"})
    first = fleet.run("deploy", "all", "digits=1", "--share", "5")
    before = {path: path.read_bytes() for path in fleet.objects.rglob("*") if path.is_file()}
    again = fleet.run("deploy", "all", "digits=1", "--share", "5")
    assert "nothing to change" in again
    assert again["sequence"] == first["sequence"]
    assert {path: path.read_bytes() for path in fleet.objects.rglob("*") if path.is_file()} == before
    assert main(["deploy", "all", "--home", str(fleet.folder / "home")]) == 0
    out = capsys.readouterr().out
    assert "share: 5 %" in out
    assert "window" not in out


def test_every_command_and_option_says_what_it_does() -> None:
    commands = next(action for action in _parser()._actions if action.choices)
    assert isinstance(commands.choices, dict)
    for name, command in commands.choices.items():
        assert command.description, name
        assert [action.dest for action in command._actions if not action.help] == [], name


def test_pools_reach_the_box_with_their_keys(fleet: Fleet) -> None:
    key = fleet.run("pool-key", "main", "--out", str(fleet.folder / "main.json"))
    fleet.run("deploy", "all", "--pool", f"main={fleet.folder / 'main.json'}")
    pool = outcome_of(sync(fleet.settings())[1]).pools[0]
    assert (pool.name, pool.topic) == ("main", "spillway/handoff/main")
    assert (pool.keys[0].kid, pool.keys[0].key) == (key["kid"], key["public"])
    kept = json.loads((fleet.folder / "main.json").read_bytes())
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(kept["private"]))
    assert private.public_key().public_bytes_raw().hex() == key["public"]
    fleet.run("deploy", "all", "--remove-pool", "main")
    assert not outcome_of(sync(fleet.settings())[1]).pools


def test_an_enrolled_box_has_a_certificate_of_its_name_and_settings_that_parse(fleet: Fleet) -> None:
    out = fleet.folder / "box"
    fleet.run("enrol", "box-1", "--out", str(out), "--group", "all", "--broker", "broker.example", "--at", str(out))
    certificate = x509.load_pem_x509_certificate((out / "device.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((out / "ca.pem").read_bytes())
    certificate.verify_directly_issued_by(authority)
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "box-1"
    key = load_pem_private_key((out / "device.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == certificate.public_key()
    config = load_config(out / "spillway.toml")
    assert (config.device.name, config.device.groups) == ("box-1", ["all"])
    assert config.repository.url == fleet.repository
    assert fleet.ask("enrol", "box-1", "--out", str(out))[0] == 1
    assert fleet.ask("enrol", "fleet", "--out", str(out / "x"))[0] == 1


def test_two_admins_at_once_both_get_their_say(fleet: Fleet) -> None:
    folders = {name: fleet.model_folder({"model.onnx": name.encode()}, name) for name in ("one", "two", "three")}
    homes = {name: clone(fleet, name) for name in folders}

    def publish(name: str) -> None:
        main(["publish", "--home", str(homes[name]), str(folders[name]), "--name", name, "--version", "1"])

    threads = [threading.Thread(target=publish, args=(name,)) for name in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name.split("@")[0] for name in fleet.run("show")["models"]} == set(folders)


def clone(fleet: Fleet, name: str) -> Path:
    """Another admin's home, with the same keys."""
    source, target = fleet.folder / "home", fleet.folder / f"home-{name}"
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def test_an_admin_who_broke_off_before_the_timestamp_holds_up_nobody(fleet: Fleet) -> None:
    for orphan in ("metadata/2.models.json", "metadata/2.snapshot.json", "metadata/3.models.json"):
        (fleet.objects / orphan).write_bytes(b"left behind")
    fleet.publish("1.0.0", FILES)
    assert fleet.run("show")["roles"]["models"]["version"] == 4
    fleet.run("deploy", "all", "digits=1.0.0")
    assert sync(fleet.settings())[0] == 0


def test_an_admin_does_not_sign_above_an_older_state(fleet: Fleet) -> None:
    older = {path: path.read_bytes() for path in (fleet.objects / "metadata").iterdir()}
    fleet.publish("1.0.0", FILES)
    for path in (fleet.objects / "metadata").iterdir():
        path.unlink()
    for path, data in older.items():
        path.write_bytes(data)
    code, report = fleet.ask("deploy", "all")
    assert code == 1
    assert report["error"]["code"] == "rollback"


def test_refreshing_lets_frozen_boxes_go_on(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, "", "--timestamp-days", "1")
    in_two_days = fleet.settings(built=time_text(datetime.now(UTC) + timedelta(days=2)))
    assert error_of(sync(in_two_days)[1]) == "freeze"
    config = tmp_path / "home" / "fleet.json"
    config.write_text(config.read_text().replace('"timestamp": 1', '"timestamp": 7'))
    assert fleet.run("refresh")["renewed"] == ["snapshot", "timestamp"]
    assert isinstance(sync(in_two_days)[1][-1], SyncOutcome)


def test_refreshing_renews_roles_that_have_little_life_left(fleet: Fleet) -> None:
    config = fleet.folder / "home" / "fleet.json"
    config.write_text(config.read_text().replace('"deployments": 365', '"deployments": 3650'))
    (fleet.folder / "home/keys/models.pem").unlink()
    config.write_text(config.read_text().replace('"models": 365', '"models": 3650'))
    report = fleet.run("refresh")
    assert report["renewed"] == ["snapshot", "timestamp", "deployments"]
    assert report["keys_missing"] == ["models"]
    left = datetime.fromisoformat(fleet.run("show")["roles"]["deployments"]["expires"]) - datetime.now(UTC)
    assert left > timedelta(days=3600)


@pytest.mark.parametrize("role", ["root", "targets", "models", "deployments", "snapshot", "timestamp"])
def test_a_rotated_key_is_followed_and_the_old_one_worth_nothing(fleet: Fleet, role: str) -> None:
    fleet.publish("1.0.0", FILES)
    fleet.run("deploy", "all", "digits=1.0.0")
    assert sync(fleet.settings())[0] == 0
    old = (fleet.folder / "home/keys" / f"{role}.pem").read_bytes()
    report = fleet.run("rotate", role)
    assert report["old"] != report["new"]
    fleet.publish("2.0.0", {"model.onnx": b"two"})
    fleet.run("deploy", "all", "digits=2.0.0")
    assert sync(fleet.settings())[0] == 0
    assert sync(fleet.settings("box-2"))[0] == 0
    (fleet.folder / "home/keys" / f"{role}.pem").write_bytes(old)
    if role not in {"root", "targets", "models"}:
        fleet.ask("deploy", "all", "digits=1.0.0")
        assert error_of(sync(fleet.settings())[1]) == "bad_signature"


def test_a_clock_that_is_behind_the_last_signature_signs_nothing(fleet: Fleet) -> None:
    home = Home(fleet.folder / "home")
    with pytest.raises(Exception, match="clock is behind"):
        edit(home, lambda draft: None, now=lambda: datetime(2026, 11, 1, tzinfo=UTC))


def test_a_home_and_a_repository_hold_one_fleet(fleet: Fleet) -> None:
    assert fleet.ask("init", "--repository", fleet.repository)[0] == 1
    code, report = fleet.ask("init", "--repository", fleet.repository, home="other")
    assert code == 1
    assert "another fleet" in report["error"]["message"]


def test_an_init_that_broke_off_goes_on(fleet: Fleet) -> None:
    home = fleet.folder / "broken"
    blocked = fleet.folder / "blocked"
    blocked.write_text("in the way")
    arguments = ["init", "--home", str(home), "--repository", f"file://{blocked}/repository"]
    assert main(arguments) == 1
    blocked.unlink()
    assert main(arguments) == 0


def test_a_home_that_is_none_says_how_to_make_one(fleet: Fleet) -> None:
    code, report = fleet.ask("show", home="nowhere")
    assert code == 1
    assert "spillway-fleet init" in report["error"]["message"]


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_show_speaks_to_people_and_machines(
    fleet: Fleet, capsys: pytest.CaptureFixture[str], json_option: list[str]
) -> None:
    fleet.publish("1.0.0", FILES)
    assert main(["show", "--home", str(fleet.folder / "home"), *json_option]) == 0
    out = capsys.readouterr().out
    assert "digits@1.0.0" in out
    report: Any = json.loads(out) if json_option else None
    assert report is None or report["roles"]["root"]["version"] == 1
