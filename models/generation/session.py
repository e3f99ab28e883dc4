"""Text generation for several askers: each step moves every running answer on by one token."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from models.answer import render_chat, render_chunk, render_outputs, render_text
from models.artifact import Artifact
from models.channel import Piece
from models.errors import ModelError, RequestError, failure_of
from models.generation.budget import cache_bytes
from models.generation.chat import ChatTemplate, Message, load_template
from models.generation.control import ControlTokens
from models.generation.guided import Grammars
from models.generation.layout import read_layout
from models.generation.opening import open_runtime
from models.generation.options import Sampling, Wish, parse_wish
from models.generation.runtime import Event, Matcher, Runtime, Text
from models.generation.stops import StopWatch
from models.generation.writing import Writing
from models.manifest import Manifest
from models.request import Dialect, Request
from models.tokens import Tokenizer, load_tokenizer

_LIKELIEST: Final = Sampling(temperature=0.0)
DEFAULT_SHARE: Final = 4
"""An asker who names no length may have this part of the context, where the model's folder names none."""


class _Source(msgspec.Struct, frozen=True):
    """What is to be continued, templated; `special` is whether the tokenizer puts its own tokens around it.

    `prefix` is the asker's own text where the answer repeats it.
    """

    text: str
    special: bool
    prefix: str = ""


class _Prompt(msgspec.Struct, frozen=True):
    """A source in tokens."""

    tokens: list[int]
    prefix: str


class _Job(msgspec.Struct):
    """One request; its texts are written one after the other."""

    ticket: int
    wish: Wish
    stream: bool
    chat: bool
    max_tokens: int
    prompts: deque[_Prompt]
    matchers: deque[Matcher | None]
    tokens_in: int
    ident: str
    created: int
    text: Text | None = None
    writing: Writing | None = None
    prefix: str = ""
    texts: list[str] = []
    tokens_out: int = 0
    finish_reason: str = ""
    compute_ms: float = 0.0
    sent: bool = False


class GenerationSession:
    """A generating model with at most `slots` requests in the making at once."""

    fallbacks: Sequence[str] = ()

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        model: str,
        slots: int,
        context_tokens: int = 0,
        default_max_tokens: int = 0,
        sampling: Sampling = _LIKELIEST,
    ) -> None:
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._control = ControlTokens(tokenizer)
        self._grammars = Grammars(tokenizer, runtime.end_tokens)
        self._template = template
        self._model = model
        self._sampling = sampling
        self._jobs: dict[int, _Job] = {}
        self.capacity = max(1, slots)
        self.context_tokens = min(runtime.context_tokens, context_tokens or runtime.context_tokens)
        self.default_max_tokens = min(
            default_max_tokens or -(-self.context_tokens // DEFAULT_SHARE), self.context_tokens
        )
        self.longest_token_bytes = tokenizer.longest_token_bytes
        self.extra_tokens = self._length(self._source_of_text("", full=False))

    @property
    def room(self) -> int:
        """How many more requests can begin now."""
        return self.capacity - len(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether a text is in the making."""
        return bool(self._jobs)

    def count(self, request: Request) -> tuple[int, int]:
        """Return (tokens of the longest prompt, tokens that may be generated for it); raises RequestError."""
        wish = parse_wish(request)
        longest = max(self._length(source) for source in self._sources(wish))
        return longest, wish.max_tokens or self.default_max_tokens

    def submit(self, ticket: int, request: Request) -> None:
        """Take a request that fits the context, answer included; raises RequestError, `too_large` for another."""
        wish = parse_wish(request)
        max_tokens = wish.max_tokens or self.default_max_tokens
        prompts = [self._encode(source, max_tokens) for source in self._sources(wish)]
        matchers = [self._grammars.matcher(wish.guide) if wish.guide else None for _ in prompts]
        job = _Job(
            ticket=ticket,
            wish=wish,
            stream=request.stream,
            chat=request.dialect is Dialect.OPENAI,
            max_tokens=max_tokens,
            prompts=deque(prompts),
            matchers=deque(matchers),
            tokens_in=sum(len(prompt.tokens) for prompt in prompts),
            ident=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
        )
        self._jobs[ticket] = job
        self._begin(job)

    def cancel(self, ticket: int) -> bool:
        """Let go of a request and its memory at once."""
        job = self._jobs.pop(ticket, None)
        if job is not None and job.text is not None:
            self._runtime.stop(job.text)
        return job is not None

    def step(self) -> list[Piece]:
        """Move every text on by a token; of those that have none yet, one computes a part of its prompt."""
        started = time.perf_counter()
        batch = len(self._jobs)
        events = self._runtime.step()
        spent_ms = (time.perf_counter() - started) * 1000
        for job in self._jobs.values():
            job.compute_ms += spent_ms
        owners = {job.text: job for job in self._jobs.values()}
        return [piece for event in events for piece in self._take(owners[event.text], event, batch)]

    def close(self) -> None:
        """Let go of everything in the making, and of the model."""
        self._jobs.clear()
        self._runtime.close()

    def _sources(self, wish: Wish) -> list[_Source]:
        if wish.messages:
            return [self._source_of_messages(wish.messages)]
        return [self._source_of_text(text, full=wish.full_text) for text in wish.texts]

    def _source_of_text(self, text: str, *, full: bool) -> _Source:
        """Template a plain text as one message of a user, or take it as it is where the model does not chat."""
        prefix = text if full else ""
        guarded = self._control.guard(text)
        if self._template is None:
            return _Source(guarded, special=True, prefix=prefix)
        # The template writes the special tokens itself.
        return _Source(self._template.render([Message("user", guarded)]), special=False, prefix=prefix)

    def _source_of_messages(self, messages: list[Message]) -> _Source:
        if self._template is None:
            raise RequestError("bad_request", "messages: this model continues texts and does not chat")
        guarded = [message.mapped(self._control.guard) for message in messages]
        return _Source(self._template.render(guarded), special=False)

    def _length(self, source: _Source) -> int:
        """Return a prompt's tokens, or fewer where they are too many anyway and counting would take long."""
        least = self._tokenizer.least_tokens(source.text)
        if least > self.context_tokens:
            return least
        return len(self._control.encode(source.text, special=source.special))

    def _encode(self, source: _Source, max_tokens: int) -> _Prompt:
        """Return a prompt that fits the context with its answer; raises RequestError."""
        self._check_fits(self._tokenizer.least_tokens(source.text), max_tokens)
        tokens = self._control.encode(source.text, special=source.special)
        if not tokens:
            raise RequestError("bad_request", "inputs: the text has no tokens")
        self._check_fits(len(tokens), max_tokens)
        return _Prompt(tokens, source.prefix)

    def _check_fits(self, tokens_in: int, max_tokens: int) -> None:
        if tokens_in + max_tokens > self.context_tokens:
            message = (
                f"{tokens_in} tokens or more and {max_tokens} to generate are over the model's {self.context_tokens}"
            )
            raise RequestError("too_large", message)

    def _begin(self, job: _Job) -> None:
        """Start the next of a job's texts."""
        prompt = job.prompts.popleft()
        job.prefix = prompt.prefix
        job.text = Text(
            prompt=prompt.tokens,
            max_tokens=job.max_tokens,
            sampling=job.wish.sampling.over(self._sampling),
            matcher=job.matchers.popleft(),
        )
        job.writing = Writing(
            self._tokenizer.stream(),
            StopWatch(job.wish.stops),
            end_tokens=self._runtime.end_tokens,
            max_tokens=job.max_tokens,
        )
        self._runtime.start(job.text)

    def _take(self, job: _Job, event: Event, batch: int) -> list[Piece]:
        """Take a job's next token, or the error that ends it; return what there is to say."""
        failure, text = event.failure, ""
        if failure is None:
            try:
                text = self._write(job, event.token)
            except Exception as error:  # noqa: BLE001 - one text, whatever it trips over, must cost only itself
                self._runtime.stop(event.text)
                failure = error
        if failure is not None:
            del self._jobs[job.ticket]
            told = failure_of(failure)
            return [_piece(job, batch, code=told.code, message=told.message)]
        if job.writing is None and not job.prompts:
            del self._jobs[job.ticket]
            *bodies, last = self._last_bodies(job, text)
            return [*(_piece(job, batch, body=body, final=False) for body in bodies), _piece(job, batch, body=last)]
        if job.writing is None:
            self._begin(job)
        if not (job.stream and text):
            return []
        body = self._chunk(job, text) if job.chat else render_text(text)
        job.sent = True
        return [_piece(job, batch, body=body, final=False)]

    def _write(self, job: _Job, token: int) -> str:
        """Return the text that a token makes certain; a finished text is put with the job's others."""
        writing, text = job.writing, job.text
        assert writing is not None
        assert text is not None
        piece = writing.push(token)
        job.tokens_out += 1
        piece = job.prefix + piece if writing.tokens == 1 else piece
        if writing.finish_reason:
            self._runtime.stop(text)
            job.texts.append(job.prefix + writing.text)
            job.finish_reason = writing.finish_reason
            job.writing = job.text = None
        return piece

    def _last_bodies(self, job: _Job, text: str) -> list[bytes]:
        """Return the whole answer, or what ends a stream."""
        if not job.stream:
            return [self._whole(job)]
        if not job.chat:
            return [render_text(text)]
        bodies = [self._chunk(job, text, finish_reason=job.finish_reason)]
        if job.wish.include_usage:
            bodies.append(self._chunk(job, "", usage=(job.tokens_in, job.tokens_out)))
        return bodies

    def _whole(self, job: _Job) -> bytes:
        if not job.chat:
            outputs = [{"generated_text": text} for text in job.texts]
            return render_outputs(outputs if job.wish.many else outputs[0])
        return render_chat(
            ident=job.ident,
            created=job.created,
            model=self._model,
            text=job.texts[0],
            finish_reason=job.finish_reason,
            tokens_in=job.tokens_in,
            tokens_out=job.tokens_out,
        )

    def _chunk(
        self, job: _Job, text: str, *, finish_reason: str | None = None, usage: tuple[int, int] | None = None
    ) -> bytes:
        return render_chunk(
            ident=job.ident,
            created=job.created,
            model=self._model,
            text=text,
            first=not job.sent,
            finish_reason=finish_reason,
            usage=usage,
        )


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


def open_generation(artifact: Artifact, manifest: Manifest, *, threads: int, slots: int) -> GenerationSession:
    """Open a folder with a decoder, as onnxruntime-genai or Optimum lay it out; raises ModelError."""
    if manifest.task != "text-generation":
        raise ModelError(f"the task {manifest.task!r} cannot be done with the format {manifest.format}")
    layout = read_layout(artifact)
    runtime = open_runtime(
        artifact,
        layout,
        threads=threads,
        seats=max(1, slots),
        max_bytes=cache_bytes(manifest, artifact.files),
        context_tokens=manifest.limits.context_tokens,
    )
    return GenerationSession(
        runtime,
        load_tokenizer(artifact),
        load_template(artifact),
        model=manifest.name,
        slots=slots,
        default_max_tokens=layout.max_new_tokens,
        sampling=layout.sampling,
    )
