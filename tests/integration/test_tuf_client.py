"""The command that the public TUF conformance suite drives: a box's own verifier over plain HTTP."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cloud_sync.tuf_client import main
from tests.fakes.fleets import Fleet

TARGET = "deployments/all.json"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A fleet that has deployed one version."""
    fleet = Fleet(tmp_path)
    fleet.publish("1", {"model.onnx": b"graph"})
    fleet.run("deploy", "all", "digits=1")
    return fleet


@pytest.fixture
def address(fleet: Fleet) -> Iterator[str]:
    """Where the fleet's repository is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(fleet.objects))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(tmp_path: Path, address: str, *command: str) -> int:
    folders = {"--metadata-dir": tmp_path / "trusted", "--target-dir": tmp_path / "got"}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    named = [word for option, folder in folders.items() for word in (option, str(folder))]
    urls = ["--metadata-url", f"{address}/metadata/", "--target-base-url", f"{address}/targets/"]
    return main([*named, *urls, "--target-name", TARGET, *command])


def test_what_was_signed_is_fetched_and_kept_as_it_was_received(fleet: Fleet, address: str, tmp_path: Path) -> None:
    assert run(tmp_path, address, "init", str(fleet.folder / "home/root.json")) == 0
    assert run(tmp_path, address, "download") == 0
    kept = {path.name for path in (tmp_path / "trusted").glob("*.json")}
    assert kept == {"root.json", "timestamp.json", "snapshot.json", "targets.json", "deployments.json"}
    assert (tmp_path / "trusted/timestamp.json").read_bytes() == (
        fleet.objects / "metadata/timestamp.json"
    ).read_bytes()
    (got,) = (tmp_path / "got").iterdir()
    (signed,) = (fleet.objects / "targets/deployments").iterdir()
    assert got.read_bytes() == signed.read_bytes()


def test_what_was_not_signed_is_refused_with_1(
    fleet: Fleet, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, address, "init", str(fleet.folder / "home/root.json"))
    (signed,) = (fleet.objects / "targets/deployments").iterdir()
    signed.write_bytes(signed.read_bytes().replace(b"digits", b"widgit"))
    assert run(tmp_path, address, "download") == 1
    assert "deployments/all.json" in capsys.readouterr().err
    assert not list((tmp_path / "got").iterdir())


def test_a_repository_that_is_not_there_is_1(fleet: Fleet, tmp_path: Path) -> None:
    run(tmp_path, "http://127.0.0.1:1", "init", str(fleet.folder / "home/root.json"))
    assert run(tmp_path, "http://127.0.0.1:1", "refresh") == 1
