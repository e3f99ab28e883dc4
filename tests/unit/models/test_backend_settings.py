from __future__ import annotations

import pytest

from cloud_sync.strict_toml import ConfigError, parse_toml
from models.backend_settings import (
    BackendSettings,
    Delegate,
    OnnxSettings,
    TfliteSettings,
    backends_problem,
    option_texts,
)


def test_options_reach_a_runtime_as_text() -> None:
    options = option_texts({"device_id": 0, "use_fp16": True, "off": False, "share": 0.5, "mode": "fast"})
    assert options == {"device_id": "0", "use_fp16": "1", "off": "0", "share": "0.5", "mode": "fast"}


def test_settings_are_read_as_the_owner_writes_them() -> None:
    settings = parse_toml(
        """
        devices = ["/dev/nvidia*"]
        reads = ["/usr/local/cuda"]
        [onnx]
        providers = ["tensorrt", "cuda", "cpu"]
        options.cuda = { gpu_mem_limit = 1073741824 }
        [[tflite.delegates]]
        library = "/usr/lib/libedgetpu.so.1"
        options = { device = "usb" }
        """,
        BackendSettings,
    )
    assert settings.onnx.options["cuda"] == {"gpu_mem_limit": 1 << 30}
    assert settings.tflite.delegates == [Delegate(library="/usr/lib/libedgetpu.so.1", options={"device": "usb"})]
    assert settings.tflite.xnnpack
    assert backends_problem(settings) is None


@pytest.mark.parametrize("text", ['[onnx]\nproviders = ["azure"]', "[onnx]\nprovider = []", "[tflite]\nxnnpack = 1"])
def test_a_word_that_means_nothing_here_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_toml(text, BackendSettings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (BackendSettings(onnx=OnnxSettings(options={"cuda": {}})), "`backends.onnx.options.cuda`"),
        (BackendSettings(devices=["/etc/shadow"]), "`backends.devices[0]`"),
        (BackendSettings(devices=["/dev/../etc/shadow"]), "`backends.devices[0]`"),
        (BackendSettings(reads=["/usr", "/"]), "`backends.reads[1]`"),
        (BackendSettings(reads=["here"]), "`backends.reads[0]`"),
    ],
)
def test_what_parses_but_cannot_be_meant_is_named(settings: BackendSettings, words: str) -> None:
    problem = backends_problem(settings)
    assert problem is not None
    assert problem.startswith(words)


def test_a_delegate_is_named_by_its_whole_path() -> None:
    tflite = TfliteSettings(delegates=[Delegate(library="libedgetpu.so.1")])
    assert "tflite.delegates[0].library" in str(backends_problem(BackendSettings(tflite=tflite)))
