"""A repository in an S3 bucket. boto3 retries nothing here: whoever asks decides (`retry`)."""

from __future__ import annotations

import configparser
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    ResponseStreamingError,
)

from cloud_sync.errors import ConflictError, FetchError, NotFoundError
from cloud_sync.objects import CHUNK_BYTES, Blob, StorageSettings

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

CONNECT_S: Final = 15
READ_S: Final = 30
ANONYMOUS: Final = "anonymous"
_CODES: Final = {
    "NoSuchBucket": "no_bucket",
    "SlowDown": "slow_down",
    "RequestTimeTooSkewed": "clock_skewed",
    "RequestTimeout": "server_error",
}
_STATUSES: Final = {401: "forbidden", 403: "forbidden", 408: "server_error", 416: "out_of_range", 429: "slow_down"}


class S3Objects:
    """Objects under a prefix of a bucket."""

    def __init__(self, client: S3Client, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    @classmethod
    def open(cls, bucket: str, prefix: str, settings: StorageSettings) -> S3Objects:
        """Open a bucket; raises FetchError `no_credentials` where the file has none."""
        config = Config(
            connect_timeout=CONNECT_S,
            read_timeout=READ_S,
            retries={"total_max_attempts": 1, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            signature_version=UNSIGNED if settings.credentials == ANONYMOUS else None,
            s3={"addressing_style": "path"} if settings.endpoint else None,
        )
        keys = _credentials(settings)
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=settings.endpoint or None,
            region_name=settings.region or ("us-east-1" if settings.endpoint else None),
            config=config,
            aws_access_key_id=keys.get("aws_access_key_id"),
            aws_secret_access_key=keys.get("aws_secret_access_key"),
            aws_session_token=keys.get("aws_session_token"),
        )
        return cls(client, bucket, prefix)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> Blob:
        """Return an object or a range of it, read as it comes."""
        asked: dict[str, Any] = {}
        last = "" if length is None else start + length - 1
        if start or length is not None:
            asked["Range"] = f"bytes={start}-{last}"
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **asked)
        except (ClientError, BotoCoreError) as error:
            raise _fetch_error(key, error) from error
        if asked and not found.get("ContentRange", "").startswith(f"bytes {start}-{last}"):
            found["Body"].close()
            raise FetchError("wrong_range", f"{key}: {asked['Range']} was asked for, not {found.get('ContentRange')!r}")
        return Blob(found.get("ETag", ""), _chunks(found["Body"], key, length))

    def put(self, key: str, data: bytes | Path, *, only_new: bool = False, if_match: str | None = None) -> str:
        """Write an object with S3's conditional PUT."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if only_new else {}
        if if_match is not None:
            condition["IfMatch"] = if_match
        try:
            if isinstance(data, bytes):
                return self._put(key, data, condition)
            with data.open("rb") as file:
                return self._put(key, file, condition)
        except (ClientError, BotoCoreError) as error:
            raise _fetch_error(key, error) from error

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        except (ClientError, BotoCoreError) as error:
            wrong = _fetch_error(key, error)
            if isinstance(wrong, NotFoundError):
                return False
            raise wrong from error
        return True

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the keys under a prefix, page by page."""
        pages = self._client.get_paginator("list_objects_v2")
        try:
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for found in page.get("Contents", []):
                    yield found["Key"].removeprefix(self._prefix)
        except (ClientError, BotoCoreError) as error:
            raise _fetch_error(prefix, error) from error

    def delete(self, key: str) -> None:
        """Remove an object."""
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        except (ClientError, BotoCoreError) as error:
            raise _fetch_error(key, error) from error

    def _put(self, key: str, body: Any, condition: dict[str, Any]) -> str:
        return self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=body, **condition).get(
            "ETag", ""
        )


def _credentials(settings: StorageSettings) -> dict[str, str]:
    """Read an AWS credentials file; nothing where the environment has them."""
    if settings.credentials in {"", ANONYMOUS}:
        return {}
    parser = configparser.RawConfigParser()
    try:
        with Path(settings.credentials).open(encoding="utf-8") as file:
            parser.read_file(file)
        section = dict(parser[settings.profile])
        keys = {name: section[name] for name in ("aws_access_key_id", "aws_secret_access_key")}
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError) as error:
        raise FetchError("no_credentials", f"{settings.credentials}: {error}") from error
    return keys | {name: section[name] for name in ("aws_session_token",) if name in section}


def _chunks(body: Any, key: str, length: int | None) -> Generator[bytes]:
    left = length
    try:
        while left is None or left > 0:
            chunk = body.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
            if not chunk:
                break
            left = None if left is None else left - len(chunk)
            yield chunk
    except (IncompleteReadError, ResponseStreamingError) as error:
        raise FetchError("truncated", f"{key}: {error}") from error
    except (BotoCoreError, OSError) as error:
        raise FetchError("unreachable", f"{key}: {error}") from error
    finally:
        body.close()
    if left:
        raise FetchError("truncated", f"{key} ends {left} bytes early")


def _fetch_error(key: str, error: ClientError | BotoCoreError) -> FetchError:
    """Return what a refusal of S3, or of the network, means."""
    if isinstance(error, NoCredentialsError):
        return FetchError("no_credentials", f"{key}: {error}")
    if not isinstance(error, ClientError):
        return FetchError("unreachable", f"{key}: {error}")
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _CODES:
        return FetchError(_CODES[code], f"{key}: {error}")
    if status == 404:
        return NotFoundError(key)
    if status in {409, 412}:
        return ConflictError(key)
    return FetchError(_STATUSES.get(status, "server_error" if status >= 500 else "refused"), f"{key}: {error}")
