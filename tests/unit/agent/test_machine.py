from __future__ import annotations

import platform

import pytest

from agent.machine import box_facts


def test_a_box_tells_its_runtimes_and_its_memory() -> None:
    facts = box_facts()
    assert facts.backends["onnxruntime"].split(".")[0].isdigit()
    assert "litert" in facts.backends
    assert facts.memory_mb > 100


@pytest.mark.parametrize(("machine", "known"), [("arm64", "aarch64"), ("AMD64", "x86_64"), ("aarch64", "aarch64")])
def test_processors_have_one_name_each(machine: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert box_facts().architecture == known
