"""`make demo`: Spillway's whole job on this machine, on real parts. `KEEP=1` leaves it running to try by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from examples.demo.asker import Asker
from examples.demo.parts import DEVICE, DemoError, Parts, wait_for
from examples.demo.scenes import Scenes
from examples.demo.stage import IN_CLOUD, ON_BOX, Stage
from examples.demo.table import Table

FOLDER = Path(".run/demo").absolute()


def main() -> int:
    """Set the stage, play, tell how it went; 0 only if every row came out as it must."""
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    parts, table = Parts(FOLDER), Table()
    try:
        stage = Stage(parts)
        print(
            "Starting two brokers, an S3 server, a cloud, a gateway and a box; signing seven models ...",
            flush=True,
        )
        stage.build()
        _wait_until_serving(stage)
        took = time.monotonic() - began
        print(
            f"The box pulled and tried {len(ON_BOX)} models and serves them, {took:.0f} s after the start.", flush=True
        )
        table.head()
        Scenes(stage, parts, table).play()
        if os.environ.get("KEEP"):
            _tell(table, began)
            _stay(stage)
    except (DemoError, ConnectionError, subprocess.CalledProcessError) as error:
        print(f"\nThe demo could not go on: {error}", file=sys.stderr)
        table.failures.append(str(error))
    finally:
        statuses = parts.stop_all()
    bad = [f"{name} ended with {status}" for name, status in statuses.items() if _bad(name, status)]
    table.failures += bad
    if bad or not os.environ.get("KEEP"):
        _tell(table, began)
    return 1 if table.failures else 0


def _bad(name: str, status: int) -> bool:
    """Whether a part of ours ended other than it should on SIGTERM."""
    return status != 0 and name in ("box", "cloud", "gateway")


def _wait_until_serving(stage: Stage) -> None:
    asker = Asker(DEVICE, stage.local_port, "waiter")

    def serving() -> bool:
        models = json.loads(asker.retained.get("models", b"{}"))
        return all(models.get(name, {}).get("state") == "serving" for name in ON_BOX)

    try:
        wait_for(f"{', '.join(ON_BOX)} serving on the box (log: {stage.folder}/box.log)", serving, 60)
    finally:
        asker.close()
    wait_for(f"{IN_CLOUD} serving in the cloud (log: {stage.folder}/cloud.log)", lambda: _cloud_serves(stage), 60)


def _cloud_serves(stage: Stage) -> bool:
    line = ["curl", "-s", f"http://127.0.0.1:{stage.http_port}/readyz"]
    done = subprocess.run(line, capture_output=True, check=False)
    return b'"librarian":"serving"' in done.stdout


def _stay(stage: Stage) -> None:
    ask = f"mosquitto_rr -V 5 -p {stage.local_port} -t spillway/{DEVICE}/infer"
    reply = f"spillway/{DEVICE}/reply/me"
    print(
        f"""
Still running. Ask the box, as any MQTT client would:
  {ask}/language/me -e {reply}/language -m 'Guten Morgen!'
  {ask}/digits/me -e {reply}/digits -m "{{\\"inputs\\": \\"$(base64 -w 0 examples/inputs/digit-5.png)\\"}}"
  .venv/bin/spillway ask --device {DEVICE} --port {stage.local_port} --stream assistant 'What does os.path.join do?'
Ask the cloud's endpoint, as the gateway does:
  curl -s http://127.0.0.1:{stage.http_port}/v1/chat/completions -H 'content-type: application/json' \\
       -d '{{"model": "{IN_CLOUD}", "messages": [{{"role": "user", "content": "What is a list?"}}], "max_tokens": 40}}'
Logs: {stage.folder}. Ctrl-C ends it.""",
        flush=True,
    )
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()


def _tell(table: Table, began: float) -> None:
    """Print how it went."""
    if table.failures:
        print(f"\n{len(table.failures)} things did not come out as they must: {'; '.join(table.failures)}", flush=True)
    else:
        print(f"\nEverything came out as it must, in {time.monotonic() - began:.0f} s.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
