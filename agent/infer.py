"""`spillway infer`: ask a model here and now, without a broker and without the agent."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import logging
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.exits import EXIT_FAILED, EXIT_OK, config_if_there, config_option
from agent.opening import Found, Opened, OpenError, find_model, opened
from agent.telling import text_of
from models.answer import render_error
from models.body import IMAGES, JSON, SOUNDS, TEXT, Body, parse_body, type_errors
from models.channel import Piece
from models.errors import RequestError
from models.manifest import Golden
from models.request import Dialect, Request

EXAMPLES: Final = """\
examples:
  spillway infer language 'Wo ist der Bahnhof?'      a model of this box
  spillway infer ./digits @three.png @four.png       a folder, and two files
  spillway infer sea-temperature < months.json       JSON from standard input
  spillway infer language 'Bonjour' --parameters '{"top_k": 3}'
  spillway infer assistant 'What does ls do?' --stream
  spillway infer digits                              what the model takes

MODEL is the name of a model on this box (NAME or NAME@VERSION), a folder with a spillway.toml, a folder as a hub has
it, or a .onnx or .tflite file. It runs in a worker of its own, confined as the agent's are.
"""
MAX_SHOWN: Final = 160
TAKES: Final = {
    "audio-classification": "a sound (WAV)",
    "automatic-speech-recognition": "a sound (WAV)",
    "feature-extraction": "a text",
    "image-classification": "a picture (JPEG, PNG)",
    "image-segmentation": "a picture (JPEG, PNG)",
    "object-detection": "a picture (JPEG, PNG)",
    "question-answering": '{"inputs": {"question": TEXT, "context": TEXT}}',
    "summarization": "a text",
    "tabular-classification": '{"inputs": [NUMBERS]}: a row, or a list of rows',
    "tabular-regression": '{"inputs": [NUMBERS]}: a row, or a list of rows',
    "tensors": '{"inputs": [{"name", "shape", "datatype", "data"}]}',
    "text-classification": "a text",
    "text-generation": 'a text, or {"messages": [{"role": "user", "content": TEXT}]}',
    "time-series-forecasting": '{"inputs": [NUMBERS]}: a series, oldest first',
    "token-classification": "a text",
    "translation": "a text",
}
"""What a task's models take, for people."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a model's name on this box, a folder, or a graph's file")
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="*", help="a text, `@FILE` for a file's contents, or `-` for standard input"
    )
    parser.add_argument("--parameters", metavar="JSON", default="", help="the request's parameters, a JSON object")
    parser.add_argument("--content-type", default="", help="what the input is (default: told by its bytes)")
    parser.add_argument("--variant", default="", help="one of the model's variants (default: the first that fits)")
    parser.add_argument("--threads", type=int, default=0, help="threads of the runtime (default: as the agent)")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="seconds that one answer may take (60)")
    parser.add_argument("--stream", action="store_true", help="print a generated text as it comes")
    parser.add_argument("--json", action="store_true", help="print each answer's JSON on a line of its own")
    config_option(parser)


def run(options: argparse.Namespace) -> int:
    """Answer every input; 1 if one has an error for an answer."""
    logging.getLogger("agent.workers").setLevel(logging.CRITICAL)  # what a person needs to know is said below
    try:
        return asyncio.run(_run(options))
    except (OpenError, RequestError, OSError) as error:
        print(f"spillway: {error}", file=sys.stderr)
        return EXIT_FAILED


async def _run(options: argparse.Namespace) -> int:
    config = config_if_there(options.config)
    found = await find_model(options.model, config, options.variant)
    piped = b"" if options.inputs or sys.stdin.isatty() else sys.stdin.buffer.read()
    if not options.inputs and not piped:
        print(describe(found))
        return EXIT_OK
    bodies = [_body(*read_input(text), options) for text in options.inputs] or [_body(piped, "", options)]
    failed = 0
    async with opened(found, config, threads=options.threads) as model:
        for body in bodies:
            failed += not await _answer(model, body, options)
    if failed:
        print(f"\n{describe(found)}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_OK


async def _answer(model: Opened, body: Body, options: argparse.Namespace) -> bool:
    """Ask and print; False for an error."""
    request = model.request(body, stream=options.stream)
    async with contextlib.aclosing(model.pieces(request, options.timeout_s * 1e3)) as pieces:
        async for piece in pieces:
            _show(piece, request, options)
            if piece.final:
                _tell(model, piece)
                return not piece.code
    return False


def _show(piece: Piece, request: Request, options: argparse.Namespace) -> None:
    if piece.code and not options.json:
        print(f"{piece.code}: {piece.message}", file=sys.stderr)
    elif options.json:
        body = render_error(request.dialect, piece.code, piece.message) if piece.code else piece.body
        print(body.decode(), flush=True)
    else:
        print(text_of(msgspec.json.decode(piece.body)), end="\n" if piece.final else "", flush=True)


def _tell(model: Opened, piece: Piece) -> None:
    """Say on standard error who answered and how fast."""
    tokens = f", {piece.tokens_in} tokens in" if piece.tokens_in else ""
    tokens += f", {piece.tokens_out} out" if piece.tokens_out else ""
    found = model.found
    told = f"{found.version.label}, {found.manifest.format} {found.variant.name}"
    print(f"[{told}, {piece.compute_ms:.1f} ms{tokens}; loaded in {model.load_s:.2f} s]", file=sys.stderr)


def describe(found: Found) -> str:
    """Return what a model takes, in a few lines."""
    manifest = found.manifest
    takes = TAKES.get(manifest.task, "a request as docs/protocol.md has it")
    if manifest.limits.context_tokens:
        takes += f", of at most {manifest.limits.context_tokens} tokens"
    lines = [f"{found.version.label}: {manifest.task}", f"takes: {takes}"]
    example = next((shown for golden in manifest.golden if (shown := _example(golden))), "")
    return "\n".join([*lines, f"such as: {example}"] if example else lines)


def _example(golden: Golden) -> str:
    if golden.content_type not in {JSON, TEXT}:
        return ""
    text = golden.body.decode(errors="replace")
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _body(raw: bytes, kind: str, options: argparse.Namespace) -> Body:
    """Return the request's body; raises RequestError that names what is wrong."""
    body = parse_body(options.content_type or kind or None, raw)
    if not options.parameters:
        return body
    return with_parameters(body, _parameters(options.parameters))


def read_input(text: str) -> tuple[bytes, str]:
    """Return an input's bytes, and its content type where that is not to be told from them."""
    if text == "-":
        return sys.stdin.buffer.read(), ""
    if text.startswith("@"):
        return Path(text[1:]).read_bytes(), ""
    if not text.lstrip().startswith("{"):
        with contextlib.suppress(OSError, ValueError):
            if Path(text).is_file():
                print(f"spillway: {text} is taken as a text; @{text} would be the file", file=sys.stderr)
        return text.encode(), TEXT
    return text.encode(), JSON


def _parameters(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except type_errors as error:
        raise RequestError("bad_request", f"--parameters: {error}") from error


def with_parameters(body: Body, parameters: dict[str, Any]) -> Body:
    """Return a body with parameters; texts, images and sounds become JSON for it. Raises RequestError."""
    if body.dialect is not Dialect.HUGGINGFACE:
        raise RequestError("bad_request", "--parameters: go with `inputs` only; write them into the JSON here")
    if body.content_type in IMAGES | SOUNDS:
        fields: dict[str, Any] = {"inputs": base64.b64encode(body.body).decode()}
    elif body.content_type == TEXT:
        fields = {"inputs": body.body.decode()}
    else:
        fields = msgspec.json.decode(body.body)
    known = fields.get("parameters") or {}
    return Body(JSON, Dialect.HUGGINGFACE, msgspec.json.encode({**fields, "parameters": {**known, **parameters}}))
