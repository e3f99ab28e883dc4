"""Golden questions for a model that came without any: a sentence, a picture, a sound, numbers.

Pure: no I/O, no clock.
"""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from models.body import JSON, TEXT
from models.manifest import Golden
from models.request import GraphInput

SENTENCE: Final = "The river rose by two metres overnight, and the bridge near the old mill was closed."
SHORT: Final = "Good morning."
OUR_TEXTS: Final = frozenset({SHORT.encode(), SENTENCE.encode()})
_DATATYPES: Final = {
    "bool": "BOOL",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_TEXTS: Final = frozenset(
    {"text-classification", "token-classification", "feature-extraction", "translation", "summarization"}
)
_PICTURES: Final = frozenset({"image-classification", "object-detection", "image-segmentation"})
_SOUNDS: Final = frozenset({"audio-classification", "automatic-speech-recognition"})
MAX_NUMBERS: Final = 1 << 16
"""Of a default question; one with more numbers would swell the signed description."""
SIDE: Final = 96
RATE: Final = 16_000
_UNRECORDED: Final = msgspec.Raw(b"null")


def default_questions(task: str, inputs: Sequence[GraphInput], *, chats: bool = False) -> list[Golden]:
    """Return golden samples whose answers are yet to be recorded; none where the graph's inputs are not known enough.

    `chats` is whether a text-generation model has a chat template.
    """
    if task in _TEXTS:
        return [_text(SHORT), _text(SENTENCE)]
    if task == "question-answering":
        return [_json({"inputs": {"question": "What was closed?", "context": SENTENCE}})]
    if task == "text-generation":
        return [_generation(chats)]
    if task in _PICTURES | _SOUNDS:
        seen = task in _PICTURES
        return [Golden("image/png" if seen else "audio/wav", picture() if seen else sound(), _UNRECORDED, 0.0)]
    return _by_shape(task, inputs)


def tolerance_of(expected: bytes, variant: str, task: str) -> float:
    """Return what another processor's answer may differ by: a share of the largest number, by the precision."""
    share = 0.001 if variant == "default" else 0.01 if "16" in variant else 0.05
    if task == "object-detection":
        # Corners are whole pixels, so that the least difference is one.
        return 2.0
    answer = msgspec.json.decode(expected)
    if task == "tensors":
        answer = [output["data"] for output in answer["outputs"]]
    largest = max(_numbers(answer), default=0.0)
    return share * max(1.0, largest)


def picture() -> bytes:
    """Return a small PNG with colours that run into each other, and a disc."""
    rows = bytearray()
    for y in range(SIDE):
        rows.append(0)
        for x in range(SIDE):
            inside = (x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2 < (SIDE / 4) ** 2
            rows += bytes([230, 60, 40] if inside else [x * 255 // SIDE, y * 255 // SIDE, 120])
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = (_chunk(b"IHDR", head), _chunk(b"IDAT", zlib.compress(bytes(rows), 9)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def sound() -> bytes:
    """Return half a second of a rising tone: a WAV of 16 bits and 16 kHz, one channel."""
    samples = RATE // 2
    values = [round(8000 * math.sin(2 * math.pi * (300 * at + 400 * at * at) / 1)) for at in _seconds(samples)]
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(struct.pack(f"<{samples}h", *values))
    return held.getvalue()


def _seconds(samples: int) -> list[float]:
    return [number / RATE for number in range(samples)]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _text(text: str) -> Golden:
    return Golden(TEXT, text.encode(), _UNRECORDED, 0.0)


def _json(body: object) -> Golden:
    return Golden(JSON, msgspec.json.encode(body), _UNRECORDED, 0.0)


def _generation(chats: bool) -> Golden:  # noqa: FBT001 - a template is there or not
    if chats:
        messages = [{"role": "user", "content": "What is a river?"}]
        return _json({"messages": messages, "max_tokens": 16, "temperature": 0})
    return _json({"inputs": SENTENCE, "parameters": {"max_new_tokens": 16, "do_sample": False}})


def _by_shape(task: str, inputs: Sequence[GraphInput]) -> list[Golden]:
    if task == "tensors":
        tensors = [_tensor(wanted) for wanted in inputs]
        known = [tensor for tensor in tensors if tensor is not None]
        return [_json({"inputs": known})] if known and len(known) == len(tensors) else []
    shape = inputs[0].shape[1:] if len(inputs) == 1 else ()
    sizes = [size for size in shape if size is not None]
    if not sizes or len(sizes) != len(shape) or math.prod(sizes) > MAX_NUMBERS:
        return []
    return [_json({"inputs": _nested(_varied(math.prod(sizes)), sizes)})]


def _tensor(wanted: GraphInput) -> dict[str, Any] | None:
    """Return numbers for an input, 1 for each free dimension; None for texts and for too many numbers."""
    shape = [1 if size is None else size for size in wanted.shape]
    if wanted.dtype not in _DATATYPES or math.prod(shape) > MAX_NUMBERS:
        return None
    count = math.prod(shape)
    # Whole numbers may be places in a table, of which the first is always there.
    zero: object = False if wanted.dtype == "bool" else 0
    data = _varied(count) if wanted.dtype.startswith("float") else [zero] * count
    return {"name": wanted.name, "shape": shape, "datatype": _DATATYPES[wanted.dtype], "data": data}


def _varied(count: int) -> list[float]:
    """Return numbers from -1 to 1 that differ from their neighbours; zeros would hide what weights do."""
    return [round((number * 37 % 101) / 50 - 1, 2) for number in range(count)]


def _nested(values: Sequence[float], sizes: Sequence[int]) -> list[Any]:
    if len(sizes) == 1:
        return list(values)
    step = len(values) // sizes[0]
    return [_nested(values[at : at + step], sizes[1:]) for at in range(0, len(values), step)]


def _numbers(value: object) -> list[float]:
    """Return how large each number in an answer is."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in _numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner)]
    return [abs(float(value))] if isinstance(value, int | float) and not isinstance(value, bool) else []
