"""Text generation for several askers: each step moves every running answer on by one token."""

from __future__ import annotations

import time
import uuid
from collections import deque
from typing import Final

import msgspec

from models.answer import render_chat, render_chunk, render_outputs, render_text
from models.artifact import Artifact
from models.channel import Piece
from models.errors import ModelError, RequestError, failure_of
from models.generation.chat import ChatTemplate, Message, load_template
from models.generation.options import Wish, parse_wish
from models.generation.runtime import GenaiRuntime, Runtime
from models.generation.stops import StopWatch
from models.generation.writing import Writing
from models.manifest import Manifest
from models.request import Dialect, Request
from models.tokens import MAX_TOKENIZER_BYTES, Tokenizer

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
    tokens_in: int
    ident: str
    created: int
    writing: Writing | None = None
    prefix: str = ""
    texts: list[str] = []
    tokens_out: int = 0
    finish_reason: str = ""
    compute_ms: float = 0.0
    sent: bool = False


class GenerationSession:
    """A generating model with at most `slots` requests in the making at once."""

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
    ) -> None:
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._template = template
        self._model = model
        self._jobs: dict[int, _Job] = {}
        self.capacity = max(1, slots)
        self.context_tokens = min(runtime.context_tokens, context_tokens or runtime.context_tokens)
        self.default_max_tokens = default_max_tokens or max(1, self.context_tokens // DEFAULT_SHARE)
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
        self._jobs[ticket] = _Job(
            ticket=ticket,
            wish=wish,
            stream=request.stream,
            chat=request.dialect is Dialect.OPENAI,
            max_tokens=max_tokens,
            prompts=deque(prompts),
            tokens_in=sum(len(prompt.tokens) for prompt in prompts),
            ident=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
        )

    def cancel(self, ticket: int) -> bool:
        """Let go of a request and its memory at once."""
        return self._jobs.pop(ticket, None) is not None

    def step(self) -> list[Piece]:
        """Move every text on by a token; of those that have none yet, one computes its prompt in each step."""
        pieces: list[Piece] = []
        batch = len(self._jobs)
        begun = False
        for job in list(self._jobs.values()):
            if job.writing is None or job.writing.tokens == 0:
                if begun:
                    continue
                begun = True
            said = self._advance(job, batch)
            if said and said[-1].final:
                del self._jobs[job.ticket]
            pieces += said
        return pieces

    def close(self) -> None:
        """Let go of everything in the making."""
        self._jobs.clear()

    def _sources(self, wish: Wish) -> list[_Source]:
        if wish.messages:
            return [self._source_of_messages(wish.messages)]
        return [self._source_of_text(text, full=wish.full_text) for text in wish.texts]

    def _source_of_text(self, text: str, *, full: bool) -> _Source:
        """Template a plain text as one message of a user, or take it as it is where the model does not chat."""
        prefix = text if full else ""
        if self._template is None:
            return _Source(text, special=True, prefix=prefix)
        # The template writes the special tokens itself.
        return _Source(self._template.render([Message("user", text)]), special=False, prefix=prefix)

    def _source_of_messages(self, messages: list[Message]) -> _Source:
        if self._template is None:
            raise RequestError("bad_request", "messages: this model continues texts and does not chat")
        return _Source(self._template.render(messages), special=False)

    def _length(self, source: _Source) -> int:
        """Return a prompt's tokens, or fewer where they are too many anyway and counting would take long."""
        least = self._tokenizer.least_tokens(source.text)
        if least > self.context_tokens:
            return least
        return len(self._tokenizer.encode(source.text, special=source.special).ids)

    def _encode(self, source: _Source, max_tokens: int) -> _Prompt:
        """Return a prompt that fits the context with its answer; raises RequestError."""
        self._check_fits(self._tokenizer.least_tokens(source.text), max_tokens)
        tokens = self._tokenizer.encode(source.text, special=source.special).ids
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

    def _advance(self, job: _Job, batch: int) -> list[Piece]:
        """Compute one token of a job; return what there is to say."""
        started = time.perf_counter()
        failure: RequestError | None = None
        text = ""
        try:
            text = self._write(job)
        except Exception as error:  # noqa: BLE001 - one text, whatever it trips over, must cost only itself
            failure = failure_of(error)
        job.compute_ms += (time.perf_counter() - started) * 1000
        if failure is not None:
            return [_piece(job, batch, code=failure.code, message=failure.message)]
        if job.writing is None and not job.prompts:
            *bodies, last = self._last_bodies(job, text)
            return [*(_piece(job, batch, body=body, final=False) for body in bodies), _piece(job, batch, body=last)]
        if not (job.stream and text):
            return []
        body = self._chunk(job, text) if job.chat else render_text(text)
        job.sent = True
        return [_piece(job, batch, body=body, final=False)]

    def _write(self, job: _Job) -> str:
        """Compute one token and return its text; a finished text is put with the job's others."""
        writing = job.writing or self._begin(job)
        before = writing.tokens
        text = writing.step()
        job.tokens_out += writing.tokens - before
        text = job.prefix + text if before == 0 < writing.tokens else text
        if writing.finish_reason:
            job.texts.append(job.prefix + writing.text)
            job.finish_reason = writing.finish_reason
            job.writing = None
        return text

    def _begin(self, job: _Job) -> Writing:
        prompt = job.prompts.popleft()
        generation = self._runtime.start(prompt.tokens, job.max_tokens, job.wish.sampling)
        job.prefix = prompt.prefix
        job.writing = Writing(
            generation,
            self._tokenizer.stream(),
            StopWatch(job.wish.stops),
            end_tokens=self._runtime.end_tokens,
            max_tokens=job.max_tokens,
        )
        return job.writing

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
    """Open a folder of onnxruntime-genai's layout; raises ModelError."""
    if manifest.task != "text-generation":
        raise ModelError(f"the task {manifest.task!r} cannot be done with the format {manifest.format}")
    tokenizer = Tokenizer(artifact.read("tokenizer.json", MAX_TOKENIZER_BYTES))
    settings = artifact.read_json("generation_config.json")
    wanted = settings.get("max_new_tokens")
    return GenerationSession(
        GenaiRuntime(artifact, threads=threads),
        tokenizer,
        load_template(artifact),
        model=manifest.name,
        slots=slots,
        context_tokens=manifest.limits.context_tokens,
        default_max_tokens=wanted if isinstance(wanted, int) and wanted > 0 else 0,
    )
