"""Smaller and faster forms of an ONNX graph, made with ONNX Runtime's own tools, one function a step."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from models.errors import ModelError
from models.optimize.feeds import Feeds
from models.optimize.graphs import initialisers, load_graph, nodes
from models.optimize.recipes import STEPS, pruned_percent

PRODUCTS: Final = ("MatMul", "Gemm", "Gather", "Attention", "LSTM", "EmbedLayerNormalization")
"""What int8-dynamic takes; a convolution quantised so is slower than it was."""
BLOCK: Final = 32
"""Weights that share one scale in 4 bits."""
MIN_PRUNED: Final = 1024
"""Weights in a tensor that is worth pruning."""


def apply(recipe: Sequence[str], source: Path, target: Path, feeds: Sequence[Feeds]) -> list[str]:
    """Write a graph with every step of a recipe done; return what was done. Raises ModelError."""
    with tempfile.TemporaryDirectory(prefix="spillway-") as work, _quiet():
        told: list[str] = []
        here = source
        for number, step in enumerate(recipe):
            after = Path(work) / f"{number}.onnx"
            told.append(_apply(step, here, after, feeds))
            here = after
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            onnx.save_model(_load_whole(here), target)
        except ValueError as error:
            raise ModelError(f"{source.name}: over 2 GiB, which is more than these tools keep in one graph") from error
        _check_opens("+".join(recipe), source.name, target)
    return told


def _check_opens(recipe: str, name: str, target: Path) -> None:
    """Raise ModelError for a graph that the tools made and the runtime refuses."""
    try:
        ort.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(
            f"{recipe}: ONNX Runtime refuses what its tools made of {name}, so leave it out: {line}"
        ) from error


def _apply(step: str, source: Path, target: Path, feeds: Sequence[Feeds]) -> str:
    try:
        percent = pruned_percent(step)
        if percent is not None:
            return _prune(source, target, percent)
        _FUNCTIONS[step](source, target, feeds)
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"{step}: {error}; `pip install '.[optimize]'` in a checkout brings what it needs") from error
    except Exception as error:  # the tools raise whatever their parts raise
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(f"{step}: ONNX Runtime's tools gave up: {type(error).__name__}: {line}") from error
    return f"{step}: {STEPS[step]}"


def _graph(source: Path, target: Path, feeds: Sequence[Feeds]) -> None:
    """Join operators; what depends on this machine's processor is left to the box."""
    del feeds
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _int8_dynamic(source: Path, target: Path, feeds: Sequence[Feeds]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - a second to import

    del feeds
    kinds = {node.op_type for node in nodes(load_graph(source).graph)}
    wanted = [kind for kind in PRODUCTS if kind in kinds]
    if not {"MatMul", "Gemm", "Attention", "LSTM"} & kinds:
        raise ModelError("int8-dynamic: the graph has no matrix product; int8-static is for convolutions")
    quantize_dynamic(
        _prepared(source, target),
        target,
        op_types_to_quantize=wanted,
        per_channel=True,
        # 7 bits, so that sums of products fit where a processor has no instruction of its own for them: the same
        # answers on every box.
        reduce_range=True,
        weight_type=QuantType.QInt8,
        # The two ways through a merged decoder are graphs inside its nodes.
        extra_options={"EnableSubgraph": True},
    )


def _int8_static(source: Path, target: Path, feeds: Sequence[Feeds]) -> None:
    from onnxruntime.quantization import (  # noqa: PLC0415 - a second to import
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next((dict(one) for one in self._left), None)

    if not feeds:
        raise ModelError("int8-static: asks for a calibration set; add --calibration FILE")
    quantize_static(
        _prepared(source, target),
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,
    )


def _int4(source: Path, target: Path, feeds: Sequence[Feeds]) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415 - as above

    del feeds
    quantiser = MatMulNBitsQuantizer(_load_whole(source), block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantiser.process()
    model = quantiser.model.model
    if not any(node.op_type == "MatMulNBits" for node in nodes(model.graph)):
        raise ModelError("int4: the graph has no matrix product with a weight of its own")
    onnx.save_model(model, target)


def _float16(source: Path, target: Path, feeds: Sequence[Feeds]) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415 - as above

    del feeds
    onnx.save_model(convert_float_to_float16(_load_whole(source), keep_io_types=True), target)


def _prune(source: Path, target: Path, percent: int) -> str:
    """Set the smallest weights of every matrix and convolution to zero."""
    model = _load_whole(source)
    zeroed = total = 0
    for tensor in initialisers(model.graph):
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < MIN_PRUNED:
            continue
        kept = _without_smallest(values, percent)
        zeroed += int(values.size - np.count_nonzero(kept))
        total += values.size
        tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))
    if not total:
        raise ModelError(f"pruned: no weight in 32 bits has {MIN_PRUNED} numbers; prune before quantising")
    onnx.save_model(model, target)
    return f"pruned-{percent}: {zeroed} of {total} weights set to zero, the smallest of each matrix"


def _without_smallest(values: NDArray[Any], percent: int) -> NDArray[Any]:
    cut = int(values.size * percent / 100)
    flat = values.ravel().copy()
    flat[np.argpartition(np.abs(flat), cut)[:cut]] = 0
    return flat.reshape(values.shape)


def _prepared(source: Path, target: Path) -> Path:
    """Return the graph with the shapes that quantisation asks for."""
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415 - as above

    prepared = target.with_name(f"{target.stem}-prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    return prepared


def _load_whole(path: Path) -> ModelProto:
    return onnx.load_model(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' remarks out of the admin's output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


_FUNCTIONS: Final[dict[str, Callable[[Path, Path, Sequence[Feeds]], None]]] = {
    "graph": _graph,
    "int8-dynamic": _int8_dynamic,
    "int8-static": _int8_static,
    "int4": _int4,
    "float16": _float16,
}
