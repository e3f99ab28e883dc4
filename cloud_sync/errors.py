"""Errors of the way to the cloud; each type says whose fault it is and so what to do. Pure: no I/O, no clock."""

from __future__ import annotations

from typing import Final

RETRYABLE_FETCH: Final = frozenset(
    {"unreachable", "server_error", "slow_down", "truncated", "wrong_range", "corrupt_transfer", "slow_retrieval"}
)
"""Codes of FetchError where another attempt can help."""


class CloudError(Exception):
    """An error with a one-word code, for machines, and a message, for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class TrustError(CloudError):
    """What was signed, or should have been, is not right: never try these bytes again, keep what runs, report."""


class FetchError(CloudError):
    """An object could not be had: try again with jitter, and resume."""

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.code in RETRYABLE_FETCH


class NotFoundError(FetchError):
    """There is no such object."""

    def __init__(self, key: str) -> None:
        super().__init__("not_found", f"{key} is not there")


class ConflictError(FetchError):
    """A conditional write lost: somebody else was first."""

    def __init__(self, key: str) -> None:
        super().__init__("conflict", f"{key} was written by somebody else")


class StoreError(CloudError):
    """The disk could not take or give something: report; fetch once more where it is corrupt."""


class HandoffError(CloudError):
    """A hand-off could not be made or answered; the asker gets an error in time."""
