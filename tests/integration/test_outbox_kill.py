"""The outbox in a process that is killed without warning, and on a disk that is full."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloud_sync.database import Database
from cloud_sync.outbox import Outbox

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import asyncio, sys
from pathlib import Path
from cloud_sync.database import Database
from cloud_sync.errors import HandoffError
from cloud_sync.outbox import Answer, Outbox, Row
from models.request import Dialect, Status

async def main():
    database = await Database.open(Path(sys.argv[1]), reserve_bytes=65536)
    outbox = Outbox(database)
    answer = Answer(status=Status.OK, body=b"done")
    async def one(lane):
        number = lane
        while True:
            ident = f"{number:032x}"
            row = Row(id=ident, place="local", model="m", client="c", content_type="text/plain", body=b"x" * 3000,
                      dialect=Dialect.HUGGINGFACE, reply_topic="t", stored_at_ms=0, deadline_at_ms=1, key=ident.encode())
            try:
                await outbox.put(row)
            except HandoffError as error:
                print("full", ident, error.code, flush=True)
                for kept in await outbox.rows(bodies=False):
                    await outbox.settle(kept.id, answer)
                    await outbox.finish(kept.id)
                print("finished", len(await outbox.rows()), flush=True)
                return
            print("put", ident, flush=True)
            if number % 3 == 0:
                await outbox.settle(ident, answer)
                print("settled", ident, flush=True)
            if number % 6 == 0:
                await outbox.finish(ident)
                print("finished", ident, flush=True)
            number += 4
    await asyncio.gather(*(one(lane) for lane in range(int(sys.argv[2]))))
    await database.close()

asyncio.run(main())
"""


def write(path: Path, lanes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(lanes)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )


async def test_b1_c2_whatever_was_promised_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    promised: dict[str, str] = {}
    for round_ in range(5):
        process = write(path, 4)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(50 + 37 * round_)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait(10)
        for line in lines:
            if line.endswith("\n"):
                word, ident = line.split()
                promised[ident] = word
        database = await Database.open(path)
        assert database.set_aside == ""
        outbox = Outbox(database)
        found = {row.id: row for row in await outbox.rows()}
        for ident, word in promised.items():
            if word == "put":
                assert ident in found
            elif word == "settled":
                assert ident not in found or found[ident].answer is not None
            else:
                assert ident not in found
                assert await outbox.answer(ident.encode()) is not None or len(promised) > 1000
        assert not any(row.damaged for row in found.values())
        assert all(row.answer is not None or len(row.body) == 3000 for row in found.values())
        for ident in found:
            await outbox.finish(ident)
        await database.close()
        promised.clear()


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk takes root")
async def test_b7_on_a_full_disk_new_requests_are_refused_and_those_that_wait_are_finished(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        process = write(tmp_path / "state.db", 1)
        output, _ = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0
        lines = output.splitlines()
        assert any(line.startswith("full") and line.endswith("outbox_full") for line in lines)
        assert lines[-1] == "finished 0"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
        time.sleep(0)
