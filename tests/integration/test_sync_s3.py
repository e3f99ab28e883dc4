"""Sync and publish over S3: a real client against moto, and against a bucket that misbehaves (FAULTS A5-A7, A23)."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cloud_sync.errors import CloudError, ConflictError, FetchError, NotFoundError
from cloud_sync.objects import Objects, StorageSettings, read
from cloud_sync.objects_file import FileObjects
from cloud_sync.objects_open import open_objects
from cloud_sync.sync import sync_once
from cloud_sync.sync_settings import SyncOutcome, SyncSettings
from tests.fakes import buckets
from tests.fakes.buckets import Answer, FaultyBucket
from tests.fakes.fleets import Fleet, error_of, holds, outcome_of, sync
from tests.fakes.objects import MemoryObjects

FILES = {"model.onnx": os.urandom(200_000), "config.json": b"{}"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def storage(endpoint: str, tmp_path: Path) -> StorageSettings:
    """An empty bucket named `fleet`."""
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    name = "fleet"
    if any(bucket["Name"] == name for bucket in client.list_buckets()["Buckets"]):
        for found in client.list_objects_v2(Bucket=name).get("Contents", []):
            client.delete_object(Bucket=name, Key=found["Key"])
    else:
        client.create_bucket(Bucket=name)
    return StorageSettings(endpoint=endpoint, region="us-east-1", credentials=str(credentials))


@pytest.fixture(params=["memory", "file", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """Each way to keep objects, and the twin that the unit tests use."""
    if request.param == "memory":
        return MemoryObjects()
    if request.param == "file":
        return FileObjects(tmp_path / "repository")
    storage: StorageSettings = request.getfixturevalue("storage")
    return open_objects("s3://fleet/some/prefix", storage)


def test_an_object_is_read_as_it_was_written(objects: Objects, tmp_path: Path) -> None:
    etag = objects.put("a/b", b"0123456789")
    assert read(objects, "a/b", 10) == (b"0123456789", etag)
    assert b"".join(objects.get("a/b", start=2, length=3).chunks) == b"234"
    assert b"".join(objects.get("a/b", start=7).chunks) == b"789"
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    objects.put("a/c", tmp_path / "large")
    assert len(read(objects, "a/c", 100_000)[0]) == 100_000
    assert list(objects.names("a/")) == ["a/b", "a/c"]
    objects.delete("a/b")
    assert (objects.exists("a/b"), objects.exists("a/c")) == (False, True)


def test_an_object_over_its_limit_is_endless(objects: Objects) -> None:
    objects.put("key", b"0123456789")
    with pytest.raises(FetchError) as caught:
        read(objects, "key", 9)
    assert caught.value.code == "endless_data"


def test_what_is_not_there_is_not_found(objects: Objects) -> None:
    with pytest.raises(NotFoundError):
        objects.get("nothing")


def test_a_write_on_condition_has_one_winner(objects: Objects) -> None:
    first = objects.put("key", b"one", only_new=True)
    with pytest.raises(ConflictError):
        objects.put("key", b"two", only_new=True)
    second = objects.put("key", b"two", if_match=first)
    with pytest.raises(ConflictError):
        objects.put("key", b"three", if_match=first)
    assert read(objects, "key", 10) == (b"two", second)


def test_a_range_beyond_the_end_is_an_error(objects: Objects) -> None:
    objects.put("key", b"0123456789")
    with pytest.raises(FetchError):
        b"".join(objects.get("key", start=5, length=10).chunks)
    with pytest.raises(FetchError):
        b"".join(objects.get("key", start=50, length=10).chunks)


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a//b", "a\0b", ".spillway/lock"])
def test_a13_a_key_stays_inside_a_folder(tmp_path: Path, key: str) -> None:
    objects = FileObjects(tmp_path / "repository")
    with pytest.raises(FetchError):
        objects.put(key, b"x")
    assert not (tmp_path / "x").exists()


def options_of(storage: StorageSettings) -> tuple[str, ...]:
    return ("--endpoint", storage.endpoint, "--region", storage.region, "--credentials", storage.credentials)


def s3_settings(fleet: Fleet, storage: StorageSettings, device: str = "box-1") -> SyncSettings:
    return fleet.settings(device, endpoint=storage.endpoint, region=storage.region, credentials=storage.credentials)


def test_a_fleet_lives_in_a_bucket(tmp_path: Path, storage: StorageSettings) -> None:
    fleet = Fleet(tmp_path, "s3://fleet/spillway", *options_of(storage))
    fleet.publish("1", FILES)
    fleet.run("deploy", "all", "digits=1")
    code, events = sync(s3_settings(fleet, storage))
    assert code == 0
    assert holds(Path(outcome_of(events).models[0].folder), FILES)
    fleet.run("refresh")
    fleet.run("rotate", "timestamp")
    assert sync(s3_settings(fleet, storage))[0] == 0


def test_a_bucket_that_is_not_there_or_not_ours_is_named(tmp_path: Path, storage: StorageSettings) -> None:
    fleet = Fleet(tmp_path)
    for repository, code in (("s3://nobodys", "no_bucket"), ("s3://fleet/empty", "not_found")):
        settings = fleet.settings(repository=repository, endpoint=storage.endpoint, credentials=storage.credentials)
        assert error_of(sync(settings)[1]) == code
    settings = fleet.settings(repository="s3://fleet", endpoint=storage.endpoint, credentials="/nowhere")
    assert error_of(sync(settings)[1]) == "no_credentials"
    settings = fleet.settings(repository="s3://fleet", endpoint="http://127.0.0.1:9", credentials="anonymous")
    assert error_of(sync(settings)[1]) == "unreachable"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A fleet in a folder, one version deployed, that the faulty bucket serves."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    fleet.publish("1", FILES)
    fleet.run("deploy", "all", "digits=1")
    return fleet


@pytest.fixture
def bucket(published: Fleet) -> Iterator[FaultyBucket]:
    with FaultyBucket(published.objects).running() as bucket:
        yield bucket


def faulty(published: Fleet, bucket: FaultyBucket, state: Path, **changes: Any) -> SyncSettings:
    defaults: dict[str, Any] = {
        "repository": "s3://bucket",
        "endpoint": bucket.endpoint,
        "credentials": "anonymous",
        "attempts": 3,
    }
    return published.settings(state_dir=str(state), **{**defaults, **changes})


def here(settings: SyncSettings) -> SyncOutcome:
    """Run a pass in this process."""
    return sync_once(settings, Path(settings.state_dir))


def code_of(settings: SyncSettings) -> str:
    """Run a pass in this process and return the code of what went wrong."""
    try:
        error = here(settings).models[0].error
    except CloudError as caught:
        return caught.code
    return error.code if error else ""


PASSES: dict[str, Answer] = {
    "429": buckets.status(429, "TooManyRequests"),
    "500": buckets.status(500, "InternalError"),
    "503 SlowDown": buckets.status(503, "SlowDown"),
    "408": buckets.status(408, "RequestTimeout"),
    "200 with an error page": buckets.page_with_200,
    "200 in place of 206": buckets.whole_object,
    "206 with another range": buckets.wrong_range,
    "cut short": buckets.cut_short,
    "a shorter Content-Length": buckets.shorter_length,
    "no answer": buckets.hang_up,
}


@pytest.mark.parametrize("fault", PASSES.values(), ids=PASSES.keys())
def test_a23_a_fault_that_passes_costs_another_request(
    published: Fleet, bucket: FaultyBucket, tmp_path: Path, fault: Answer
) -> None:
    bucket.faults["packs/"] = [fault, fault]
    model = here(faulty(published, bucket, tmp_path / "state")).models[0]
    assert holds(Path(model.folder), FILES)


STAYS: dict[str, tuple[Answer, str]] = {
    "403": (buckets.status(403, "AccessDenied"), "forbidden"),
    "403 clock": (buckets.status(403, "RequestTimeTooSkewed"), "clock_skewed"),
    "404": (buckets.status(404, "NoSuchKey"), "not_found"),
    "412": (buckets.status(412, "PreconditionFailed"), "conflict"),
    "416": (buckets.status(416, "InvalidRange"), "out_of_range"),
    "429": (buckets.status(429, "TooManyRequests"), "slow_down"),
    "500": (buckets.status(500, "InternalError"), "server_error"),
    "503 SlowDown": (buckets.status(503, "SlowDown"), "slow_down"),
    "200 with an error page": (buckets.page_with_200, "arbitrary_software"),
    "206 with another range": (buckets.wrong_range, "wrong_range"),
    "no answer": (buckets.hang_up, "unreachable"),
    "another host": (buckets.elsewhere("http://127.0.0.1:9/bucket/x"), "refused"),
}


@pytest.mark.parametrize(("fault", "code"), STAYS.values(), ids=STAYS.keys())
def test_a23_a_fault_that_stays_is_named_and_nothing_is_visible(
    published: Fleet, bucket: FaultyBucket, tmp_path: Path, fault: Answer, code: str
) -> None:
    bucket.faults["packs/"] = [fault] * 20
    settings = faulty(published, bucket, tmp_path / "state")
    error = here(settings).models[0].error
    assert error is not None
    assert error.code == code
    assert not list((tmp_path / "state" / "versions").iterdir())
    bucket.faults.clear()
    assert here(settings).models[0].staged


def test_a23_a_redirect_sends_no_request_elsewhere(published: Fleet, bucket: FaultyBucket, tmp_path: Path) -> None:
    with FaultyBucket(published.objects).running() as other:
        bucket.faults["timestamp"] = [buckets.elsewhere(f"{other.endpoint}/bucket/metadata/timestamp.json")] * 9
        with pytest.raises(FetchError) as caught:
            here(faulty(published, bucket, tmp_path / "state"))
        assert caught.value.code == "refused"
        assert not other.asked


def test_a23_a_fetch_is_resumed_from_what_was_verified(published: Fleet, bucket: FaultyBucket, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "large")
    files = {"model.onnx": os.urandom((4 << 20) + 100_000)}
    fleet.publish("1", files)
    fleet.run("deploy", "all", "digits=1")
    bucket.folder = fleet.objects
    bucket.faults["packs/"] = [_cut_near_the_end, *[buckets.status(403, "AccessDenied")] * 3]
    settings = faulty(fleet, bucket, fleet.state())
    assert not here(settings).models[0].staged
    bucket.faults.clear()
    outcome = here(settings)
    assert outcome.bytes_in < 200_000
    assert holds(Path(outcome.models[0].folder), files)


def _cut_near_the_end(handler: buckets.Handler, data: bytes) -> None:
    handler.begin(206, Content_Length=len(data), Content_Range=f"bytes 0-{len(data) - 1}/{len(data)}")
    handler.wfile.write(data[:-50_000])
    handler.close_connection = True


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("timestamp", buckets.drip),
        ("1.sources", buckets.drip),
        ("packs/", buckets.drip),
        ("timestamp", buckets.drip_headers),
        ("packs/", buckets.drip_headers),
    ],
)
def test_a7_a_server_that_drips_is_given_up_and_named(
    published: Fleet, bucket: FaultyBucket, tmp_path: Path, key: str, fault: Answer
) -> None:
    bucket.faults[key] = [fault] * 9
    settings = faulty(published, bucket, tmp_path / "state", attempts=1, min_bytes_s=1024, slow_window_s=0.3)
    assert code_of(settings) == "slow_retrieval"
    bucket.faults.clear()
    assert here(faulty(published, bucket, tmp_path / "state")).models[0].staged


def peak_kb(settings: SyncSettings) -> tuple[int, str]:
    """Run a pass and return the most memory that any child of this process has used, and the last event."""
    events = sync(settings)[1]
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, repr(events[-1])


def test_a5_a6_endless_answers_stop_at_their_limit_in_little_memory(
    published: Fleet, bucket: FaultyBucket, tmp_path: Path
) -> None:
    before, _ = peak_kb(faulty(published, bucket, tmp_path / "right"))
    for key in ("timestamp", ".snapshot", ".targets", "1.sources"):
        bucket.faults[key] = [buckets.endless] * 9
        peak, last = peak_kb(faulty(published, bucket, tmp_path / f"state{key}", attempts=1))
        bucket.faults.clear()
        assert "endless_data" in last, key
        assert peak - before < 4 << 10, key
    bucket.faults["packs/"] = [buckets.endless] * 9
    peak, last = peak_kb(faulty(published, bucket, tmp_path / "packs", attempts=1))
    assert "wrong_range" in last
    assert peak - before < 4 << 10
