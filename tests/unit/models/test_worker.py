"""How a worker takes asks, cancels and deadlines, with a twin for its session."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from models.channel import HEADER, Ask, Cancel, Count, Counted, FromWorker, Piece, frame, from_worker
from models.errors import RequestError
from models.request import Dialect, Request
from models.session import BatchSession
from models.tasks.tabular import Tabular
from models.worker import Channel, Inbox, Worker
from tests.fakes.backend import MemoryBackend, summing


def request_of(values: str) -> Request:
    body = f'{{"inputs": [{values}]}}'.encode()
    return Request(model="m", content_type="application/json", body=body, dialect=Dialect.HUGGINGFACE)


class Rig:
    """A worker without its process: `turn` is called by the test."""

    def __init__(self, batch: int = 8) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(5)
        self.socket = ours
        self.backend: MemoryBackend = summing()
        session = BatchSession(
            {Dialect.HUGGINGFACE: Tabular({}, self.backend, classify=False)}, self.backend, batch=batch
        )
        self.channel = Channel(theirs)
        self.worker = Worker(self.channel, session)
        self._reader = ours.makefile("rb")

    def close(self) -> None:
        self._reader.close()
        self.socket.close()
        self.channel.close()

    def receive(self) -> FromWorker:
        (length,) = HEADER.unpack(self._reader.read(HEADER.size))
        message: FromWorker = from_worker.decode(self._reader.read(length))
        return message

    def pieces(self, count: int) -> list[Piece]:
        pieces = [self.receive() for _ in range(count)]
        return [piece for piece in pieces if isinstance(piece, Piece)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_asks_that_wait_are_answered_as_one_batch(rig: Rig) -> None:
    for ticket in range(3):
        rig.worker.handle(Ask(ticket, request_of("1, 2"), 1000))
    rig.worker.turn(wait=False)
    assert [(piece.ticket, piece.body, piece.batch) for piece in rig.pieces(3)] == [
        (ticket, b'{"outputs":3.0}', 3) for ticket in range(3)
    ]


def test_one_bad_request_among_good_ones_costs_only_itself(rig: Rig) -> None:
    for ticket, values in enumerate(("1, 2", "1", "777, 1", "666, 1", "3, 4")):
        rig.worker.handle(Ask(ticket, request_of(values), 1000))
    rig.worker.turn(wait=False)
    codes = {piece.ticket: piece.code for piece in rig.pieces(5)}
    assert codes == {0: "", 1: "bad_request", 2: "model_failed", 3: "model_failed", 4: ""}


def test_a_request_that_trips_over_our_own_fault_costs_only_itself(rig: Rig) -> None:
    rig.worker.handle(Ask(1, Request(model="m", content_type="application/json", body=b"[]", dialect="odd"), 1000))  # type: ignore[arg-type]
    rig.worker.handle(Ask(2, request_of("1, 2"), 1000))
    rig.worker.turn(wait=False)
    assert [piece.code for piece in rig.pieces(2)] == ["bad_request", ""]


def test_an_ask_whose_budget_is_spent_is_not_begun(rig: Rig) -> None:
    rig.worker.handle(Ask(1, request_of("1, 2"), 0))
    rig.worker.handle(Ask(2, request_of("1, 2"), 1000))
    rig.worker.turn(wait=False)
    assert [(piece.ticket, piece.code) for piece in rig.pieces(2)] == [(1, "deadline_exceeded"), (2, "")]
    assert rig.backend.batches == [1]


def test_a_cancelled_ask_that_waits_is_answered_so_and_not_run(rig: Rig) -> None:
    rig.worker.handle(Ask(1, request_of("1, 2"), 1000))
    rig.worker.handle(Cancel(1))
    rig.worker.turn(wait=False)
    assert [(piece.ticket, piece.code) for piece in rig.pieces(1)] == [(1, "cancelled")]
    assert rig.backend.batches == []


def test_cancelling_what_is_not_there_is_no_fault(rig: Rig) -> None:
    rig.worker.handle(Cancel(99))
    rig.worker.handle(Ask(1, request_of("1, 2"), 1000))
    rig.worker.turn(wait=False)
    assert [piece.code for piece in rig.pieces(1)] == [""]


def test_tokens_are_counted_without_a_turn(rig: Rig) -> None:
    rig.worker.handle(Count(5, request_of("1, 2")))
    assert rig.receive() == Counted(ticket=5)


def test_more_asks_than_a_batch_wait_for_the_next_turn() -> None:
    rig = Rig(batch=2)
    for ticket in range(3):
        rig.worker.handle(Ask(ticket, request_of("1, 2"), 1000))
    rig.worker.turn(wait=False)
    rig.worker.turn(wait=False)
    assert [piece.batch for piece in rig.pieces(3)] == [2, 2, 1]
    rig.close()


def test_the_inbox_gives_asks_in_order_and_as_many_as_there_is_room_for() -> None:
    inbox = Inbox()
    for ticket in range(4):
        inbox.ask(Ask(ticket, request_of("1"), 1000))
    first, _ = inbox.take(3, wait=True)
    rest, cancels = inbox.take(3, wait=True)
    assert [waiting.ask.ticket for waiting in first + rest] == [0, 1, 2, 3]
    assert cancels == []
    assert inbox.take(0, wait=False) == ([], [])
    assert first[0].deadline > time.monotonic()


def test_e15_a_frame_that_is_none_ends_the_reading() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    ours.sendall(HEADER.pack(0xFFFFFFFF))
    with pytest.raises(ValueError, match="over the limit"):
        channel.receive()
    ours.close()
    channel.close()


def test_a_frame_cut_short_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    ours.sendall(frame(Cancel(1)) + frame(Cancel(2))[:-1])
    ours.close()
    assert channel.receive() == Cancel(1)
    assert channel.receive() is None
    channel.close()


def test_an_answer_that_no_frame_holds_becomes_an_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.channel.MAX_FRAME_BYTES", 300)
    rig.channel.send(Piece(ticket=1, body=b"x" * 1000), Piece(ticket=2, body=b"x"))
    assert [(piece.ticket, piece.code) for piece in rig.pieces(2)] == [(1, "model_failed"), (2, "")]


def test_an_error_knows_its_codes() -> None:
    with pytest.raises(ValueError, match="unknown"):
        RequestError("odd", "x")
