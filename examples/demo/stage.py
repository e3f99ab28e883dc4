"""Sets the demo's stage: ports, an S3 bucket with a signed repository, an enrolled box, and what runs on them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import boto3

from examples.demo.parts import (
    ACCESS,
    BIN,
    BUCKET,
    CLOUD_DEVICE,
    DEVICE,
    Parts,
    free_port,
    start_agent,
    start_broker,
    start_gateway,
    start_s3,
)

EXAMPLES = Path(__file__).parents[1]
MODELS = EXAMPLES / "models"
ON_BOX = ("digits", "digits-int8", "language", "sea-temperature", "co2-forecast", "assistant")
IN_CLOUD = "librarian"
POOL = "cloud"


class Stage:
    """Everything the scenes play on."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.folder = parts.folder
        self.local_port, self.cloud_port, self.s3_port, self.http_port = (free_port() for _ in range(4))
        self.endpoint = f"http://127.0.0.1:{self.s3_port}"
        self.home = self.folder / "fleet"

    def build(self) -> None:
        """Start every part; the box has nothing but its identity when it starts."""
        start_broker(self._parts, "local-broker", self.local_port)
        start_broker(self._parts, "cloud-broker", self.cloud_port)
        start_s3(self._parts, self.s3_port)
        self._make_fleet()
        start_agent(self._parts, "cloud", self._cloud_config(), self.http_port)
        start_gateway(self._parts, self._gateway_config())
        start_agent(self._parts, "box", self._box_config())

    def publish_second_digits(self) -> None:
        """Ship the distilled digits as version 2."""
        self._fleet("publish", str(MODELS / "digits-small"), "--name", "digits", "--version", "2")
        self._fleet("deploy", "boxes", "digits=2")
        self._hint()

    def publish_tampered_language(self) -> None:
        """Ship a version 2 whose pack somebody changes in the bucket."""
        before = self._packs()
        folder = self.folder / "language-2"
        if not folder.exists():
            _copy_with_change(MODELS / "language", folder)
        self._fleet("publish", str(folder), "--name", "language", "--version", "2")
        bucket = self._bucket()
        for key in self._packs() - before:
            data = bucket.Object(key).get()["Body"].read()
            bucket.put_object(Key=key, Body=bytes(byte ^ 1 for byte in data))
        self._fleet("deploy", "boxes", "language=2")
        self._hint()

    def _make_fleet(self) -> None:
        self._bucket().create()
        self._fleet("init", "--repository", f"s3://{BUCKET}/fleet", "--endpoint", self.endpoint)
        for name in (*ON_BOX, IN_CLOUD):
            self._fleet("publish", str(MODELS / name), "--name", name, "--version", "1")
        key = self.folder / "pool.key"
        self._fleet("pool-key", POOL, "--out", str(key))
        public = json.loads(key.read_text("utf-8"))["public"]
        self._fleet("deploy", "boxes", *(f"{name}=1" for name in ON_BOX), "--pool", f"{POOL}={public}")
        self._fleet("deploy", "cloud", f"{IN_CLOUD}=1")
        self._fleet("enrol", DEVICE, "--group", "boxes", "--out", str(self.folder / DEVICE))
        self._fleet("enrol", CLOUD_DEVICE, "--group", "cloud", "--out", str(self.folder / CLOUD_DEVICE))

    def _fleet(self, command: str, *arguments: str) -> None:
        """Run one `spillway-fleet` command, as an admin would."""
        line = [str(BIN / "spillway-fleet"), command, "--home", str(self.home), "--json", *arguments]
        with (self.folder / "fleet.log").open("ab") as log:
            subprocess.run(line, check=True, stdout=log, stderr=log, env={**os.environ, **ACCESS})

    def _hint(self) -> None:
        """Tell the boxes that there is something new."""
        line = [
            "mosquitto_pub",
            "-V",
            "5",
            "-p",
            str(self.cloud_port),
            "-q",
            "1",
            "-t",
            "spillway/fleet/boxes/hint",
            "-m",
            "look",
        ]
        subprocess.run(line, check=True)

    def _bucket(self) -> Any:
        store = boto3.resource(
            "s3",
            endpoint_url=self.endpoint,
            region_name=ACCESS["AWS_DEFAULT_REGION"],
            aws_access_key_id=ACCESS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=ACCESS["AWS_SECRET_ACCESS_KEY"],
        )
        return store.Bucket(BUCKET)

    def _packs(self) -> set[str]:
        return {item.key for item in self._bucket().objects.filter(Prefix="fleet/packs/")}

    def _box_config(self) -> str:
        own = self.folder / DEVICE
        return f"""
[device]
name = "{DEVICE}"
groups = ["boxes"]
certificate = "{own}/device.pem"
key = "{own}/device.key"
[local]
port = {self.local_port}
[cloud]
port = {self.cloud_port}
[repository]
url = "s3://{BUCKET}/fleet"
endpoint = "{self.endpoint}"
root = "{own}/root.json"
hint_spread_s = 0.2
[state]
directory = "{self.folder}/box-state"
[models.assistant]
pool = "{POOL}"
max_queue = 6
deadline_ms = 60000
"""

    def _cloud_config(self) -> str:
        own = self.folder / CLOUD_DEVICE
        return f"""
[device]
name = "{CLOUD_DEVICE}"
groups = ["cloud"]
[local]
port = {self.cloud_port}
[repository]
url = "s3://{BUCKET}/fleet"
endpoint = "{self.endpoint}"
root = "{own}/root.json"
[state]
directory = "{self.folder}/cloud-state"
[http]
port = {self.http_port}
[models.{IN_CLOUD}]
deadline_ms = 60000
"""

    def _gateway_config(self) -> str:
        return f"""
ca = "{self.folder}/{DEVICE}/ca.pem"
[cloud]
port = {self.cloud_port}
[pools.{POOL}]
keys = ["{self.folder}/pool.key"]
upstream = "http://127.0.0.1:{self.http_port}/v1"
models = {{ assistant = "{IN_CLOUD}" }}
"""


def _copy_with_change(source: Path, target: Path) -> None:
    """Copy a model's folder with one harmless difference, so that it makes a version and a pack of its own."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    config = target / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "revision": "2"}), "utf-8")
