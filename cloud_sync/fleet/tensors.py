"""Where the tensors lie in a model's files, so that versions can be compared number by number.

Read from the formats' own tables of contents: ONNX (protocol buffers, onnx.proto: the graph's initialisers, inside the
file or as external data), TFLite (flatbuffers, schema.fbs) and safetensors. A file that cannot be read so is no error:
it is cut without regard to tensors. Nothing here runs on a box.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cloud_sync.frames import Numbers

INTEGERS_8, INTEGERS_16, INTEGERS_32, INTEGERS_64 = (Numbers(width, 0) for width in (1, 2, 4, 8))
FLOAT_16, BFLOAT_16, FLOAT_32, FLOAT_64 = Numbers(2, 5), Numbers(2, 8), Numbers(4, 8), Numbers(8, 11)
_ONNX: Final = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 21, 22), INTEGERS_8),
    **dict.fromkeys((4, 5), INTEGERS_16),
    **dict.fromkeys((6, 12), INTEGERS_32),
    **dict.fromkeys((7, 13), INTEGERS_64),
    1: FLOAT_32,
    10: FLOAT_16,
    11: FLOAT_64,
    16: BFLOAT_16,
}
_TFLITE: Final = {
    **dict.fromkeys((3, 9, 17), INTEGERS_8),
    **dict.fromkeys((7, 16), INTEGERS_16),
    **dict.fromkeys((2, 15), INTEGERS_32),
    **dict.fromkeys((4, 12), INTEGERS_64),
    0: FLOAT_32,
    1: FLOAT_16,
    10: FLOAT_64,
    18: BFLOAT_16,
}
_SAFETENSORS: Final = {
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), INTEGERS_8),
    **dict.fromkeys(("I16", "U16"), INTEGERS_16),
    **dict.fromkeys(("I32", "U32"), INTEGERS_32),
    **dict.fromkeys(("I64", "U64"), INTEGERS_64),
    "F16": FLOAT_16,
    "BF16": BFLOAT_16,
    "F32": FLOAT_32,
    "F64": FLOAT_64,
}
_MAX_HEADER: Final = 100 << 20
_UNREADABLE: Final = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    UnicodeDecodeError,
    msgspec.MsgspecError,
)
"""What reading a table of contents raises that is not of the format it seemed to be."""


class Tensor(NamedTuple):
    """A tensor's bytes in a file; `name` is unique in a model."""

    name: str
    path: str
    offset: int
    length: int
    numbers: Numbers


class _Stored(msgspec.Struct):
    dtype: str
    data_offsets: tuple[int, int]


def find_tensors(folder: Path, paths: list[str]) -> list[Tensor]:
    """Return the tensors of the model files among `paths`; only such as lie whole inside a file of `paths`."""
    found: list[Tensor] = []
    for path in paths:
        read = _READERS.get(Path(path).suffix)
        if read is None or not (folder / path).stat().st_size:
            continue
        with (folder / path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found += _readable(read, data, path)
    lengths = {path: (folder / path).stat().st_size for path in paths}
    return [
        tensor
        for tensor in found
        if tensor.offset >= 0 and tensor.offset + tensor.length <= lengths.get(tensor.path, 0)
    ]


def _readable(read: Callable[[mmap.mmap, str], Iterator[Tensor]], data: mmap.mmap, path: str) -> list[Tensor]:
    try:
        return list(read(data, path))
    except _UNREADABLE:
        return []


def _safetensors(data: mmap.mmap, path: str) -> Iterator[Tensor]:
    (header_bytes,) = struct.unpack_from("<Q", data, 0)
    if header_bytes > min(_MAX_HEADER, len(data)):
        raise ValueError("the header is longer than the file")
    header = msgspec.json.decode(data[8 : 8 + header_bytes], type=dict[str, msgspec.Raw])
    for name, raw in header.items():
        if name != "__metadata__":
            stored = msgspec.json.decode(raw, type=_Stored)
            begin, end = stored.data_offsets
            yield Tensor(name, path, 8 + header_bytes + begin, end - begin, _SAFETENSORS[stored.dtype])


class _Field(NamedTuple):
    number: int
    value: int
    start: int
    end: int


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of a protocol buffers message: `value` of a number, `start` and `end` of bytes."""
    at = start
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        value, begin = 0, at
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            length, begin = _varint(data, at)
            at = begin + length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("no protocol buffers")
        if at > end:
            raise ValueError("a field ends beyond its message")
        yield _Field(key >> 3, value, begin, at)


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _onnx(data: mmap.mmap, path: str) -> Iterator[Tensor]:
    for field in _fields(data, 0, len(data)):
        if field.number == 7:  # ModelProto.graph
            for part in _fields(data, field.start, field.end):
                if part.number == 5:  # GraphProto.initializer
                    yield from _initialiser(data, part, path)


def _initialiser(data: mmap.mmap, message: _Field, path: str) -> Iterator[Tensor]:
    name, kind, place = "", 0, (path, 0, 0)
    outside: dict[str, str] = {}
    for field in _fields(data, message.start, message.end):
        if field.number == 2:
            kind = field.value
        elif field.number == 8:
            name = data[field.start : field.end].decode()
        elif field.number == 9:
            place = (path, field.start, field.end - field.start)
        elif field.number == 13:
            key, value = (data[part.start : part.end].decode() for part in _fields(data, field.start, field.end))
            outside[key] = value
    if "location" in outside:
        beside = (Path(path).parent / outside["location"]).as_posix()
        place = (beside, int(outside.get("offset", 0)), int(outside.get("length", 0)))
    if place[2] and kind in _ONNX:
        yield Tensor(f"{path}:{name}", *place, _ONNX[kind])


def _tflite(data: mmap.mmap, path: str) -> Iterator[Tensor]:
    if data[4:8] != b"TFL3":
        raise ValueError("no TFLite file")
    root = _u32(data, 0)
    buffers = list(_vector(data, _member(data, root, 4)))
    for graph_at, graph in enumerate(_vector(data, _member(data, root, 2))):
        for tensor_at, tensor in enumerate(_vector(data, _member(data, graph, 0))):
            kind, number = _member(data, tensor, 1), _member(data, tensor, 2)
            values = _member(data, buffers[_u32(data, number)], 0) if number else 0
            code = data[kind] if kind else 0
            if values and code in _TFLITE:
                start = values + _u32(data, values)
                yield Tensor(f"{path}:{graph_at}.{tensor_at}", path, start + 4, _u32(data, start), _TFLITE[code])


def _u32(data: mmap.mmap, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _member(data: mmap.mmap, table: int, index: int) -> int:
    """Return where a member of a flatbuffers table lies, 0 where it has none."""
    members = table - int(struct.unpack_from("<i", data, table)[0])
    entry = 4 + 2 * index
    if entry >= struct.unpack_from("<H", data, members)[0]:
        return 0
    offset = int(struct.unpack_from("<H", data, members + entry)[0])
    return table + offset if offset else 0


def _vector(data: mmap.mmap, member: int) -> Iterator[int]:
    """Yield where the tables of a vector lie."""
    if member:
        start = member + _u32(data, member)
        for at in range(_u32(data, start)):
            place = start + 4 + 4 * at
            yield place + _u32(data, place)


_READERS: Final = {".onnx": _onnx, ".tflite": _tflite, ".safetensors": _safetensors}
