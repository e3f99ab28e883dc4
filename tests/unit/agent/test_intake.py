from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.intake import Intake, Recent, Ticket, request_key
from models.request import Dialect, Request, Response, Status

REQUEST = Request(model="digits", content_type="text/plain", body=b"x", dialect=Dialect.HUGGINGFACE)


def answer(body: bytes = b"{}") -> Response:
    return Response(status=Status.OK, body=body)


def ticket(key: bytes | None = None, settled: list[str] | None = None, name: str = "first") -> Ticket:
    async def send(response: Response) -> None:
        del response

    def settle() -> None:
        if settled is not None:
            settled.append(name)

    return Ticket(REQUEST, received_at=0, deadline_at=1, send=send, settle=settle, key=key)


def test_two_requests_are_the_same_by_reply_topic_correlation_model_and_body() -> None:
    same = request_key("reply/a", b"1", "digits", b"body")
    assert same == request_key("reply/a", b"1", "digits", b"body")
    others = [("reply/b", b"1", "digits", b"body"), ("reply/a", b"2", "digits", b"body")]
    others += [("reply/a", b"1", "digit", b"sbody"), ("reply/a", b"1", "digits", b"bodY")]
    assert all(request_key(*other) != same for other in others)


def test_without_correlation_every_request_is_new() -> None:
    assert request_key("reply/a", None, "digits", b"body") is None
    assert request_key("reply/a", b"", "digits", b"body") is not None


@given(
    st.tuples(st.text(), st.binary(), st.text(), st.binary()), st.tuples(st.text(), st.binary(), st.text(), st.binary())
)
def test_different_requests_have_different_keys(
    left: tuple[str, bytes, str, bytes], right: tuple[str, bytes, str, bytes]
) -> None:
    assert (request_key(*left) == request_key(*right)) == (left == right)


def test_settling_tells_everyone_who_joined_once() -> None:
    settled: list[str] = []
    one = ticket(settled=settled)
    one.join(lambda: settled.append("second"))
    one.settle()
    one.settle()
    assert settled == ["first", "second"]


def test_who_joins_a_request_that_is_settled_already_is_settled_at_once() -> None:
    settled: list[str] = []
    one = ticket()
    one.settle()
    one.join(lambda: settled.append("second"))
    assert settled == ["second"]


def test_tickets_have_names_of_their_own_unless_they_bring_one() -> None:
    assert ticket().id != ticket().id
    assert len(ticket().id) == 32


def test_recent_answers_are_bounded_in_number() -> None:
    recent = Recent(max_answers=2)
    for number in range(4):
        recent.put(bytes([number]), answer())
    assert [recent.get(bytes([number])) is not None for number in range(4)] == [False, False, True, True]


def test_recent_answers_are_bounded_in_bytes() -> None:
    recent = Recent(max_answers=100, max_bytes=10)
    recent.put(b"a", answer(b"12345"))
    recent.put(b"b", answer(b"12345"))
    recent.put(b"c", answer(b"1"))
    assert recent.get(b"a") is None
    assert recent.get(b"b") is not None
    recent.put(b"large", answer(b"x" * 11))
    assert [recent.get(key) for key in (b"b", b"c", b"large")] == [None, None, None]


def test_an_answer_put_again_replaces_the_one_before() -> None:
    recent = Recent(max_answers=100, max_bytes=10)
    for _ in range(50):
        recent.put(b"a", answer(b"12345"))
    recent.put(b"b", answer(b"12345"))
    assert recent.get(b"a") is not None


def test_a_box_may_keep_no_answers_at_all() -> None:
    recent = Recent(max_answers=0)
    recent.put(b"a", answer())
    assert recent.get(b"a") is None


def test_the_intake_is_full_at_its_bound_and_has_room_again() -> None:
    intake = Intake(2, 10)
    first, second = ticket(b"1"), ticket()
    intake.add(first)
    intake.add(second)
    assert intake.full
    intake.remove(second, None)
    assert len(intake.tickets) < intake.max_requests


def test_the_last_tenth_of_the_room_is_for_models_that_hold_no_more_than_their_share() -> None:
    intake = Intake(40, 0)
    tickets = [ticket() for _ in range(36)]
    for one in tickets:
        assert not intake.refusal("digits", 2)
        intake.add(one)
    assert "more than its share" in intake.refusal("digits", 2)
    assert not intake.refusal("sea", 2)
    assert not intake.refusal("digits", 1), "alone on the box it may have all of it"
    intake.remove(tickets[0], None)
    assert not intake.refusal("digits", 2)
    assert not intake.refusal("digits", 1), "alone on the box it may have all of it"
    for one in [tickets[0], *(ticket() for _ in range(4))]:
        intake.add(one)
    assert intake.refusal("sea", 2) == "the box holds 40 requests already"


def test_what_is_refused_crowds_nobody_out() -> None:
    intake = Intake(2, 0)
    refused = [ticket() for _ in range(100)]
    for one in refused:
        intake.add(one, answered=True)
    assert len(intake.tickets) == 100
    assert not intake.full
    for one in refused:
        intake.remove(one, None)
    assert not intake.tickets


def test_the_intake_is_full_at_its_bound_of_bytes_too() -> None:
    intake = Intake(10, 10, max_bytes=3)
    tickets = [ticket() for _ in range(3)]
    for one in tickets:
        intake.add(one)
        intake.add(one)
    assert intake.full
    for _ in range(2):
        intake.remove(tickets[0], None)
    assert [one in intake.tickets for one in tickets] == [False, True, True]
    intake.add(tickets[0])
    assert intake.full


def test_a_key_names_its_ticket_while_it_is_in_flight_and_its_answer_after() -> None:
    intake = Intake(10, 10)
    one = ticket(b"k")
    intake.add(one)
    assert intake.in_flight(b"k") is one
    assert intake.in_flight(b"other") is None
    assert intake.in_flight(None) is None
    intake.remove(one, answer(b"done"))
    assert intake.in_flight(b"k") is None
    kept = intake.recent.get(b"k")
    assert kept is not None
    assert kept.body == b"done"


def test_a_ticket_that_leaves_takes_no_other_with_it() -> None:
    intake = Intake(10, 10)
    first, second = ticket(b"k"), ticket(b"k")
    intake.add(first)
    intake.add(second)
    intake.remove(first, None)
    assert intake.in_flight(b"k") is second


def test_what_has_no_answer_leaves_nothing_behind() -> None:
    intake = Intake(10, 10)
    one = ticket(b"k")
    intake.add(one)
    intake.remove(one, None)
    assert intake.recent.get(b"k") is None
