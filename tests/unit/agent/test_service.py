from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest

from cloud_sync.errors import HandoffError
from cloud_sync.exchange import Reply
from models.channel import Ask, Counted, Piece
from models.request import Request, Response, Status
from tests.fakes.cloud_door import MemoryCloud, from_gateway
from tests.fakes.worker import MemoryWorker, echo, version
from tests.support.box import Box, open_box, turns
from tests.support.virtual_time import virtual_time

POOL = '[models.digits]\npool = "gpu"\n'


def outputs(response: Response) -> object:
    return msgspec.json.decode(response.body)["outputs"]


def error(response: Response) -> dict[str, object]:
    told: dict[str, object] = msgspec.json.decode(response.body)["error"]
    return told


async def no_rows(box: Box) -> bool:
    return await box.outbox.rows() == []


@virtual_time
async def test_a_request_is_answered_by_the_box_with_what_it_took_and_who_answered(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=echo))
        asked = box.ask(b"hello")
        await box.finished(asked)
        final = asked.final
        assert outputs(final) == "hello"
        assert (final.status, final.route, final.reason, final.model) == (Status.OK, "local", "fits", "digits@1")
        assert final.compute_ms == 5.0
        assert final.total_ms >= 0


@virtual_time
async def test_a_stream_is_numbered_and_ends_with_its_final_piece(tmp_path: Path) -> None:
    def three(ask: Ask) -> list[Piece]:
        return [Piece(ticket=ask.ticket, body=b"{}", final=number == 2) for number in range(3)]

    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=three))
        asked = box.ask(stream=True)
        await box.finished(asked)
        assert [reply.sequence for reply in asked.replies] == [0, 1, 2]
        assert [reply.status for reply in asked.replies] == [Status.PARTIAL, Status.PARTIAL, Status.OK]


@virtual_time
async def test_a_model_that_is_nowhere_is_not_found(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        asked = box.ask(model="unheard-of")
        await box.finished(asked)
        assert asked.code == "model_not_found"
        assert error(asked.final) == {"code": "model_not_found", "message": "no such model", "retryable": False}


@virtual_time
async def test_an_error_of_the_model_is_the_asker_s_answer(tmp_path: Path) -> None:
    def refuse(ask: Ask) -> list[Piece]:
        return [Piece(ticket=ask.ticket, code="bad_request", message="inputs: is no picture")]

    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=refuse))
        asked = box.ask()
        await box.finished(asked)
        assert asked.code == "bad_request"
        assert error(asked.final)["message"] == "inputs: is no picture"


@virtual_time
async def test_e15_a_code_that_no_protocol_knows_becomes_internal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def nonsense(ask: Ask) -> list[Piece]:
        return [Piece(ticket=ask.ticket, code="all_your_base", message="?")]

    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=nonsense))
        asked = box.ask()
        await box.finished(asked)
        assert asked.code == "internal"
        assert "all_your_base" not in str(error(asked.final)["message"])


@virtual_time
async def test_a_mistake_of_our_own_costs_one_request_its_answer_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_box(tmp_path, POOL, cloud=MemoryCloud(lambda _: RuntimeError("a bug"))) as box:
        box.serve(MemoryWorker(script=echo))
        broken, fine = box.ask(model="digits", body=b"1"), box.ask(body=b"2")
        box.service.queues.clear()
        await box.finished(broken, fine)
        assert [broken.code, fine.code] == ["internal", "internal"]
        assert "a bug" in caplog.text
        assert "a bug" not in str(error(broken.final))


@virtual_time
async def test_beyond_its_bound_the_box_refuses_at_once(tmp_path: Path) -> None:
    async with open_box(tmp_path, "[limits]\nmax_requests = 3") as box:
        worker = box.serve(MemoryWorker(capacity=9))
        held = [box.ask() for _ in range(3)]
        await turns()
        refused = box.ask()
        await box.finished(refused)
        assert refused.code == "overloaded"
        for ask in worker.asks:
            worker.answer(ask)
        await box.finished(*held)
        again = box.ask()
        await turns()
        worker.answer(worker.asks[-1])
        await box.finished(again)
        assert again.code == ""


@virtual_time
async def test_beyond_its_queue_s_bound_a_model_refuses(tmp_path: Path) -> None:
    async with open_box(tmp_path, "[models.digits]\nmax_queue = 2") as box:
        worker = box.serve(MemoryWorker(capacity=1))
        held = [box.ask() for _ in range(2)]
        await turns()
        refused = box.ask()
        await box.finished(refused)
        assert (refused.code, refused.final.reason) == ("overloaded", "overflow")
        worker.script = echo
        worker.answer(worker.asks[0])
        await box.finished(*held)


@virtual_time
async def test_a_deadline_that_passes_in_the_queue_is_told_when_it_passes(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        busy = box.ask(deadline_s=60)
        late = box.ask(deadline_s=2)
        started = box.clock()
        await box.finished(late)
        assert late.code == "deadline_exceeded"
        assert box.clock() - started == pytest.approx(2, abs=0.01)
        assert len(worker.asks) == 1
        worker.answer(worker.asks[0])
        await box.finished(busy)


@virtual_time
async def test_a_deadline_that_passes_in_service_has_the_worker_told(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        late = box.ask(deadline_s=2)
        await box.finished(late)
        assert late.code == "deadline_exceeded"
        assert worker.cancels == [worker.asks[0].ticket]


@virtual_time
async def test_c22_a_request_whose_time_is_over_already_is_not_begun(tmp_path: Path) -> None:
    async with open_box(tmp_path, POOL, cloud=MemoryCloud()) as box:
        worker = box.serve(MemoryWorker(script=echo, context_tokens=100))
        asked = box.ask(deadline_s=0)
        await box.finished(asked)
        assert asked.code == "deadline_exceeded"
        assert worker.asks == []


@virtual_time
async def test_a_cancelled_request_gets_the_error_cancelled_wherever_it_was(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        serving, waiting = box.ask(), box.ask()
        await turns()
        box.service.cancel(waiting.ticket)
        box.service.cancel(serving.ticket)
        await box.finished(serving, waiting)
        assert [serving.code, waiting.code] == ["cancelled", "cancelled"]
        assert worker.cancels == [worker.asks[0].ticket]
        assert len(worker.asks) == 1


@virtual_time
async def test_a_cancel_before_the_request_has_begun_counts_too(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=echo))
        asked = box.ask()
        box.service.cancel(asked.ticket)
        await box.finished(asked)
        assert asked.code == "cancelled"


@virtual_time
async def test_a_cancel_after_the_answer_was_decided_changes_nothing(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=echo))
        asked = box.ask()
        puback = asyncio.get_running_loop().create_future()
        told = asked.ticket.send

        async def slow_broker(response: Response) -> None:
            await told(response)
            await puback

        asked.ticket.send = slow_broker
        await turns()
        assert asked.replies
        box.service.cancel(asked.ticket)
        await turns()
        assert not asked.settled
        puback.set_result(None)
        await box.finished(asked)
        assert asked.code == ""


@virtual_time
async def test_two_cancels_are_one(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker())
        asked = box.ask(deadline_s=60)
        await asyncio.sleep(2)  # stored by now
        box.service.cancel(asked.ticket)
        box.service.cancel(asked.ticket)
        await box.finished(asked)
        assert asked.code == "cancelled"
        assert await no_rows(box)


@virtual_time
async def test_e16_a_request_that_a_worker_died_with_is_asked_again_alone(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker(capacity=1))
        asked = [box.ask(str(number).encode()) for number in range(51)]
        await turns()
        worker.die()
        await turns()
        assert all(not one.replies for one in asked)
        box.service.queues["digits"].starting = True
        await asyncio.sleep(1)
        box.serve(MemoryWorker(capacity=8, script=echo))
        await box.finished(*asked)
        assert [outputs(one.final) for one in asked] == [str(number) for number in range(51)]


@virtual_time
async def test_e16_a_request_that_kills_two_workers_fails_alone(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        first = box.serve(MemoryWorker(capacity=2))
        killer, other = box.ask(b"killer"), box.ask(b"other")
        await turns()
        first.die("signal 11")
        await turns()
        second = box.serve(MemoryWorker(capacity=2))
        await turns()
        assert [ask.request.body for ask in second.asks] == [b"killer"]
        second.die("signal 11")
        await turns()
        box.serve(MemoryWorker(capacity=2, script=echo))
        await box.finished(killer, other)
        assert killer.code == "model_failed"
        assert outputs(other.final) == "other"


@virtual_time
async def test_a_stream_that_has_begun_is_not_begun_again(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        asked = box.ask(stream=True)
        await turns()
        worker.answer(worker.asks[0], final=False)
        await turns()
        worker.die()
        await box.finished(asked)
        assert asked.code == "model_failed"
        assert [reply.sequence for reply in asked.replies] == [0, 1]


@virtual_time
async def test_a_worker_that_dies_while_it_counts_costs_nobody_an_answer(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker(context_tokens=100))
        asked = box.ask()
        await asyncio.sleep(0)
        worker.die()
        await turns()
        box.serve(MemoryWorker(context_tokens=100, script=echo))
        await box.finished(asked)
        assert asked.code == ""


@virtual_time
async def test_a_request_that_runs_for_a_second_is_stored_and_settled(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        asked = box.ask(b"slow", key=b"k")
        await asyncio.sleep(0.9)
        assert await no_rows(box)
        await asyncio.sleep(0.2)
        (row,) = await box.outbox.rows()
        assert (row.body, row.key, row.place, row.id) == (b"slow", b"k", "local", asked.ticket.id)
        assert asked.settled == 1
        worker.answer(worker.asks[0])
        await box.finished(asked)
        assert await no_rows(box)


@virtual_time
async def test_the_stored_answer_is_there_before_it_is_sent(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        asked = box.ask(b"slow", key=b"k")
        told = asked.ticket.send
        found: list[Response | None] = []

        async def look(response: Response) -> None:
            (row,) = await box.outbox.rows()
            found.append(row.answer)
            await told(response)

        asked.ticket.send = look
        await asyncio.sleep(2)
        worker.answer(worker.asks[0], b'{"outputs":7}')
        await box.finished(asked)
        assert found == [asked.final]


@virtual_time
async def test_what_comes_back_within_a_second_is_never_written(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=echo))
        asked = box.ask(key=b"k")
        await box.finished(asked)
        await asyncio.sleep(5)
        assert await no_rows(box)
        assert not asked.ticket.stored


@virtual_time
async def test_a_request_without_an_address_is_never_stored(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        asked = box.ask(addressed=False)
        await asyncio.sleep(5)
        assert await no_rows(box)
        worker.answer(worker.asks[0])
        await box.finished(asked)


@virtual_time
async def test_an_answer_whose_delivery_is_slow_leaves_no_row_behind(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=echo))
        asked = box.ask(key=b"k")
        told = asked.ticket.send

        async def slow_broker(response: Response) -> None:
            await told(response)
            await asyncio.sleep(3)

        asked.ticket.send = slow_broker
        await box.finished(asked)
        await asyncio.sleep(5)
        assert await no_rows(box)


@virtual_time
async def test_a_full_outbox_costs_durability_and_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_box(tmp_path, "[limits]\noutbox_rows = 1") as box:
        worker = box.serve(MemoryWorker(capacity=2))
        asked = [box.ask(str(number).encode()) for number in range(2)]
        await asyncio.sleep(2)
        assert len(await box.outbox.rows()) == 1
        assert sorted(one.settled for one in asked) == [0, 1]
        assert "is not stored" in caplog.text
        for ask in worker.asks:
            worker.answer(ask)
        await box.finished(*asked)


@virtual_time
async def test_a_copy_of_a_request_in_flight_joins_it(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        first = box.ask(key=b"k")
        await turns()
        copy = box.ask(key=b"k")
        await turns()
        assert len(worker.asks) == 1
        worker.answer(worker.asks[0])
        await box.finished(first)
        assert (first.settled, copy.settled, copy.replies) == (1, 1, [])


@virtual_time
async def test_a_copy_of_an_answered_request_gets_the_same_answer(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker(script=echo))
        first = box.ask(key=b"k")
        await box.finished(first)
        copy = box.ask(key=b"k")
        await box.finished(copy)
        assert copy.final == first.final
        assert len(worker.asks) == 1


@virtual_time
async def test_different_requests_with_one_correlation_are_two(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker(script=echo, capacity=2))
        await box.finished(box.ask(b"1", key=b"k1"), box.ask(b"2", key=b"k2"))
        assert len(worker.asks) == 2


@virtual_time
async def test_a_drain_waits_for_what_was_accepted(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        asked = box.ask()
        draining = asyncio.ensure_future(box.service.drain(30))
        await asyncio.sleep(5)
        assert not draining.done()
        worker.answer(worker.asks[0])
        await draining
        await box.finished(asked)
        assert asked.code == ""


@virtual_time
async def test_what_a_drain_cannot_wait_for_is_left_to_the_next_start_or_told(tmp_path: Path) -> None:
    async with open_box(tmp_path, "[limits]\nstore_after_ms = 5000") as box:
        box.serve(MemoryWorker(capacity=4))
        unacknowledged, fleeting, over_http = box.ask(qos=1), box.ask(qos=0), box.ask(addressed=False)
        await box.service.drain(2)
        assert (unacknowledged.replies, unacknowledged.settled) == ([], 0)
        assert (fleeting.code, over_http.code) == ("overloaded", "overloaded")
        assert box.service.intake.tickets == set()


@virtual_time
async def test_what_is_stored_stays_stored_through_a_drain(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker())
        asked = box.ask(deadline_s=60)
        await box.service.drain(2)
        assert (asked.replies, asked.settled) == ([], 1)
        assert [row.id for row in await box.outbox.rows()] == [asked.ticket.id]


@virtual_time
async def test_a_drain_ends_in_time_though_the_broker_acknowledges_nothing(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=echo))
        asked = box.ask()

        async def no_broker(_response: Response) -> None:
            await asyncio.Event().wait()

        asked.ticket.send = no_broker
        started = box.clock()
        await box.service.drain(2)
        assert box.clock() - started < 10
        assert asked.settled == 0


@virtual_time
async def test_while_draining_nothing_new_is_begun(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(MemoryWorker())
        asked = box.ask()
        await turns()
        draining = asyncio.ensure_future(box.service.drain(30))
        await turns()
        late = box.ask(addressed=False)
        await box.finished(late)
        assert late.code == "overloaded"
        worker.answer(worker.asks[0])
        await draining
        await box.finished(asked)


def tokens(ask_tokens: int) -> MemoryWorker:
    return MemoryWorker(
        context_tokens=100,
        longest_token_bytes=4,
        script=echo,
        tokens=lambda asked: Counted(ticket=asked.ticket, tokens_in=ask_tokens, max_tokens=10),
    )


@virtual_time
async def test_what_the_model_cannot_take_goes_to_the_cloud(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    async with open_box(tmp_path, POOL, cloud=cloud) as box:
        worker = box.serve(tokens(95))
        asked = box.ask(b"long")
        await box.finished(asked)
        final = asked.final
        assert (final.route, final.reason, final.model) == ("cloud", "oversized", "large@9")
        assert (outputs(final), final.compute_ms) == ("long", 50.0)
        assert worker.asks == []
        assert [(sent.pool, sent.ident) for sent in cloud.sent] == [("gpu", asked.ticket.id)]


@virtual_time
async def test_what_fits_is_not_handed_off(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    async with open_box(tmp_path, POOL, cloud=cloud) as box:
        box.serve(tokens(90))
        asked = box.ask(b"short")
        await box.finished(asked)
        assert (asked.final.route, asked.final.reason) == ("local", "fits")
        assert cloud.sent == []


@virtual_time
async def test_what_no_place_can_take_is_too_large_and_says_by_how_much(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(tokens(95))
        asked = box.ask()
        await box.finished(asked)
        assert asked.code == "too_large"
        assert "105 tokens" in str(error(asked.final)["message"])


@virtual_time
async def test_a_body_that_cannot_fit_by_its_length_alone_is_not_counted(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        worker = box.serve(tokens(0))
        asked = box.ask(b"x" * (3 << 20))
        await box.finished(asked)
        assert asked.code == "too_large"
        assert worker.sent == []


@virtual_time
async def test_d8_local_only_never_leaves_the_box(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    async with open_box(tmp_path, POOL + "max_queue = 1", cloud=cloud) as box:
        worker = box.serve(MemoryWorker())
        held = box.ask(local_only=True)
        await turns()
        overflowing = box.ask(local_only=True)
        await box.finished(overflowing)
        assert overflowing.code == "overloaded"
        worker.die()
        box.serve(tokens(95))
        oversized = box.ask(local_only=True)
        await box.finished(oversized)
        assert oversized.code == "too_large"
        unknown = box.ask(model="elsewhere", local_only=True)
        await box.finished(unknown, held)
        assert unknown.code == "model_not_found"
        assert cloud.sent == []


@virtual_time
async def test_d8_a_model_s_policy_keeps_its_requests_here_too(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    async with open_box(tmp_path, "[models.digits]\nlocal_only = true\nmax_queue = 1", cloud=cloud) as box:
        box.serve(tokens(95))
        asked = box.ask()
        await box.finished(asked)
        assert asked.code == "too_large"
        assert cloud.sent == []


@virtual_time
async def test_a_hand_off_is_stored_before_long_and_gone_after_its_answer(tmp_path: Path) -> None:
    release = asyncio.Event()
    cloud = MemoryCloud(lambda _: None)
    async with open_box(tmp_path, POOL, cloud=cloud) as box:
        box.serve(tokens(95))
        asked = box.ask(b"long", deadline_s=20)
        await asyncio.sleep(0.1)
        (row,) = await box.outbox.rows()
        assert (row.place, row.pool, row.reason) == ("cloud", "gpu", "oversized")
        release.set()
        await box.finished(asked)
        assert asked.code == "deadline_exceeded"
        assert await no_rows(box)


@virtual_time
async def test_a_cloud_out_of_reach_until_the_deadline_is_unavailable(tmp_path: Path) -> None:
    async with open_box(tmp_path, POOL, cloud=MemoryCloud(lambda _: None, connected=False)) as box:
        asked = box.ask(deadline_s=5)
        await box.finished(asked)
        assert (asked.code, asked.final.reason) == ("cloud_unavailable", "not_local")


@virtual_time
async def test_an_error_from_the_cloud_is_the_asker_s(tmp_path: Path) -> None:
    def refuse(_request: Request) -> list[Reply]:
        return [Reply(status="error", final=True, body=b'{"error":{}}', code="quota_exceeded", message="spent")]

    async with open_box(tmp_path, POOL, cloud=MemoryCloud(refuse)) as box:
        asked = box.ask()
        await box.finished(asked)
        assert (asked.code, asked.final.status, asked.final.route) == ("quota_exceeded", Status.ERROR, "cloud")


@virtual_time
async def test_a_stream_from_the_cloud_is_numbered_by_the_box(tmp_path: Path) -> None:
    def two(_request: Request) -> list[Reply]:
        return [Reply(status="partial", final=False, body=b"{}"), Reply(status="ok", final=True, body=b"{}")]

    async with open_box(tmp_path, POOL, cloud=MemoryCloud(two)) as box:
        asked = box.ask(stream=True)
        await box.finished(asked)
        assert [(reply.sequence, reply.final) for reply in asked.replies] == [(0, False), (1, True)]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (HandoffError("too_large", "over 96 KiB"), "too_large"),
        (HandoffError("unknown_pool", "no such pool"), "cloud_unavailable"),
        (HandoffError("no_key", "no valid key"), "cloud_unavailable"),
        (HandoffError("deadline_exceeded", "no answer"), "deadline_exceeded"),
    ],
)
def test_a_hand_off_that_cannot_be_made_is_an_error_of_the_protocol(
    tmp_path: Path, raised: HandoffError, code: str
) -> None:
    @virtual_time
    async def play() -> None:
        async with open_box(tmp_path, POOL, cloud=MemoryCloud(lambda _: raised)) as box:
            asked = box.ask()
            await box.finished(asked)
            assert asked.code == code

    play()


@virtual_time
async def test_an_answer_of_the_cloud_that_ends_early_is_an_error(tmp_path: Path) -> None:
    async with open_box(tmp_path, POOL, cloud=MemoryCloud(lambda _: [])) as box:
        asked = box.ask()
        await box.finished(asked)
        assert asked.code == "cloud_unavailable"


@virtual_time
async def test_cancelling_a_hand_off_takes_it_back(tmp_path: Path) -> None:
    cloud = MemoryCloud(lambda _: None)
    async with open_box(tmp_path, POOL, cloud=cloud) as box:
        asked = box.ask()
        await turns()
        box.service.cancel(asked.ticket)
        await box.finished(asked)
        assert asked.code == "cancelled"
        assert cloud.closed == [asked.ticket.id]


@virtual_time
async def test_a_pool_without_a_cloud_link_is_no_place_to_go(tmp_path: Path) -> None:
    async with open_box(tmp_path, POOL, cloud=None) as box:
        asked = box.ask()
        await box.finished(asked)
        assert asked.code == "model_not_found"


@virtual_time
async def test_what_overflows_the_box_goes_to_the_cloud_and_comes_back(tmp_path: Path) -> None:
    cloud = MemoryCloud(from_gateway)
    async with open_box(tmp_path, POOL + "max_queue = 1", cloud=cloud) as box:
        worker = box.serve(MemoryWorker())
        held = box.ask()
        await turns()
        over = box.ask(b"over")
        await box.finished(over)
        assert (over.final.route, over.final.reason, outputs(over.final)) == ("cloud", "overflow", "over")
        worker.answer(worker.asks[0])
        await box.finished(held)


@virtual_time
async def test_every_final_reply_is_counted_and_only_those(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=echo))
        await box.finished(box.ask(), box.ask(), box.ask(model="unheard-of"))
        counted = dict(box.telemetry.answers)
        assert counted == {
            ("digits", "local", "fits", ""): 2,
            ("", "none", "not_local", "model_not_found"): 1,
        }


@virtual_time
async def test_a_reply_that_cannot_be_sent_leaves_the_box_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=echo, capacity=2))
        broken, fine = box.ask(), box.ask()

        async def fail(_response: Response) -> None:
            raise ValueError("no such topic")

        broken.ticket.send = fail
        await box.finished(fine)
        with contextlib.suppress(ValueError):
            await broken.ticket.task  # type: ignore[misc]
        assert broken.settled == 1
        assert box.service.intake.tickets == set()
        assert "no such topic" in caplog.text


@virtual_time
async def test_a_new_version_is_named_in_the_answers_that_it_gives(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        old = box.serve(MemoryWorker())
        serving, waiting = box.ask(b"1"), box.ask(b"2")
        await turns()
        box.serve(MemoryWorker(version(number="2"), script=echo))
        old.answer(old.asks[0])
        await box.finished(serving, waiting)
        assert [serving.final.model, waiting.final.model] == ["digits@1", "digits@2"]
