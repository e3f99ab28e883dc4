"""feature-extraction: texts into vectors, pooled as the model's folder says, or into the matrix of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.errors import ModelError, RequestError
from models.manifest import Manifest
from models.request import Request
from models.tasks.pooling import MODES, Pooling, load_pooling, pool, unit_length
from models.tasks.task import Prepared, check_finite, render_results
from models.tasks.texts import Field, TextTask, parse_flag, read_texts

_PARAMETERS: Final = frozenset({"normalize", "pooling", "prompt_name"})
_DIGITS: Final = 9
"""Of the largest number of a vector: more than single precision holds."""


class _Options(msgspec.Struct, frozen=True):
    """`pooling` is None for the matrix; `graphs` takes the vector that the graph itself pools."""

    pooling: Pooling | None
    graphs: bool
    prompt: str


class _Job(msgspec.Struct, frozen=True):
    options: _Options
    left_out: int


class FeatureExtraction(TextTask):
    """Token numbers into the graph, a vector of each token out of it, or of the whole text."""

    def __init__(self, artifact: Artifact, backend: Backend, context_tokens: int) -> None:
        self.usual = load_pooling(artifact)
        super().__init__(artifact, backend, context_tokens or self.usual.max_tokens)
        self._tokens = _output(backend, 3, ("last_hidden_state", "token_embeddings"))
        self._vector = _output(backend, 2, ("sentence_embedding",))
        if self._tokens is None and self._vector is None:
            raise ModelError("feature-extraction needs a graph that gives a vector of each token or of the text")
        if self._vector is not None:
            # Such graphs are exported from sentence-transformers, and lie in folders that say nothing of it.
            self.usual = msgspec.structs.replace(self.usual, trims=True)
        elif self.usual.unknown:
            raise ModelError(f"modules.json: {self.usual.unknown!r} is not in the graph, and is not done here")

    def count(self, request: Request) -> int:
        """Return the tokens of the longest text."""
        fields, options, _ = self._read(request)
        return max(self.length(self.usual.text(options.prompt, str(field.text))) for field in fields)

    def prepare(self, request: Request) -> Prepared:
        """Count and check each text; raises RequestError, `too_large` for one that the model cannot hold."""
        fields, options, many = self._read(request)
        items = self.encode([Field(field.name, self.usual.text(options.prompt, str(field.text))) for field in fields])
        left_out = self._prompt_tokens(options)
        tokens = sum(item["input_ids"].size for item in items)
        for item in items:
            # What the padded results are cut back to.
            item["length"] = np.asarray(item["input_ids"].size)
        return Prepared(items=items, many=many, options=_Job(options, left_out), tokens=tokens)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of texts, each result with its own length."""
        results = super().run(items)
        for item, result in zip(items, results, strict=True):
            result["length"] = item["length"]
        return results

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return each text's vector, or its matrix."""
        job: _Job = prepared.options
        return render_results(prepared, [_rounded(self._features(result, job)) for result in results])

    def _features(self, result: Tensors, job: _Job) -> NDArray[Any]:
        options = job.options
        if options.graphs and self._vector is not None:
            vector = check_finite(result[self._vector])
            return unit_length(vector) if options.pooling and options.pooling.normalize else vector
        if self._tokens is None:
            raise RequestError("bad_request", "parameters.pooling: this model gives only the vector of a whole text")
        matrix = check_finite(result[self._tokens][: int(result["length"])])
        if options.pooling is None:
            return matrix
        return pool(matrix.astype(np.float32), options.pooling, job.left_out)

    def _prompt_tokens(self, options: _Options) -> int:
        """Return how many tokens at a text's beginning belong to a prompt that pooling leaves out."""
        if not options.prompt or options.pooling is None or options.pooling.include_prompt:
            return 0
        alone = self.tokenizer.read(self.usual.text(options.prompt, ""))
        return len(alone.ids) - alone.special[-1]

    def _read(self, request: Request) -> tuple[list[Field], _Options, bool]:
        fields, question = read_texts(request, _PARAMETERS)
        return fields, self._options(question.parameters), isinstance(question.inputs, list)

    def _options(self, parameters: Mapping[str, Any]) -> _Options:
        prompt = self.usual.prompt(parameters.get("prompt_name"))
        normalize = parse_flag(parameters, "normalize", default=self.usual.pooling.normalize)
        asked = parameters.get("pooling")
        if asked is None:
            pooling = msgspec.structs.replace(self.usual.pooling, normalize=normalize)
            return _Options(pooling, graphs=self._vector is not None, prompt=prompt)
        if asked == "none":
            return _Options(None, graphs=False, prompt=prompt)
        if not isinstance(asked, str) or asked not in MODES:
            known = ", ".join(("none", *MODES))
            raise RequestError("bad_request", f"parameters.pooling: expected one of {known}, got {asked!r:.40}")
        pooling = Pooling((asked,), normalize=normalize, include_prompt=self.usual.pooling.include_prompt)
        return _Options(pooling, graphs=False, prompt=prompt)


def _output(backend: Backend, axes: int, names: Sequence[str]) -> str | None:
    """Return the graph's output by one of its usual names, else the first with so many axes."""
    given = [spec.name for spec in backend.outputs if len(spec.shape) == axes]
    return next((name for name in names if name in given), given[0] if given and axes == 3 else None)


def _rounded(values: NDArray[Any]) -> list[Any]:
    """Return numbers without the digits that single precision does not have: half the bytes in JSON."""
    largest = float(np.abs(values).max(initial=0.0))
    digits = _DIGITS - (int(np.floor(np.log10(largest))) + 1 if largest > 0 else 0)
    rounded: list[Any] = np.round(values.astype(np.float64), digits).tolist()
    return rounded


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> FeatureExtraction:
    """Make the task for an opened graph."""
    return FeatureExtraction(artifact, backend, manifest.limits.context_tokens)
