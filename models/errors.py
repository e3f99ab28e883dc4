"""Errors that an asker or an operator can see, and whose fault each is. Pure: no I/O, no clock."""

from __future__ import annotations

from typing import Final

HTTP_STATUS: Final[dict[str, int]] = {
    "bad_request": 400,
    "forbidden": 403,
    "model_not_found": 404,
    "too_large": 413,
    "quota_exceeded": 429,
    "cancelled": 499,
    "model_failed": 500,
    "internal": 500,
    "cloud_unavailable": 502,
    "overloaded": 503,
    "deadline_exceeded": 504,
}
"""Codes of PROTOCOL 3 and their HTTP status."""

RETRYABLE: Final[frozenset[str]] = frozenset(
    {"quota_exceeded", "internal", "cloud_unavailable", "overloaded", "deadline_exceeded"}
)
"""Codes where asking again later can help."""


class RequestError(Exception):
    """A request that ends in one of the codes of PROTOCOL 3; the message is for the asker."""

    def __init__(self, code: str, message: str) -> None:
        if code not in HTTP_STATUS:
            raise ValueError(f"unknown error code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def retryable(self) -> bool:
        """Whether asking again later can help."""
        return self.code in RETRYABLE


class ModelError(Exception):
    """A model that cannot be opened or does not do what its manifest says; the version is at fault."""


def failure_of(error: Exception) -> RequestError:
    """Return what an asker is told of an exception: his own fault, the model's, else ours."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ModelError):
        return RequestError("model_failed", str(error))
    if isinstance(error, MemoryError):
        return RequestError("model_failed", "the model ran out of memory")
    return RequestError("internal", f"{type(error).__name__} while answering")
