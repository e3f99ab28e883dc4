"""Opens a model outside the agent, in the same confined worker: by its name on this box, or from a folder."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import msgspec

from agent.board import cores
from agent.config import Config, Limits
from agent.machine import box_facts
from agent.shelf import Shelf, ShelfError, Stored, load_shelf
from agent.workers import ENDED, Version, Worker, WorkerEndedError
from models.backend_settings import BackendSettings
from models.body import Body
from models.channel import Piece
from models.errors import ModelError
from models.manifest import Manifest, ManifestError, Variant, digest_of, parse_manifest, pick_variant
from models.request import Request

DEFAULT_STATE = "/var/lib/spillway"
DESCRIBE_TIMEOUT_S = 60.0


class OpenError(Exception):
    """A model that cannot be opened; the message says what to do."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be opened: `variant` is what runs on this box."""

    version: Version
    manifest: Manifest
    variant: Variant


async def find_model(what: str, config: Config | None, variant: str = "") -> Found:
    """Return the model that `what` names: a folder, a graph's file, NAME, or NAME@VERSION on this box.

    Raises OpenError.
    """
    state = Path(config.state.directory if config else DEFAULT_STATE)
    path = await asyncio.to_thread(_path_of, what, state)
    if path is not None:
        return await _of_path(path, variant)
    try:
        return _found(_stored(what, await asyncio.to_thread(load_shelf, state)), variant)
    except ShelfError as error:
        raise OpenError(f"{what!r} is no folder, and as a model's name it cannot be looked up: {error}") from error


def _path_of(what: str, state: Path) -> Path | None:
    """Return the path that is meant; a model of this box comes before a folder here of the same name."""
    path = Path(what)
    if not path.exists():
        return None
    if "/" not in what and path.is_dir():
        with contextlib.suppress(ShelfError):
            if what in load_shelf(state).running:
                return None
    return path.resolve()


def _stored(what: str, shelf: Shelf) -> Stored:
    """Return the version that runs under a name, or the one that is asked for."""
    name, _, version = what.partition("@")
    running = shelf.running.get(name)
    mine = [one for one in shelf.stored.values() if one.manifest.name == name]
    if not version and running is not None and running.digest in shelf.stored:
        return shelf.stored[running.digest]
    if not mine:
        known = ", ".join(sorted({one.manifest.name for one in shelf.stored.values()})) or "none"
        raise OpenError(f"{name!r} is neither a folder nor a model on this box, which has: {known}")
    chosen = [one for one in mine if one.manifest.version == version]
    if not chosen:
        there = ", ".join(sorted(f"{name}@{one.manifest.version}" for one in mine))
        raise OpenError(f"{what!r} is not what this box serves; on its disk there are: {there}")
    return chosen[0]


def _found(stored: Stored, variant: str) -> Found:
    return _open(stored.folder, stored.manifest, stored.raw, variant)


async def _of_path(path: Path, variant: str) -> Found:
    """Return a published artifact's folder, or a folder as an admin has it; its description is read in a child."""
    raw = await asyncio.to_thread(_manifest_of, path)
    if raw is None:
        raw = await _described(path)
    try:
        manifest = parse_manifest(raw)
    except ManifestError as error:
        raise OpenError(f"{path}: {error}") from error
    return _open(path, manifest, raw, variant)


def _manifest_of(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return (path / "manifest.json").read_bytes()
    return None


async def _described(path: Path) -> bytes:
    command = (sys.executable, "-I", "-m", "cloud_sync.fleet.describe", str(path))
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
            out, told = await child.communicate()
    except TimeoutError:
        child.kill()
        await child.wait()
        raise OpenError(f"{path}: what it holds was not read within {DESCRIBE_TIMEOUT_S:.0f} s") from None
    if child.returncode:
        raise OpenError((told.decode(errors="replace").strip().splitlines() or ["it cannot be read"])[-1])
    return out


def _open(path: Path, manifest: Manifest, raw: bytes, wanted: str) -> Found:
    """Return what a worker opens: the variant that is asked for, else the first that fits this box."""
    named = [variant for variant in manifest.variants if variant.name == wanted]
    if wanted and not named:
        raise OpenError(f"--variant {wanted}: there are {', '.join(one.name for one in manifest.variants)}")
    try:
        chosen = named[0] if named else pick_variant(manifest, box_facts())
    except ManifestError as error:
        raise OpenError(
            f"{manifest.name}@{manifest.version}: {error}; --variant NAME tries one all the same"
        ) from error
    version = Version(
        name=manifest.name,
        version=manifest.version,
        digest=digest_of(raw),
        folder=path if path.is_dir() else path.parent,
        variant=chosen.name,
        manifest=raw,
    )
    return Found(version=version, manifest=manifest, variant=chosen)


class Opened:
    """A worker that is ready, for a command's own use."""

    def __init__(self, found: Found, worker: Worker, load_s: float) -> None:
        self.found = found
        self.worker = worker
        self.load_s = load_s

    def request(self, body: Body, *, stream: bool = False) -> Request:
        """Return a request to this model."""
        return Request(
            model=self.found.version.name,
            content_type=body.content_type,
            body=body.body,
            dialect=body.dialect,
            client="command",
            stream=stream or bool(body.stream),
        )

    async def pieces(self, request: Request, deadline_ms: float) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of an answer; raises OpenError where the worker ends over it."""
        queue: asyncio.Queue[Piece] = asyncio.Queue()
        ticket = 0
        try:
            ticket = self.worker.ask(request, deadline_ms, queue.put_nowait)
            while True:
                async with asyncio.timeout(deadline_ms / 1e3 + 5.0):
                    piece = await queue.get()
                if piece.code == ENDED:
                    raise OpenError(f"the model's worker ended over this input: {piece.message}")
                yield piece
                if piece.final:
                    return
        except WorkerEndedError as error:
            raise OpenError(str(error)) from error
        except TimeoutError:
            raise OpenError(f"no answer within {deadline_ms / 1e3:g} s") from None
        finally:
            with contextlib.suppress(WorkerEndedError):
                self.worker.cancel(ticket)  # nothing, where the answer is whole


@contextlib.asynccontextmanager
async def opened(found: Found, config: Config | None, *, threads: int = 0, slots: int = 0) -> AsyncIterator[Opened]:
    """Start a worker for a model and end it afterwards; raises OpenError. 0 takes the box's own settings."""
    worker = Worker(found.version)
    started = time.monotonic()
    try:
        limits, backends = (config.limits, config.backends) if config else (Limits(), BackendSettings())
        await worker.start(
            threads=threads or limits.worker_threads or cores(),
            slots=slots or limits.worker_slots,
            backends=backends,
        )
        yield Opened(found, worker, time.monotonic() - started)
    except (ModelError, OSError) as error:
        raise OpenError(f"{found.version.label} cannot be opened: {error}") from error
    finally:
        if worker.pid:
            await worker.stop()
