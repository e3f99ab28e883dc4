"""translation and summarization: texts into texts for several askers, each step a token for every one of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.answer import render_outputs
from models.artifact import Artifact
from models.channel import Piece
from models.errors import ModelError, RequestError, failure_of
from models.generation.seq2seq_graphs import Graphs, Open, Reading, find_layout
from models.generation.seq2seq_options import Wish, parse_wish
from models.generation.seq2seq_rules import Rules, load_rules, next_token
from models.generation.seq2seq_wording import Worded, Wording
from models.manifest import Manifest
from models.request import Request
from models.tokens import Tokenizer, load_special, load_tokenizer

MEMBERS: Final = {"translation": "translation_text", "summarization": "summary_text"}
"""Where each task's answer has its text."""
_BROKEN: Final = "\N{REPLACEMENT CHARACTER}"


class Model(Protocol):
    """An encoder-decoder: `Graphs`, or a twin of it."""

    fallbacks: Sequence[str]

    def read(self, tokens: Sequence[int]) -> Reading:
        """Read a text."""

    def step(self, reading: Reading, written: Sequence[int]) -> NDArray[np.float32]:
        """Return the scores of the token that follows."""

    def close(self) -> None:
        """Free the model."""


class Limits(msgspec.Struct, frozen=True):
    """The most tokens of a text and of its answer, the start token included; 0 is no limit."""

    text: int
    answer: int


class _Answer(msgspec.Struct):
    """One text's answer in the making; `said` is what of it a stream has given."""

    tokens: list[int]
    rules: Rules
    most: int
    written: list[int]
    reading: Reading | None = None
    said: str = ""

    @property
    def finished(self) -> bool:
        return len(self.written) >= self.most or (len(self.written) > 1 and self.written[-1] in self.rules.eos_token_id)


class _Job(msgspec.Struct):
    """One request; its texts are answered one after the other."""

    ticket: int
    many: bool
    stream: bool
    waiting: deque[_Answer]
    tokens_in: int
    current: _Answer | None = None
    texts: list[str] = []
    tokens_out: int = 0
    compute_ms: float = 0.0


class Seq2seqSession:
    """An encoder-decoder with at most `slots` requests in the making at once."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        wording: Wording,
        rules: Rules,
        limits: Limits,
        *,
        member: str,
        slots: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._wording = wording
        self._rules = rules
        self._limits = limits
        self._member = member
        self._jobs: dict[int, _Job] = {}
        self.fallbacks = model.fallbacks
        self.capacity = max(1, slots)
        self.default_max_tokens = self._bounded(rules.most_new_tokens)
        # What an asker is measured by counts text and answer together; here each has a bound of its own.
        self.context_tokens = limits.text + (limits.answer or self.default_max_tokens) if limits.text else 0
        self.longest_token_bytes = tokenizer.longest_token_bytes
        self.extra_tokens = len(tokenizer.encode("").ids)

    @property
    def room(self) -> int:
        """How many more requests can begin now."""
        return self.capacity - len(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether an answer is in the making."""
        return bool(self._jobs)

    def count(self, request: Request) -> tuple[int, int]:
        """Return (tokens of the longest text, tokens that may be written about it); raises RequestError.

        A text over its own bound is given as over both.
        """
        wish = parse_wish(request)
        longest = max(self._length(text, wish) for text in wish.texts)
        over = self.context_tokens if 0 < self._limits.text < longest else 0
        return longest + over, self._most_new(wish.over(self._rules), wish)

    def submit(self, ticket: int, request: Request) -> None:
        """Take a request whose texts and answers fit; raises RequestError, `too_large` for one that does not."""
        wish = parse_wish(request)
        answers = [self._answer(text, at, wish) for at, text in enumerate(wish.texts)]
        self._jobs[ticket] = _Job(
            ticket=ticket,
            many=wish.many,
            stream=request.stream,
            waiting=deque(answers),
            tokens_in=sum(len(answer.tokens) for answer in answers),
        )

    def cancel(self, ticket: int) -> bool:
        """Let go of a request and its memory at once."""
        return self._jobs.pop(ticket, None) is not None

    def step(self) -> list[Piece]:
        """Write a token of every answer; of the texts that are not read yet, one is read in each step."""
        pieces: list[Piece] = []
        batch = len(self._jobs)
        begun = False
        for job in list(self._jobs.values()):
            if job.current is None:
                if begun:
                    continue
                begun = True
            piece = self._advance(job, batch)
            if piece is not None:
                pieces.append(piece)
                if piece.final:
                    del self._jobs[job.ticket]
        return pieces

    def close(self) -> None:
        """Let go of everything in the making, and free the model."""
        self._jobs.clear()
        self._model.close()

    def _length(self, text: str, wish: Wish) -> int:
        """Return a text's tokens, or fewer where they are too many anyway and counting would take long."""
        least = self._tokenizer.least_tokens(text)
        if 0 < self._limits.text < least:
            return least
        return len(self._wording.put(text, wish.source, wish.target).tokens)

    def _answer(self, text: str, at: int, wish: Wish) -> _Answer:
        field = f"inputs[{at}]" if wish.many else "inputs"
        self._check_fits(self._tokenizer.least_tokens(text), field)
        worded: Worded = self._wording.put(text, wish.source, wish.target)
        self._check_fits(len(worded.tokens), field)
        if not worded.tokens:
            raise RequestError("bad_request", f"{field}: the text has no tokens for this model")
        rules = wish.over(worded.rules)
        start = rules.decoder_start_token_id
        return _Answer(worded.tokens, rules, self._most_new(rules, wish) + 1, [start])

    def _check_fits(self, tokens: int, field: str) -> None:
        if 0 < self._limits.text < tokens:
            message = f"{field}: {tokens} tokens or more are over the model's {self._limits.text}"
            raise RequestError("too_large", message)

    def _most_new(self, rules: Rules, wish: Wish) -> int:
        """Return how long an answer may get; what the asker names must fit, what the folder names is made to."""
        most = rules.most_new_tokens
        if {"max_length", "max_new_tokens"} & wish.settings.keys() and most > self._bounded(most):
            message = f"parameters: {most} tokens of an answer are over the model's {self._limits.answer - 1}"
            raise RequestError("too_large", message)
        return self._bounded(most)

    def _bounded(self, tokens: int) -> int:
        return min(tokens, self._limits.answer - 1) if self._limits.answer else tokens

    def _advance(self, job: _Job, batch: int) -> Piece | None:
        """Write one token of a job; return what there is to say."""
        started = time.perf_counter()
        failure: RequestError | None = None
        text = ""
        try:
            text = self._write(job)
        except Exception as error:  # noqa: BLE001 - one text, whatever it trips over, must cost only itself
            failure = failure_of(error)
        job.compute_ms += (time.perf_counter() - started) * 1000
        if failure is not None:
            return _piece(job, batch, code=failure.code, message=failure.message)
        if job.current is None and not job.waiting:
            return _piece(job, batch, body=self._last_body(job, text))
        return _piece(job, batch, body=self._body(text), final=False) if job.stream and text else None

    def _write(self, job: _Job) -> str:
        """Write one token and return the text that it makes certain, for a stream; keep a finished text."""
        answer = job.current
        if answer is None:
            answer = job.current = job.waiting.popleft()
            answer.reading = self._model.read(answer.tokens)
        assert answer.reading is not None
        scores = self._model.step(answer.reading, answer.written)
        answer.written.append(next_token(scores, answer.written, answer.tokens, answer.rules, answer.most))
        job.tokens_out += 1
        if not answer.finished:
            return self._certain(answer) if job.stream else ""
        whole = self._tokenizer.decode(answer.written)
        job.texts.append(whole)
        job.current = None
        return whole.removeprefix(answer.said)

    def _certain(self, answer: _Answer) -> str:
        """Return what a token adds to the text; nothing while a letter is incomplete."""
        text = self._tokenizer.decode(answer.written)
        if text.endswith(_BROKEN) or not text.startswith(answer.said):
            return ""
        piece = text[len(answer.said) :]
        answer.said = text
        return piece

    def _last_body(self, job: _Job, text: str) -> bytes:
        """Return the whole answer, or what ends a stream."""
        if job.stream:
            return self._body(text)
        outputs = [{self._member: text} for text in job.texts]
        return render_outputs(outputs if job.many else outputs[0])

    def _body(self, text: str) -> bytes:
        return render_outputs({self._member: text})


def _piece(job: _Job, batch: int, *, body: bytes = b"", final: bool = True, code: str = "", message: str = "") -> Piece:
    return Piece(
        ticket=job.ticket,
        body=body,
        final=final,
        code=code,
        message=message,
        compute_ms=job.compute_ms,
        batch=batch,
        tokens_in=job.tokens_in,
        tokens_out=job.tokens_out,
    )


def open_seq2seq(artifact: Artifact, manifest: Manifest, open_graph: Open, *, slots: int) -> Seq2seqSession:
    """Open a folder of Optimum's or transformers.js's layout; raises ModelError."""
    if manifest.task not in MEMBERS:
        raise ModelError(f"the task {manifest.task!r} is not one of an encoder-decoder")
    config = artifact.read_json("config.json")
    tokenizer = load_tokenizer(artifact)
    rules = load_rules(config, artifact.read_json("generation_config.json"))
    wording = Wording(artifact, tokenizer, rules, manifest.task)
    positions = config.get("max_position_embeddings")
    bound = positions if isinstance(positions, int) and positions > 0 else 0
    text = manifest.limits.context_tokens or load_special(artifact, tokenizer).max_tokens or bound
    limits = Limits(text=min(text, bound) if bound and text else text, answer=bound)
    graphs = Graphs(find_layout(artifact), open_graph)
    return Seq2seqSession(graphs, tokenizer, wording, rules, limits, member=MEMBERS[manifest.task], slots=slots)
