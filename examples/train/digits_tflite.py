"""Post-training quantisation of the digits net into a fully int8 TFLite file.

The scheme is TFLite's: activations int8 with one scale and zero point, weights symmetric int8 with a scale for each
output channel, biases int32 (https://ai.google.dev/edge/litert/models/quantization_spec). The operator versions are
those that a runtime from 2023 knows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from torch import nn

Floats = NDArray[np.float32]
Ints = NDArray[np.int8] | NDArray[np.int32]


@dataclass(frozen=True)
class Scale:
    """How int8 stands for real numbers: real = scale * (int8 - zero)."""

    scale: float
    zero: int


def scale_of(values: Floats) -> Scale:
    """The scale and zero point that cover `values` and zero."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255
    return Scale(scale, int(np.clip(round(-128 - low / scale), -128, 127)))


@dataclass
class Graph:
    """A TFLite graph while it is written."""

    tensors: list[schema.TensorT] = field(default_factory=list)
    buffers: list[schema.BufferT] = field(default_factory=lambda: [schema.BufferT()])
    operators: list[schema.OperatorT] = field(default_factory=list)
    codes: list[tuple[int, int]] = field(default_factory=list)

    def tensor(
        self, name: str, shape: list[int], scales: list[float], zeros: list[int], data: Ints | None = None
    ) -> int:
        """Add a tensor and return its number."""
        made = schema.TensorT(name=name.encode(), shape=shape, buffer=0)
        made.type = schema.TensorType.INT32 if data is not None and data.dtype == np.int32 else schema.TensorType.INT8
        if scales:
            made.quantization = schema.QuantizationParametersT(scale=scales, zeroPoint=zeros)
        if data is not None:
            made.buffer = len(self.buffers)
            self.buffers.append(schema.BufferT(data=np.frombuffer(data.tobytes(), dtype=np.uint8)))
        self.tensors.append(made)
        return len(self.tensors) - 1

    def activation(self, name: str, shape: list[int], scale: Scale) -> int:
        """Add an int8 tensor that is computed at run time."""
        return self.tensor(name, shape, [scale.scale], [scale.zero])

    def operator(
        self, code: int, version: int, inputs: list[int], output: int, options: object, options_type: int
    ) -> None:
        """Add an operator."""
        if (code, version) not in self.codes:
            self.codes.append((code, version))
        made = schema.OperatorT(opcodeIndex=self.codes.index((code, version)), inputs=inputs, outputs=[output])
        made.builtinOptions, made.builtinOptionsType = options, options_type
        self.operators.append(made)

    def weights(self, name: str, weight: Floats, bias: Floats, entering: Scale, *, by_channel: bool) -> list[int]:
        """Add a layer's weights [out, ...] and biases, quantised; return their numbers."""
        rows = weight.reshape(len(weight), -1)
        spread = np.abs(rows).max(axis=1) if by_channel else np.full(len(rows), np.abs(rows).max())
        scales = np.maximum(spread / 127, 1e-9)
        whole = np.clip(np.round(rows / scales[:, None]), -127, 127).astype(np.int8).reshape(weight.shape)
        bias_scales = scales * entering.scale
        whole_bias = np.round(bias / bias_scales).astype(np.int32)
        kept = len(rows) if by_channel else 1
        zeros = [0] * kept
        first = self.tensor(f"{name}.weight", list(weight.shape), scales[:kept].tolist(), zeros, whole)
        second = self.tensor(f"{name}.bias", [len(bias)], bias_scales[:kept].tolist(), zeros, whole_bias)
        return [first, second]

    def to_bytes(self, first: int, last: int) -> bytes:
        """The whole file."""
        subgraph = schema.SubGraphT(
            tensors=self.tensors, inputs=[first], outputs=[last], operators=self.operators, name=b"main"
        )
        codes = [
            schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=v) for code, v in self.codes
        ]
        model = schema.ModelT(version=3, operatorCodes=codes, subgraphs=[subgraph], buffers=self.buffers)
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _conv(graph: Graph, layer: nn.Conv2d, name: str, entering: tuple[int, Scale], leaving: tuple[int, Scale]) -> None:
    weight = layer.weight.detach().numpy().transpose(0, 2, 3, 1)
    assert layer.bias is not None
    parts = graph.weights(name, weight, layer.bias.detach().numpy(), entering[1], by_channel=True)
    options = schema.Conv2DOptionsT(padding=schema.Padding.SAME, strideW=1, strideH=1)
    options.fusedActivationFunction = schema.ActivationFunctionType.RELU
    options.dilationWFactor = options.dilationHFactor = 1
    kind = schema.BuiltinOperator.CONV_2D
    graph.operator(kind, 3, [entering[0], *parts], leaving[0], options, schema.BuiltinOptions.Conv2DOptions)


def _pool(graph: Graph, entering: int, leaving: int) -> None:
    options = schema.Pool2DOptionsT(padding=schema.Padding.VALID, strideW=2, strideH=2, filterWidth=2, filterHeight=2)
    kind = schema.BuiltinOperator.MAX_POOL_2D
    graph.operator(kind, 2, [entering], leaving, options, schema.BuiltinOptions.Pool2DOptions)


def _flatten(graph: Graph, entering: int, leaving: int, size: int) -> None:
    shape = graph.tensor("flat.shape", [2], [], [], np.array([1, size], dtype=np.int32))
    options = schema.ReshapeOptionsT(newShape=[1, size])
    kind = schema.BuiltinOperator.RESHAPE
    graph.operator(kind, 1, [entering, shape], leaving, options, schema.BuiltinOptions.ReshapeOptions)


def _linear(
    graph: Graph, weight: Floats, bias: Floats, name: str, entering: tuple[int, Scale], leaving: tuple[int, bool]
) -> None:
    parts = graph.weights(name, weight, bias, entering[1], by_channel=False)
    kinds = schema.ActivationFunctionType
    options = schema.FullyConnectedOptionsT(fusedActivationFunction=kinds.RELU if leaving[1] else kinds.NONE)
    kind = schema.BuiltinOperator.FULLY_CONNECTED
    graph.operator(kind, 4, [entering[0], *parts], leaving[0], options, schema.BuiltinOptions.FullyConnectedOptions)


def _calibrate(model: nn.Sequential, images: Floats) -> list[Floats]:
    """What leaves every layer for the calibration images; the first is what enters."""
    values = [torch.from_numpy(images)]
    with torch.no_grad():
        for layer in model:
            values.append(layer(values[-1]))
    return [value.numpy() for value in values]


def write_int8(model: nn.Sequential, calibration: Floats, path: Path) -> None:
    """Write `model` as a fully int8 TFLite file: int8 [1, 8, 8, 1] to int8 [1, 10]."""
    seen = _calibrate(model, calibration)
    graph = Graph()
    scale = scale_of(seen[0])
    current = first = graph.activation("pixel_values", [1, 8, 8, 1], scale)
    before_flatten: list[int] = []
    for index, layer in enumerate(model):
        name, after = f"layer{index}", seen[index + 1]
        if isinstance(layer, nn.ReLU):  # part of the layer before
            continue
        shape = [1, *after.shape[2:], after.shape[1]] if after.ndim == 4 else [1, after.shape[1]]
        followed = index + 1 < len(model) and isinstance(model[index + 1], nn.ReLU)
        leaving = scale_of(seen[index + 2]) if followed else scale_of(after)
        if isinstance(layer, nn.MaxPool2d | nn.Flatten):
            leaving = scale
        output = graph.activation("logits" if index + 1 == len(model) else name, shape, leaving)
        if isinstance(layer, nn.Conv2d):
            _conv(graph, layer, name, (current, scale), (output, leaving))
        elif isinstance(layer, nn.MaxPool2d):
            _pool(graph, current, output)
        elif isinstance(layer, nn.Flatten):
            before_flatten = list(seen[index].shape[1:])
            _flatten(graph, current, output, after.shape[1])
        elif isinstance(layer, nn.Linear):
            weight, before_flatten = _hwc(layer.weight.detach().numpy(), before_flatten), []
            _linear(graph, weight, layer.bias.detach().numpy(), name, (current, scale), (output, followed))
        current, scale = output, leaving
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(graph.to_bytes(first, current))


def _hwc(weight: Floats, shape: list[int]) -> Floats:
    """Reorder a dense layer's columns from channel-first to channel-last, if it follows a flattened picture."""
    if not shape:
        return weight
    return np.ascontiguousarray(weight.reshape(-1, *shape).transpose(0, 2, 3, 1).reshape(len(weight), -1))


def int8_accuracy(path: Path, images: Floats, labels: NDArray[np.int64]) -> float:
    """The share of right answers of an int8 TFLite net, for float images [n, 1, 8, 8]."""
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    entering, leaving = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scale, zero = entering["quantization"]
    right = 0
    for image, label in zip(images, labels, strict=True):
        whole = np.clip(np.round(image.transpose(1, 2, 0) / scale) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(entering["index"], whole[None])
        interpreter.invoke()
        right += int(interpreter.get_tensor(leaving["index"])[0].argmax()) == int(label)
    return right / len(labels)
