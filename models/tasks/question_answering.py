"""question-answering: the part of a context that answers a question, as the Hugging Face pipeline finds it.

A context over the model's length is read in windows that overlap; the question stands in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.errors import ModelError, RequestError
from models.manifest import Manifest
from models.request import Request
from models.tasks.spans import Span, best_spans, null_score, probabilities
from models.tasks.task import Prepared, check_finite, json_name, parse_question, render_results
from models.tasks.texts import TextTask, parse_flag, parse_whole
from models.tokens import Reading

MAX_WINDOW: Final = 384
"""Tokens of a window where the asker names no other length."""
DEFAULT_STRIDE: Final = 128
MAX_TOP_K: Final = 1000
_SURELY_READ: Final = 1 << 14

_PARAMETERS: Final = frozenset({
    "align_to_words",
    "doc_stride",
    "handle_impossible_answer",
    "max_answer_len",
    "max_question_len",
    "max_seq_len",
    "top_k",
})  # fmt: skip


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    top_k: int
    max_answer_len: int
    max_question_len: int | None
    window: int
    stride: int | None
    impossible: bool
    whole_words: bool


class _Asked(msgspec.Struct, frozen=True):
    """One question; `field` is its name in the body."""

    field: str
    question: str
    context: str


class _Job(msgspec.Struct, frozen=True):
    options: _Options
    asked: list[_Asked]
    windows: list[list[Reading]]


class QuestionAnswering(TextTask):
    """Question and context into the graph, `start_logits` and `end_logits` of each token out of it."""

    def __init__(self, artifact: Artifact, backend: Backend, context_tokens: int) -> None:
        super().__init__(artifact, backend, context_tokens)
        names = [spec.name for spec in backend.outputs]
        if len(names) < 2:
            raise ModelError("question-answering needs a graph with start_logits and end_logits")
        known = {"start_logits", "end_logits"} <= set(names)
        self._start, self._end = ("start_logits", "end_logits") if known else names[:2]
        self._window = min(self.context_tokens or MAX_WINDOW, MAX_WINDOW)
        self._model_tokens = self.context_tokens
        # Windows take a context of any length.
        self.context_tokens = self.longest_token_bytes = 0

    def count(self, request: Request) -> int:
        """Return the tokens of the longest question and context, however many windows they take."""
        asked, _, _ = self._read(request)
        return max(self.length((one.question, one.context)) for one in asked)

    def prepare(self, request: Request) -> Prepared:
        """Cut each context into windows; raises RequestError that names the field."""
        asked, options, many = self._read(request)
        windows = [self._cut(one, options) for one in asked]
        readings = [reading for group in windows for reading in group]
        return Prepared(
            items=[self.item(reading.ids, reading.types) for reading in readings],
            many=many,
            options=_Job(options, asked, windows),
            tokens=sum(len(reading.ids) for reading in readings),
        )

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the best answer of each question, or the `top_k` best as a list."""
        job: _Job = prepared.options
        rest = iter(results)
        outputs = [
            self._answer(asked, windows, [next(rest) for _ in windows], job.options)
            for asked, windows in zip(job.asked, job.windows, strict=True)
        ]
        return render_results(prepared, outputs)

    def _cut(self, asked: _Asked, options: _Options) -> list[Reading]:
        """Return the windows over a context, the question in each."""
        alone = len(self.tokenizer.encode(asked.question, special=False).ids)
        if options.max_question_len is not None and alone > options.max_question_len:
            message = f"{asked.field}.question: {alone} tokens are over max_question_len {options.max_question_len}"
            raise RequestError("too_large", message)
        left = self.special.pads_left
        pair = (asked.context, asked.question) if left else (asked.question, asked.context)
        # A longer text is counted first, which takes less memory than reading it.
        if len(asked.context) <= _SURELY_READ:
            whole = self.tokenizer.read(*pair)
            if len(whole.ids) <= options.window:
                return [whole]
        room = options.window - alone - len(self.tokenizer.encode_batch([("", "")])[0].ids)
        stride = _stride(asked, options, room)
        self.check_windows(asked.context, room, stride, f"{asked.field}.context")
        cut = "only_first" if left else "only_second"
        return self.tokenizer.windows(*pair, max_tokens=options.window, stride=stride, cut=cut)

    def _answer(
        self, asked: _Asked, windows: Sequence[Reading], results: Sequence[Tensors], options: _Options
    ) -> dict[str, Any] | list[dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}
        nothing = 1e6
        for reading, result in zip(windows, results, strict=True):
            allowed = self._allowed(reading)
            start = probabilities(check_finite(result[self._start][: len(reading.ids)]), allowed)
            end = probabilities(check_finite(result[self._end][: len(reading.ids)]), allowed)
            nothing = min(nothing, null_score(start, end))
            # Some fall together once they are widened to whole words.
            wanted = options.top_k * 2 + 10 if options.whole_words else options.top_k
            for span in best_spans(start, end, allowed, wanted, options.max_answer_len):
                self._collect(answers, asked, reading, span, whole_words=options.whole_words)
        found = list(answers.values())
        if options.impossible:
            found.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        best = sorted(found, key=lambda answer: -answer["score"])[: options.top_k]
        return best[0] if len(best) == 1 else best

    def _collect(
        self, answers: dict[str, dict[str, Any]], asked: _Asked, reading: Reading, span: Span, *, whole_words: bool
    ) -> None:
        """Add an answer, or its score to that of the same words before."""
        first, last = reading.offsets[span.start][0], reading.offsets[span.end][1]
        if whole_words:
            part = 0 if self.special.pads_left else 1
            begins, ends = reading.word_span(span.start, part), reading.word_span(span.end, part)
            if begins is not None and ends is not None:
                first, last = begins[0], ends[1]
        text = asked.context[first:last]
        known = answers.setdefault(text.lower(), {"score": 0.0, "start": first, "end": last, "answer": text})
        known["score"] += span.score

    def _allowed(self, reading: Reading) -> list[bool]:
        """Return which tokens an answer may begin and end with: the context's, and the one that stands for none."""
        if self.special.pads_left:
            return [True] * len(reading.ids)  # as the pipeline has it
        # Later windows of a tokenizer that puts nothing around a text do not know their second part.
        return [
            part == 1 or number == self.special.cls or (part is None and not special)
            for part, number, special in zip(reading.parts, reading.ids, reading.special, strict=True)
        ]

    def _read(self, request: Request) -> tuple[list[_Asked], _Options, bool]:
        question = parse_question(request, _PARAMETERS)
        many = isinstance(question.inputs, list)
        values = question.inputs if many else [question.inputs]
        asked = [_asked(value, f"inputs[{at}]" if len(values) > 1 else "inputs") for at, value in enumerate(values)]
        return asked, self._options(question.parameters), many

    def _options(self, parameters: Mapping[str, Any]) -> _Options:
        window = parse_whole(parameters, "max_seq_len", 1) or self._window
        if self._model_tokens and window > self._model_tokens:
            message = f"parameters.max_seq_len: the model takes {self._model_tokens} tokens, got {window}"
            raise RequestError("bad_request", message)
        top_k = parse_whole(parameters, "top_k", 1) or 1
        if top_k > MAX_TOP_K:
            raise RequestError("bad_request", f"parameters.top_k: expected at most {MAX_TOP_K}, got {top_k}")
        return _Options(
            top_k=top_k,
            max_answer_len=parse_whole(parameters, "max_answer_len", 1) or 15,
            max_question_len=parse_whole(parameters, "max_question_len", 1),
            window=window,
            stride=parse_whole(parameters, "doc_stride", 0),
            impossible=parse_flag(parameters, "handle_impossible_answer", default=False),
            whole_words=parse_flag(parameters, "align_to_words", default=True),
        )


def _stride(asked: _Asked, options: _Options, room: int) -> int:
    """Return by how many tokens windows overlap, each with `room` for the context beside the question."""
    if room < 1:
        message = f"{asked.field}.question: leaves no room for a context in the model's {options.window} tokens"
        raise RequestError("too_large", message)
    if options.stride is None:
        return min(options.window // 2, DEFAULT_STRIDE, room - 1)
    if options.stride >= room:
        message = f"parameters.doc_stride: must be at most {room - 1} beside this question, got {options.stride}"
        raise RequestError("bad_request", message)
    return options.stride


def _asked(value: object, field: str) -> _Asked:
    if not isinstance(value, dict):
        raise RequestError("bad_request", f"{field}: expected an object with question and context")
    for name in value.keys() - {"question", "context"}:
        raise RequestError("bad_request", f"{field}.{name[:80]}: is not known; give question and context")
    for name in ("question", "context"):
        given = value.get(name)
        if not isinstance(given, str):
            raise RequestError("bad_request", f"{field}.{name}: expected a text, got {json_name(given)}")
        if not given:
            raise RequestError("bad_request", f"{field}.{name}: is empty")
    return _Asked(field, value["question"], value["context"])


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> QuestionAnswering:
    """Make the task for an opened graph."""
    return QuestionAnswering(artifact, backend, manifest.limits.context_tokens)
