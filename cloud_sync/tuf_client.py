"""A TUF client on the command line: the verifier and store that boxes use, over plain HTTP.

`python -m cloud_sync.tuf_client` takes the commands of the public TUF conformance suite, so that the suite judges what
runs on a box. Exit code 0, or 1 with the error on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import urlopen

from cloud_sync.disk import read_whole, write_durably
from cloud_sync.errors import CloudError, FetchError, NotFoundError
from cloud_sync.objects import CHUNK_BYTES, Blob
from cloud_sync.retry import Retry
from cloud_sync.trust import MAX_ROOT_BYTES, Trust
from cloud_sync.trust_store import TrustStore

TIMEOUT_S: Final = 30.0
MAX_TARGET_BYTES: Final = 64 << 20
LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""A client without a date of its own build: what the repository signed is its only floor."""
ONCE: Final = Retry(attempts=1)
PINNED: Final = "pinned.root"


class HttpObjects:
    """A repository behind two addresses that end in `/`, read only."""

    def __init__(self, metadata_url: str, target_url: str) -> None:
        self._addresses = {"metadata": metadata_url, "targets": target_url}

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> Blob:
        """Return an object; ranges are not for this door."""
        if start or length is not None:
            raise FetchError("refused", "ranges are not asked for here")
        kind, _, path = key.partition("/")
        try:
            response = urlopen(self._addresses[kind] + quote(path, safe="/%"), timeout=TIMEOUT_S)  # noqa: S310 - as told
        except HTTPError as error:
            error.close()
            if error.code in {403, 404}:
                raise NotFoundError(key) from error
            raise FetchError("server_error", f"{key}: HTTP {error.code}") from error
        except (URLError, TimeoutError, ValueError) as error:
            raise FetchError("unreachable", f"{key}: {error}") from error

        def chunks() -> Generator[bytes]:
            with response:
                try:
                    while chunk := response.read(CHUNK_BYTES):
                        yield chunk
                except OSError as error:
                    raise FetchError("truncated", f"{key}: {error}") from error

        return Blob("", chunks())

    def put(self, key: str, data: bytes | Path, *, only_new: bool = False, if_match: str | None = None) -> str:
        """Refuse to write."""
        del data, only_new, if_match
        raise FetchError("refused", f"{key} cannot be written over HTTP")

    def exists(self, key: str) -> bool:
        """Refuse to look."""
        raise FetchError("refused", f"{key} cannot be looked for over HTTP")

    def names(self, prefix: str) -> Iterator[str]:
        """Refuse to list."""
        raise FetchError("refused", f"{prefix} cannot be listed over HTTP")

    def delete(self, key: str) -> None:
        """Refuse to delete."""
        raise FetchError("refused", f"{key} cannot be deleted over HTTP")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (CloudError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cloud_sync.tuf_client", description=__doc__)
    parser.add_argument("--metadata-dir", type=Path, required=True, help="where trusted metadata is kept")
    parser.add_argument("--metadata-url", default="", help="where metadata is fetched, ending in /")
    parser.add_argument("--target-name", action="append", default=[], help="a target to download")
    parser.add_argument("--target-dir", type=Path, help="where targets are written")
    parser.add_argument("--target-base-url", default="", help="where targets are fetched, ending in /")
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("init", help="pin a root")
    first.add_argument("root", type=Path, help="the first trusted root.json")
    first.set_defaults(run=_init)
    commands.add_parser("refresh", help="bring metadata up to date").set_defaults(run=_refresh)
    commands.add_parser("download", help="bring targets too").set_defaults(run=_download)
    return parser


def _init(options: argparse.Namespace) -> None:
    root = options.root.read_bytes()
    write_durably(options.metadata_dir / PINNED, root)
    TrustStore(options.metadata_dir).save("root", root)


def _refresh(options: argparse.Namespace) -> Trust:
    objects = HttpObjects(options.metadata_url, options.target_base_url)
    pinned = read_whole(options.metadata_dir / PINNED, MAX_ROOT_BYTES) or b""
    store = TrustStore(options.metadata_dir)
    trust = Trust(objects, store, pinned, now=datetime.now(UTC), built=LONG_AGO, retry=ONCE)
    trust.refresh()
    return trust


def _download(options: argparse.Namespace) -> None:
    trust = _refresh(options)
    for name in options.target_name:
        data = trust.target(name, MAX_TARGET_BYTES)
        path = options.target_dir / quote(name, safe="")
        if read_whole(path, MAX_TARGET_BYTES) != data:
            write_durably(path, data)


if __name__ == "__main__":
    sys.exit(main())
