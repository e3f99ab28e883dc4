"""Frames come whole and right from storage that breaks off, lies or is slow (FAULTS A6, A7, A23)."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from cloud_sync.errors import CloudError, FetchError, NotFoundError, TrustError
from cloud_sync.fetch import fetch_parts
from cloud_sync.frames import CODECS, sha256_of
from cloud_sync.objects import Blob, read
from cloud_sync.pace import Paced
from cloud_sync.retry import Retry
from cloud_sync.sources import (
    GAP_BYTES,
    RANGE_BYTES,
    Entry,
    Part,
    choose_parts,
    pack_key,
    parse_sources,
    plan_ranges,
    sources_bytes,
)
from models.manifest import manifest_bytes
from tests.fakes.artifacts import manifest_of, pack_of
from tests.fakes.objects import MemoryObjects, breaks_off, endless, fails, gives

FRAMES = [bytes([number]) + f"frame {number} ".encode() * (50 + number) for number in range(20)]
FILE = b"".join(FRAMES)
UNREACHABLE = FetchError("unreachable", "cut")


class Bucket:
    """A pack of twenty frames, and what a fetch of it gave."""

    def __init__(self) -> None:
        self.objects = MemoryObjects()
        self.files = {str(number): frame for number, frame in enumerate(FRAMES)}
        manifest = manifest_bytes(manifest_of(self.files))
        self.sources = pack_of(self.objects, self.files, manifest, 1 << 20)
        self.pack = next(iter(self.objects.held))
        self.parts = choose_parts(self.sources, {sha256_of(frame): len(frame) for frame in FRAMES}, CODECS)
        self.pauses: list[float] = []
        self.got: dict[str, bytes] = {}

    def fetch(self, *, attempts: int = 4) -> None:
        retry = Retry(attempts=attempts, base_s=1.0, sleep=self.pauses.append, random=lambda: 1.0)
        for part, frame in fetch_parts(self.objects, self.parts, retry):
            assert frame is not None
            assert part.frame not in self.got, "a frame came twice"
            self.got[part.frame] = frame

    def is_whole(self) -> bool:
        return self.got == {sha256_of(frame): frame for frame in FRAMES}


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


def test_neighbouring_frames_come_in_one_request(bucket: Bucket) -> None:
    bucket.fetch()
    assert bucket.is_whole()
    assert len(bucket.objects.asked) == 1


@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 1 << 20])
def test_frames_do_not_depend_on_how_the_bytes_arrive(bucket: Bucket, chunk_bytes: int) -> None:
    bucket.objects.chunk_bytes = chunk_bytes
    bucket.fetch()
    assert bucket.is_whole()


def test_a23_a_request_that_breaks_off_is_resumed_at_the_first_missing_frame(bucket: Bucket) -> None:
    bucket.objects.chunk_bytes = 10
    bucket.objects.faults[bucket.pack] = [breaks_off(300, UNREACHABLE), breaks_off(300, UNREACHABLE)]
    bucket.fetch()
    assert bucket.is_whole()
    starts = [start for _, start, _ in bucket.objects.asked]
    assert starts == sorted(starts)
    assert starts[1] > 0


def test_a23_progress_resets_the_count_of_failures(bucket: Bucket) -> None:
    bucket.objects.chunk_bytes = 10
    bucket.objects.faults[bucket.pack] = [breaks_off(100, UNREACHABLE)] * 10
    bucket.fetch(attempts=2)
    assert bucket.is_whole()


@pytest.mark.parametrize("code", ["slow_down", "server_error", "unreachable", "wrong_range", "truncated"])
def test_a23_what_may_pass_is_tried_again_with_longer_pauses(bucket: Bucket, code: str) -> None:
    bucket.objects.faults[bucket.pack] = [fails(FetchError(code, "fault"))] * 3
    bucket.fetch()
    assert bucket.is_whole()
    assert bucket.pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "error", [FetchError("forbidden", "403"), FetchError("out_of_range", "416"), NotFoundError("k")]
)
def test_a23_what_will_not_pass_is_not_tried_again(bucket: Bucket, error: FetchError) -> None:
    bucket.objects.faults[bucket.pack] = [fails(error)]
    with pytest.raises(FetchError) as caught:
        bucket.fetch()
    assert caught.value.code == error.code
    assert not bucket.pauses


def test_a23_failures_without_progress_end(bucket: Bucket) -> None:
    bucket.objects.faults[bucket.pack] = [fails(UNREACHABLE)] * 9
    with pytest.raises(FetchError):
        bucket.fetch(attempts=4)
    assert len(bucket.objects.asked) == 4


def test_a23_an_error_page_in_place_of_bytes_costs_one_more_request(bucket: Bucket) -> None:
    page = b"<?xml version='1.0'?><Error><Code>InternalError</Code></Error>" * 400
    bucket.objects.faults[bucket.pack] = [gives(page)]
    bucket.fetch()
    assert bucket.is_whole()


def test_a1_bytes_that_stay_wrong_are_arbitrary_software(bucket: Bucket) -> None:
    data = bytearray(bucket.objects.held[bucket.pack])
    data[200] ^= 1
    bucket.objects.held[bucket.pack] = bytes(data)
    with pytest.raises(TrustError) as caught:
        bucket.fetch()
    assert caught.value.code == "arbitrary_software"
    assert all(sha256_of(frame) == name for name, frame in bucket.got.items())


def test_a1_stored_bytes_are_checked_before_a_decoder_sees_them(bucket: Bucket) -> None:
    part = bucket.parts[0]
    wrong = Entry(part.entry.pack, part.entry.offset, part.entry.stored, "0" * 64, "lzma")
    bucket.parts = [Part(part.frame, part.length, wrong)]
    with pytest.raises(CloudError) as caught:
        bucket.fetch()
    assert caught.value.code == "arbitrary_software"


def test_a1_a_frame_is_checked_after_its_decoder_too(bucket: Bucket) -> None:
    one, other = bucket.parts[:2]
    bucket.parts = [Part(other.frame, one.length, one.entry)]
    with pytest.raises(CloudError) as caught:
        bucket.fetch()
    assert caught.value.code == "arbitrary_software"
    assert not bucket.got


def test_a6_an_endless_pack_costs_no_more_than_was_asked_for(bucket: Bucket) -> None:
    bucket.objects.faults[bucket.pack] = [endless] * 4
    with pytest.raises(TrustError):
        bucket.fetch()


def part_at(offset: int, stored: int, pack: str = "a" * 64) -> Part:
    return Part(f"{offset:064x}", stored, Entry(pack, offset, stored, "0" * 64, "raw"))


def test_small_gaps_are_read_over_and_large_ones_are_not() -> None:
    ranges = plan_ranges([part_at(0, 10), part_at(10 + GAP_BYTES, 10), part_at(1 << 20, 10), part_at(0, 5, "b" * 64)])
    assert [(one.pack[0], one.start, one.end) for one in ranges] == [
        ("a", 0, 20 + GAP_BYTES),
        ("a", 1 << 20, (1 << 20) + 10),
        ("b", 0, 5),
    ]


def test_a_request_asks_for_a_bounded_length() -> None:
    ranges = plan_ranges([part_at(number << 22, 1 << 22) for number in range(40)])
    assert all(one.end - one.start <= RANGE_BYTES for one in ranges)
    assert sum(len(one.parts) for one in ranges) == 40


def test_sources_survive_their_bytes(bucket: Bucket) -> None:
    assert parse_sources(sources_bytes(bucket.sources)) == bucket.sources


def test_the_smallest_entry_with_a_known_codec_is_chosen() -> None:
    entries = [Entry("a" * 64, 0, 50, "0" * 64, codec) for codec in ("raw", "delta-f4")]
    better = Entry("b" * 64, 9, 40, "0" * 64, "zstd")
    sources = parse_sources(sources_bytes(type(Bucket().sources)(1, "0" * 64, {"f" * 64: [*entries, better]})))
    assert choose_parts(sources, {"f" * 64: 60}, CODECS)[0].entry == better
    with pytest.raises(TrustError):
        choose_parts(sources, {"e" * 64: 60}, CODECS)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"schema": 2}', "unknown_schema"),
        (b"{}", "bad_metadata"),
        (b'{"schema": 1, "manifest": "", "frames": {"../x": []}}', "bad_metadata"),
        (
            b'{"schema": 1, "manifest": "", "frames": {"%s": [{"pack": "../x", "offset": 0, "stored": 1,'
            b' "sha256": "%s", "codec": "raw"}]}}' % (b"0" * 64, b"0" * 64),
            "bad_metadata",
        ),
    ],
)
def test_sources_that_break_the_format_are_refused(raw: bytes, code: str) -> None:
    with pytest.raises(TrustError) as caught:
        parse_sources(raw)
    assert caught.value.code == code


class Drip(MemoryObjects):
    """Gives a byte, and then nothing until the test ends."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> Blob:
        def chunks() -> Generator[bytes]:
            yield b"x"
            self.over.wait(10)

        return Blob("etag", chunks())


def test_a7_a_drip_is_given_up_and_named() -> None:
    drip = Drip()
    paced = Paced(drip, min_bytes_s=1024, window_s=0.05)
    with pytest.raises(FetchError) as caught:
        read(paced, "key", 1000)
    assert caught.value.code == "slow_retrieval"
    assert paced.bytes_in == 1
    drip.over.set()


def test_a_paced_store_gives_what_the_inner_one_gives_and_counts(bucket: Bucket) -> None:
    paced = Paced(bucket.objects, min_bytes_s=1024, window_s=60)
    data, etag = read(paced, bucket.pack, 1 << 20)
    assert data == bucket.objects.held[bucket.pack]
    assert etag == bucket.objects.get(bucket.pack).etag
    assert paced.bytes_in == len(data)
    with pytest.raises(NotFoundError):
        read(paced, "nothing", 10)


def test_a_pack_lies_under_its_first_two_digits() -> None:
    assert pack_key("ab" + "0" * 62) == "packs/ab/ab" + "0" * 62
