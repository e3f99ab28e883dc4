"""The outbox in a process that is killed without warning, and on a disk that is full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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
    database = await Database.open(Path(sys.argv[1]))
    outbox = Outbox(database)
    answer = Answer(status=Status.OK, body=b"done")
    async def one(lane):
        number = lane
        while True:
            ident = f"{number:032x}"
            row = Row(id=ident, place="local", model="m", client="c", content_type="text/plain", body=b"x" * 3000,
                      dialect=Dialect.HUGGINGFACE, reply_topic="t", stored_at_ms=0, deadline_at_ms=1,
                      key=ident.encode())
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


def written_before_a_kill(path: Path, after_lines: int) -> list[str]:
    with write(path, 4) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(after_lines)]
        process.send_signal(signal.SIGKILL)
        return lines + process.stdout.readlines()


async def test_b1_c2_whatever_was_promised_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    promised: dict[str, str] = {}
    for round_ in range(5):
        lines = written_before_a_kill(path, 50 + 37 * round_)
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


def test_b7_on_a_full_disk_new_requests_are_refused_and_those_that_wait_are_finished(tmp_path: Path) -> None:
    small_disk = 'mount -t tmpfs -o size=8m tmpfs "$1" && exec "$2" -c "$3" "$1/state.db" 1'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-ec", small_disk, "sh", tmp_path, sys.executable, WRITER],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        timeout=60,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert sum(line.startswith("put") for line in lines) > 500
    assert any(line.startswith("full") and line.endswith("outbox_full") for line in lines)
    assert lines[-1] == "finished 0"
