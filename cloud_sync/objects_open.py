"""Opens the storage that a repository's address names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from cloud_sync.errors import FetchError
from cloud_sync.objects import Objects, StorageSettings
from cloud_sync.objects_file import FileObjects


def open_objects(url: str, settings: StorageSettings) -> Objects:
    """Open `file:///folder` or `s3://bucket/prefix`; raises FetchError `bad_address` for anything else."""
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return FileObjects(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        # boto3 costs half a second and 50 MB, which a folder does not need.
        from cloud_sync.objects_s3 import S3Objects  # noqa: PLC0415

        return S3Objects.open(parts.netloc, parts.path.strip("/"), settings)
    raise FetchError("bad_address", f"{url!r} is neither file:///folder nor s3://bucket/prefix")
