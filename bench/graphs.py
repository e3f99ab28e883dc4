"""The models that the benchmarks ask: an encoder of MiniLM's shape and a net of a few microseconds, weights random.

Written as a folder that `spillway-fleet publish` takes; `make_encoder` and `make_tiny` are the same bytes every time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

LAYERS: Final = 6
WIDTH: Final = 384
HEADS: Final = 12
INNER: Final = 1536
VOCABULARY: Final = 30_522
POSITIONS: Final = 512
LABELS: Final = 2
TOKENS: Final = 128
FEATURES: Final = 16
OPSET: Final = 17
ENCODER_BATCH: Final = 16
TINY_BATCH: Final = 64

_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class _Writer:
    """Collects a graph's nodes and weights; each method returns the name of what it made."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)
        self._made = 0

    def name(self, kind: str) -> str:
        self._made += 1
        return f"{kind}_{self._made}"

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        made = self.name(kind)
        self.nodes.append(helper.make_node(kind, inputs, [made], **attributes))
        return made

    def constant(self, values: NDArray[Any]) -> str:
        made = self.name("w")
        self.weights.append(numpy_helper.from_array(values, made))
        return made

    def random(self, *shape: int) -> str:
        return self.constant(self._random.normal(0, 0.05, shape).astype(np.float32))

    def linear(self, data: str, rows: int, columns: int) -> str:
        product = self.node("MatMul", data, self.random(rows, columns))
        return self.node("Add", product, self.random(columns))

    def norm(self, data: str) -> str:
        scale, bias = self.constant(np.ones(WIDTH, np.float32)), self.constant(np.zeros(WIDTH, np.float32))
        return self.node("LayerNormalization", data, scale, bias, axis=-1, epsilon=1e-12)

    def gelu(self, data: str) -> str:
        root, one, half = (self.constant(np.array(value, np.float32)) for value in (2**0.5, 1.0, 0.5))
        erf = self.node("Add", self.node("Erf", self.node("Div", data, root)), one)
        return self.node("Mul", self.node("Mul", data, erf), half)

    def save(self, path: Path, inputs: Sequence[onnx.ValueInfoProto], output: onnx.ValueInfoProto) -> None:
        graph = helper.make_graph(self.nodes, "bench", inputs, [output], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        beside = len(model.SerializeToString()) > 1 << 20
        onnx.save_model(model, path, save_as_external_data=beside, location="model.onnx.data", size_threshold=1024)


def _embedded(writer: _Writer) -> str:
    length = writer.node("Gather", writer.node("Shape", "input_ids"), writer.constant(np.array([1])))
    zero = writer.constant(np.array([0]))
    positions = writer.node("Slice", writer.random(POSITIONS, WIDTH), zero, length)
    words = writer.node("Gather", writer.random(VOCABULARY, WIDTH), "input_ids")
    types = writer.node("Gather", writer.random(2, WIDTH), "token_type_ids")
    return writer.norm(writer.node("Add", writer.node("Add", words, positions), types))


def _masked(writer: _Writer) -> str:
    """Return what is added to the scores: 0 for a token, much less for padding."""
    mask = writer.node("Cast", "attention_mask", to=TensorProto.FLOAT)
    mask = writer.node("Unsqueeze", mask, writer.constant(np.array([1, 2])))
    one, low = writer.constant(np.array(1, np.float32)), writer.constant(np.array(-1e4, np.float32))
    return writer.node("Mul", writer.node("Sub", one, mask), low)


def _layer(writer: _Writer, data: str, mask: str) -> str:
    apart = writer.constant(np.array([0, 0, HEADS, WIDTH // HEADS]))
    together = writer.constant(np.array([0, 0, WIDTH]))
    parts = []
    for turn in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        heads = writer.node("Reshape", writer.linear(data, WIDTH, WIDTH), apart)
        parts.append(writer.node("Transpose", heads, perm=turn))
    query, key, value = parts
    scale = writer.constant(np.array((WIDTH // HEADS) ** 0.5, np.float32))
    scores = writer.node("Div", writer.node("MatMul", query, key), scale)
    shares = writer.node("Softmax", writer.node("Add", scores, mask), axis=-1)
    seen = writer.node("Transpose", writer.node("MatMul", shares, value), perm=[0, 2, 1, 3])
    attended = writer.linear(writer.node("Reshape", seen, together), WIDTH, WIDTH)
    data = writer.norm(writer.node("Add", attended, data))
    inner = writer.gelu(writer.linear(data, WIDTH, INNER))
    return writer.norm(writer.node("Add", writer.linear(inner, INNER, WIDTH), data))


def make_encoder(folder: Path) -> None:
    """Write a text classifier: 6 layers, 384 wide, 12 heads, 30,522 words."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(seed=1)
    data, mask = _embedded(writer), _masked(writer)
    for _ in range(LAYERS):
        data = _layer(writer, data, mask)
    first = writer.node("Gather", data, writer.constant(np.array(0)), axis=1)
    logits = writer.linear(writer.node("Tanh", writer.linear(first, WIDTH, WIDTH)), WIDTH, LABELS)
    writer.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", LABELS])
    writer.save(folder / "model.onnx", inputs, output)
    _write_tokenizer(folder)
    config = {"max_position_embeddings": POSITIONS, "pad_token_id": 0, "id2label": {"0": "no", "1": "yes"}}
    (folder / "config.json").write_text(json.dumps(config))
    golden = '[[golden]]\ntext = "a b c"\ncontent_type = "text/plain"\ntolerance = 0.01\n'
    _describe(folder, "text-classification", ENCODER_BATCH, golden)


def _words() -> list[str]:
    rng = random.Random(2)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = dict.fromkeys([*letters, *(f"##{letter}" for letter in letters)])
    while len(words) < VOCABULARY - len(_SPECIAL):
        words["".join(rng.choices(letters, k=rng.randint(3, 9)))] = None
    return list(words)


def _write_tokenizer(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *_words()])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    around = ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    tokenizer.post_processor = processors.BertProcessing(*around)
    tokenizer.save(str(folder / "tokenizer.json"))


def texts(number: int, tokens: int = TOKENS) -> list[str]:
    """Return different texts that the encoder's tokenizer cuts into so many tokens each, the two around it included."""
    rng = random.Random(3)
    whole = [word for word in _words() if len(word) > 1 and not word.startswith("##")]
    return [" ".join(rng.choices(whole, k=tokens - 2)) for _ in range(number)]


def make_tiny(folder: Path) -> None:
    """Write a regression of 16 numbers by one hidden layer."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(seed=4)
    hidden = writer.node("Relu", writer.linear("x", FEATURES, 16))
    writer.nodes.append(helper.make_node("Identity", [writer.linear(hidden, 16, 1)], ["y"]))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])
    taken = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])
    writer.save(folder / "model.onnx", [given], taken)
    (folder / "config.json").write_text(json.dumps({"num_features": FEATURES}))
    golden = f"[[golden]]\njson = '{json.dumps({'inputs': [0.5] * FEATURES})}'\ntolerance = 0.01\n"
    _describe(folder, "tabular-regression", TINY_BATCH, golden)


def make_wide(folder: Path) -> None:
    """Write a graph that means one large tensor: what crossing to the worker costs shows in full."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(seed=5)
    writer.nodes.append(helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=1))
    given = helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", "bytes"])
    cast = helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)
    writer.nodes[0] = helper.make_node("ReduceMean", ["f"], ["y"], axes=[1], keepdims=1)
    writer.nodes.insert(0, cast)
    taken = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])
    writer.save(folder / "model.onnx", [given], taken)
    _describe(folder, "tensors", 1, "")


def _describe(folder: Path, task: str, batch: int, golden: str) -> None:
    text = f'task = "{task}"\nformat = "onnx"\n[limits]\nbatch = {batch}\n{golden}'
    (folder / "spillway.toml").write_text(text)
