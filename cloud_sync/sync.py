"""One sync pass, `python -m cloud_sync.sync`: check, fetch, verify, stage, leave.

Settings as JSON on standard input, events as JSON lines on standard output (`sync_settings`), one exit code.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from cloud_sync import errors
from cloud_sync.disk import locked, make_folder, read_whole, store_error
from cloud_sync.objects import StorageSettings
from cloud_sync.objects_open import open_objects
from cloud_sync.pace import Paced
from cloud_sync.retry import Retry
from cloud_sync.store import Store
from cloud_sync.sync_pass import SyncPass
from cloud_sync.sync_settings import (
    EXIT_BAD_SETTINGS,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_LOCKED,
    SyncError,
    SyncEvent,
    SyncOutcome,
    SyncSettings,
)
from cloud_sync.trust import MAX_ROOT_BYTES, Trust, parse_time
from cloud_sync.trust_store import TrustStore

MAX_SETTINGS_BYTES: Final = 1 << 20
NICENESS: Final = 10


def main() -> int:
    """Run a pass over the settings on standard input and return the exit code."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    try:
        settings = msgspec.json.decode(sys.stdin.buffer.read(MAX_SETTINGS_BYTES), type=SyncSettings)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        _emit(SyncError("bad_settings", str(error)))
        return EXIT_BAD_SETTINGS
    try:
        return _run(settings)
    except errors.CloudError as error:
        _emit(SyncError(error.code, error.message))
        return EXIT_LOCKED if error.code == "locked" else EXIT_FAILED
    except Exception as error:  # noqa: BLE001  The agent must hear of a fault of ours as of any other.
        traceback.print_exc()
        _emit(SyncError("internal", f"{type(error).__name__}: {error}"))
        return EXIT_FAILED


def _run(settings: SyncSettings) -> int:
    state = Path(settings.state_dir)
    try:
        make_folder(state)
    except OSError as error:
        raise store_error(error, state) from error
    with locked(state / "sync.lock"):
        outcome = sync_once(settings, state)
    _emit(outcome)
    whole = not outcome.errors and all(model.staged for model in outcome.models)
    return EXIT_DONE if whole else EXIT_FAILED


def sync_once(settings: SyncSettings, state: Path) -> SyncOutcome:
    """Open what a pass needs, run it and return its outcome; raises the errors of `cloud_sync.errors`."""
    pinned = read_whole(Path(settings.root), MAX_ROOT_BYTES)
    if pinned is None:
        raise errors.TrustError("no_root", f"the pinned root {settings.root} cannot be read")
    retry = Retry(attempts=settings.attempts, base_s=settings.backoff_s)
    objects = _open(settings)
    try:
        trust = Trust(
            objects,
            TrustStore(state / "trust"),
            pinned,
            now=datetime.now(UTC),
            built=parse_time(settings.built),
            retry=retry,
        )
        store = Store(state, reserve_bytes=settings.reserve_bytes)
        outcome = SyncPass(settings, objects, trust, store, retry, _emit).run()
    except OSError as error:
        raise store_error(error, state) from error
    return msgspec.structs.replace(outcome, bytes_in=objects.bytes_in)


def _open(settings: SyncSettings) -> Paced:
    storage = StorageSettings(
        endpoint=settings.endpoint,
        region=settings.region,
        credentials=settings.credentials,
        profile=settings.profile,
    )
    return Paced(
        open_objects(settings.repository, storage),
        min_bytes_s=settings.min_bytes_s,
        window_s=settings.slow_window_s,
    )


def _emit(event: SyncEvent) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    # Threads that were given up still read; they must not hold the process.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
