"""How a box's owner wants its runtimes to run, by the configuration's `[backends]`. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

Option = str | int | float | bool
ProviderName = Literal["acl", "cpu", "cuda", "migraphx", "openvino", "qnn", "tensorrt", "vitisai", "xnnpack"]


class OnnxSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """ONNX Runtime's execution providers in order of preference, the processor last, and options for each."""

    providers: list[ProviderName] = []
    options: dict[ProviderName, dict[str, Option]] = {}


class Delegate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A library that runs parts of a LiteRT graph on other hardware, and its options."""

    library: str
    options: dict[str, Option] = {}


class TfliteSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """LiteRT's delegates, tried in order; `xnnpack` is its own faster way on the processor."""

    delegates: list[Delegate] = []
    xnnpack: bool = True


class BackendSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of every runtime; `devices` (may hold `*`) and `reads` are what accelerators need open to workers."""

    onnx: OnnxSettings = OnnxSettings()
    tflite: TfliteSettings = TfliteSettings()
    devices: list[str] = []
    reads: list[str] = []


def option_text(value: Option) -> str:
    """Return an option's value as runtimes take it: true and false are 1 and 0."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def option_texts(options: Mapping[str, Option]) -> dict[str, str]:
    """Return options with their values as runtimes take them."""
    return {name: option_text(value) for name, value in options.items()}


def backends_problem(settings: BackendSettings) -> str | None:
    """Return what is wrong with the settings, beginning with the key at fault, or None."""
    unused = sorted(settings.onnx.options.keys() - set(settings.onnx.providers))
    if unused:
        return f"`backends.onnx.options.{unused[0]}` is for a provider that `backends.onnx.providers` does not name"
    for at, delegate in enumerate(settings.tflite.delegates):
        if not delegate.library.startswith("/"):
            return f"`backends.tflite.delegates[{at}].library` = {delegate.library!r}: must be a whole path"
    for at, path in enumerate(settings.devices):
        if not path.startswith("/dev/") or ".." in path:
            return f"`backends.devices[{at}]` = {path!r}: must begin with /dev/"
    for at, path in enumerate(settings.reads):
        if not path.startswith("/") or path == "/":
            return f"`backends.reads[{at}]` = {path!r}: must be a whole path, and not the root folder"
    return None
