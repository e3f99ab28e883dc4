"""`spillway-fleet init`: keys, the fleet's certificate authority and the first signed metadata."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from cloud_sync.errors import ConflictError
from cloud_sync.fleet.authority import make_authority
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import FleetConfig, Home
from cloud_sync.fleet.repository import first_metadata
from cloud_sync.objects import read

MAX_FIRST_BYTES = 512 << 10


def initialise(home: Home, config: FleetConfig) -> dict[str, Any]:
    """Make a fleet; raises FleetError where the home or the repository holds one already.

    One that broke off goes on with the same keys and files.
    """
    first = home.folder / "first"
    if home.root.exists() and not first.exists():
        raise FleetError(f"{home.folder} is a fleet's home already")
    if not first.exists():
        _make(home, config)
    objects = home.open_objects()
    for path in sorted(first.iterdir()):
        key, data = f"metadata/{path.name.partition('-')[2]}", path.read_bytes()
        try:
            objects.put(key, data, only_new=True)
        except ConflictError as error:
            if read(objects, key, MAX_FIRST_BYTES)[0] != data:
                raise FleetError(f"{config.repository} holds another fleet's metadata already") from error
    for path in first.iterdir():
        path.unlink()
    first.rmdir()
    return {"home": str(home.folder), "repository": config.repository, "root": str(home.root)}


def _make(home: Home, config: FleetConfig) -> None:
    home.save_config(config)
    objects = first_metadata(home, datetime.now(UTC).replace(microsecond=0))
    make_authority(home)
    home.root.write_bytes(objects["metadata/1.root.json"])
    making = home.folder / "first.new"
    making.mkdir(exist_ok=True)
    for number, (key, data) in enumerate(objects.items()):
        (making / f"{number:02}-{key.removeprefix('metadata/')}").write_bytes(data)
    making.rename(home.folder / "first")
