"""What a fleet is told of a box, and that it fits into a message whatever there is to tell."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_sync.report import (
    FIGURES_S,
    GAP_S,
    MAX_FAILED,
    MAX_REPORT_BYTES,
    Bytes,
    FailedVersion,
    ModelReport,
    Pacer,
    Report,
    RepositoryReport,
    facts_of,
    report_bytes,
)

PAGE = Path(__file__).resolve().parents[3] / "docs" / "protocol.md"


def report(models: int = 1, words: str = "no such pack", failed: int = 1) -> Report:
    return Report(
        device="kitchen",
        state="online",
        software="0.1.0",
        models={
            f"m{n}": ModelReport("serving", "1", "0" * 64, code="x" * (n % 2), message=words) for n in range(models)
        },
        failed=[FailedVersion(f"{n:064x}", "rolled_back", words, f"digits@{n}") for n in range(failed)],
        repository=RepositoryReport(issued="2026-11-22T00:00:00Z", metadata_versions={"root": 1}),
        bytes=Bytes(1, 2, 3),
    )


def test_a_report_holds_versions_states_failures_with_their_codes_and_byte_counts() -> None:
    told = msgspec.json.decode(report_bytes(report()))
    assert told["models"]["m0"] == {"state": "serving", "version": "1", "digest": "0" * 64, "message": "no such pack"}
    assert told["failed"][0]["code"] == "rolled_back"
    assert told["bytes"] == {"fetched": 1, "handed_off": 2, "answered": 3}
    assert (told["schema"], told["device"], told["state"], told["left_out"]) == (1, "kitchen", "online", 0)


def test_the_protocol_page_names_every_member_of_a_report() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE.read_text("utf-8")))
    for kind in (Report, RepositoryReport, Bytes, FailedVersion, ModelReport):
        assert {field.name for field in msgspec.structs.fields(kind)} <= named, kind


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1500), st.text(max_size=3000), st.integers(0, 100))
def test_a_report_is_whole_json_within_its_bound_whatever_there_is_to_tell(
    models: int, words: str, failed: int
) -> None:
    full = report(models, words, failed)
    raw = report_bytes(full)
    assert len(raw) <= MAX_REPORT_BYTES
    told = msgspec.json.decode(raw, type=Report)
    assert len(told.models) + len(told.failed) + told.left_out >= models + min(failed, MAX_FAILED)
    assert len(full.models) == models


def test_what_is_well_is_left_out_before_what_failed() -> None:
    told = msgspec.json.decode(report_bytes(report(models=600), max_bytes=50_000), type=Report)
    assert told.left_out > 0
    assert told.models
    assert all(model.code for model in told.models.values())


def test_shortened_words_say_that_they_are() -> None:
    told = msgspec.json.decode(report_bytes(report(words="w" * 10_000)), type=Report)
    assert told.models["m0"].message.endswith("w…")


def test_a_change_is_told_at_once_but_never_two_within_the_gap() -> None:
    pacer, facts = Pacer(), facts_of(report())
    assert pacer.wait_s(0.0, facts) == 0
    pacer.told(0.0, facts)
    assert pacer.wait_s(1.0, facts) is None
    assert pacer.wait_s(1.0, b"other") == GAP_S - 1
    assert pacer.wait_s(GAP_S, b"other") == 0
    assert pacer.wait_s(FIGURES_S, facts) == 0
    pacer.forget()
    assert pacer.wait_s(GAP_S, facts) == 0


def test_counts_of_bytes_alone_are_no_news() -> None:
    busy = report()
    busy.bytes = Bytes(10**9, 1, 1)
    assert facts_of(busy) == facts_of(report())
