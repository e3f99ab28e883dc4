"""Gathers what the fleet is told of this box: its models, its failures, what it saw of the repository, its bytes."""

from __future__ import annotations

import importlib.metadata

import msgspec

from agent.activation import Activation
from agent.health import Health
from cloud_sync.errors import CloudError
from cloud_sync.report import Bytes, FailedVersion, Report, RepositoryReport
from cloud_sync.sync_settings import SyncOutcome

SOFTWARE = importlib.metadata.version("spillway-edge")


class Reporter:
    """Knows what models and health do not: `bytes` is counted by whoever sends them."""

    def __init__(self, device: str) -> None:
        self.bytes = Bytes()
        self._device = device
        self._repository = RepositoryReport()

    def looked(self, outcome: SyncOutcome) -> None:
        """Note what a look at the repository found."""
        self.bytes.fetched += outcome.bytes_in
        problem = outcome.errors[0] if outcome.errors else None
        self._repository = RepositoryReport(
            issued=outcome.issued,
            expires=outcome.expires,
            metadata_versions=outcome.metadata_versions,
            clock_trusted=outcome.clock_trusted,
            code=problem.code if problem else "",
            message=problem.message if problem else "",
        )

    def could_not_look(self, problem: CloudError) -> None:
        """Note why the repository could not be read; what was seen before stands."""
        self._repository = msgspec.structs.replace(self._repository, code=problem.code, message=problem.message)

    def report(self, health: Health, activation: Activation) -> Report:
        """Return what the fleet is told now."""
        return Report(
            device=self._device,
            state=health.state,
            software=SOFTWARE,
            models=activation.reports(),
            failed=[
                FailedVersion(digest, failure.code, failure.message, failure.label)
                for digest, failure in activation.failures.items()
            ],
            repository=self._repository,
            bytes=self.bytes,
        )
