"""The runtimes that bench/generation.py measures, each behind the same two questions: one text, and many at once."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og

Tokens = Sequence[int]


class Timing:
    """When each token came: `first_s` after the asking, `rate` in tokens/s of all that came after the first ones."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._processor = time.process_time()
        self.first_s = 0.0
        self.rate = 0.0
        self.cpu_first_s = 0.0
        self.cpu_rate = 0.0

    def first(self) -> None:
        """Every text has its first token."""
        self._first = time.perf_counter()
        self._cpu_first = time.process_time()
        self.first_s = self._first - self._began
        self.cpu_first_s = self._cpu_first - self._processor

    def end(self, tokens: int) -> Timing:
        """Every text is at its end; `tokens` came since the first ones."""
        if tokens:
            self.rate = tokens / (time.perf_counter() - self._first)
            self.cpu_rate = tokens / (time.process_time() - self._cpu_first)
        return self


class Peer(Protocol):
    name: str

    def write(self, prompts: Sequence[Tokens], count: int) -> Timing:
        """Continue every prompt by `count` likeliest tokens, none of them the end."""


def genai_model(folder: Path, threads: int, streams: int) -> Any:
    config = og.Config(str(folder))
    config.overlay(
        json.dumps(
            {
                "model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}},
                "engine": {"static_batching": {"max_batch_size": streams}},
            }
        )
    )
    return og.Model(config)


class GenaiGenerator:
    """onnxruntime-genai's `Generator`: one for each text, stepped in turn."""

    name = "genai Generator"

    def __init__(self, model: Any) -> None:
        self._model = model

    def write(self, prompts: Sequence[Tokens], count: int) -> Timing:
        timing = Timing()
        texts = [self._begin(prompt, count) for prompt in prompts]
        timing.first()
        for _ in range(count - 1):
            for text in texts:
                text.generate_next_token()
                text.get_next_tokens()
        return timing.end(len(texts) * (count - 1))

    def _begin(self, prompt: Tokens, count: int) -> Any:
        params = og.GeneratorParams(self._model)
        length = len(prompt) + count
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        text = og.Generator(self._model, params)
        text.append_tokens(np.array(prompt, dtype=np.int32))
        text.generate_next_token()
        text.get_next_tokens()
        return text


class GenaiEngine:
    """onnxruntime-genai's `Engine`: its own batches."""

    name = "genai Engine"

    def __init__(self, model: Any) -> None:
        self._engine = og.Engine(model)
        self._events = self._engine.create_event_buffer(64)

    def write(self, prompts: Sequence[Tokens], count: int) -> Timing:
        timing = Timing()
        requests = [self._engine.create_request() for _ in prompts]
        for request, prompt in zip(requests, prompts, strict=True):
            options = og.TurnOptions(request)
            options.set_max_generated_tokens(count)
            options.set_min_generated_tokens(count)
            request.begin_turn(np.array(prompt, dtype=np.int32), options)
        came, firsts = 0, 0
        while self._engine.has_pending_requests():
            for event in self._engine.run(self._events):
                came += bool(event.flags.value & og.EngineEventFlags.TOKEN.value)
            if not firsts and came >= len(prompts):
                timing.first()
                firsts = came
        for request in requests:
            request.close()
        return timing.end(came - firsts)


class PlainLoop:
    """ONNX Runtime driven directly, past and present bound to one buffer; texts of equal length only."""

    name = "plain onnxruntime loop"

    def __init__(self, folder: Path, threads: int, streams: int, context: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = config["decoder"]
        self._vocabulary = config["vocab_size"]
        self._past = [node.name for node in self._session.get_inputs() if node.name.startswith("past")]
        sizes = (len(self._past), streams, decoder["num_key_value_heads"], context, decoder["head_size"])
        self._cache = np.zeros(sizes, np.float32)

    def write(self, prompts: Sequence[Tokens], count: int) -> Timing:
        timing = Timing()
        tokens = np.array(prompts, dtype=np.int64)
        binding = self._session.io_binding()
        self._bind_cache(binding, len(prompts))
        length = tokens.shape[1]
        tokens = self._run(binding, tokens, length)
        timing.first()
        for at in range(1, count):
            tokens = self._run(binding, tokens, length + at)
        return timing.end(len(prompts) * (count - 1))

    def _bind_cache(self, binding: Any, rows: int) -> None:
        shape = (rows, *self._cache.shape[2:])
        for at, past in enumerate(self._past):
            present = past.replace("past_key_values", "present")
            address = self._cache[at].ctypes.data
            binding.bind_input(past, "cpu", 0, np.float32, shape, address)
            binding.bind_output(present, "cpu", 0, np.float32, shape, address)

    def _run(self, binding: Any, tokens: Any, length: int) -> Any:
        rows, count = tokens.shape
        mask = np.ones((rows, length), np.int64)
        logits = np.empty((rows, count, self._vocabulary), np.float32)
        binding.bind_input("input_ids", "cpu", 0, np.int64, tokens.shape, tokens.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, mask.shape, mask.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return np.ascontiguousarray(logits[:, -1].argmax(-1)[:, None])


class Llama:
    """llama.cpp on the same weights."""

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int, streams: int, context: int, vocabulary: int) -> None:
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p())
        self._model = llama_cpp.llama_load_model_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = context * streams, context, streams
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_new_context_with_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)
        self._vocabulary = vocabulary

    def write(self, prompts: Sequence[Tokens], count: int) -> Timing:
        timing = Timing()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), 1)
        last = []
        for row, prompt in enumerate(prompts):
            self._fill([(token, at, row, at == len(prompt) - 1) for at, token in enumerate(prompt)])
            last += self._decode([len(prompt) - 1])
        timing.first()
        for step in range(count - 1):
            places = enumerate(zip(last, prompts, strict=True))
            self._fill([(token, len(prompt) + step, row, True) for row, (token, prompt) in places])
            last = self._decode(range(len(prompts)))
        return timing.end(len(prompts) * (count - 1))

    def _fill(self, items: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(items)
        for at, (token, place, row, wanted) in enumerate(items):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, place, 1
            batch.seq_id[at][0], batch.logits[at] = row, wanted

    def _decode(self, wanted: Sequence[int]) -> list[int]:
        if llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError("llama.cpp cannot decode")
        rows = [llama_cpp.llama_get_logits_ith(self._context, at) for at in wanted]
        return [int(np.ctypeslib.as_array(row, shape=(self._vocabulary,)).argmax()) for row in rows]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silence(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    del level, text, data
