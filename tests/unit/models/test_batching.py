"""Texts that share one cache: joining, leaving, waiting for room, and what is not computed twice."""

from __future__ import annotations

import itertools

import pytest

from models.errors import ModelError
from models.generation.batching import PART_TOKENS, SHARED_PART_TOKENS, BatchingRuntime, part_tokens
from models.generation.options import Sampling
from models.generation.prefixes import BLOCK_TOKENS
from models.generation.runtime import Event, Text
from tests.fakes.generation import CountingCache

LIKELIEST = Sampling(temperature=0.0)


def batching(
    cache: CountingCache | None = None, *, seats: int = 4, tokens: int = 10_000, context: int = 2_000
) -> tuple[BatchingRuntime, CountingCache]:
    """Return a runtime with room for `tokens` in its cache."""
    cache = cache or CountingCache()
    room = tokens * cache.shape.token_bytes
    end_tokens = frozenset({0})
    runtime = BatchingRuntime(cache, seats=seats, context_tokens=context, end_tokens=end_tokens, max_bytes=room)
    return runtime, cache


def text_of(prompt: list[int], max_tokens: int = 8, sampling: Sampling = LIKELIEST) -> Text:
    return Text(prompt=prompt, max_tokens=max_tokens, sampling=sampling)


def expected(prompt: list[int], count: int, vocabulary: int = 50) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % vocabulary)
    return tokens[len(prompt) :]


def write(runtime: BatchingRuntime, texts: list[Text], steps: int = 100) -> dict[Text, list[int]]:
    """Step until every text has its tokens, stopping each as a session would."""
    written: dict[Text, list[int]] = {text: [] for text in texts}
    left = set(texts)
    for _ in range(steps):
        for event in runtime.step():
            assert event.failure is None
            written[event.text].append(event.token)
            if len(written[event.text]) == event.text.max_tokens:
                runtime.stop(event.text)
                left.discard(event.text)
        if not left:
            return written
    raise AssertionError("a text never ended")


def test_many_texts_get_what_each_would_get_alone() -> None:
    runtime, cache = batching()
    texts = [text_of([7, at, 3], max_tokens=3 + at) for at in range(9)]
    for text in texts:
        runtime.start(text)
    written = write(runtime, texts)
    for text in texts:
        assert written[text] == expected(list(text.prompt), text.max_tokens)
    assert max(len(seats) for seats in cache.decodes) == 4
    assert cache.held == {}


def test_a_text_joins_while_others_are_under_way() -> None:
    runtime, cache = batching()
    first, second = text_of([1, 2], max_tokens=20), text_of([3], max_tokens=4)
    runtime.start(first)
    for _ in range(5):
        runtime.step()
    runtime.start(second)
    assert [event.text for event in runtime.step()] == [first, second]
    assert [event.text for event in runtime.step()] == [first, second]
    assert cache.decodes[-1] == (0, 1)


def test_a_long_prompt_is_computed_in_parts_between_the_others_tokens() -> None:
    runtime, cache = batching()
    short, long = text_of([1], max_tokens=50), text_of([2] * 300, max_tokens=2)
    runtime.start(short)
    runtime.step()
    runtime.start(long)
    events = [[event.text for event in runtime.step()] for _ in range(6)]
    assert events == [*[[short]] * 4, [short, long], [short, long]]
    assert [size for seat, size in cache.prefills if seat == 1] == [SHARED_PART_TOKENS] * 4 + [300 - 4 * 64]


def test_a_prompt_alone_is_computed_in_larger_parts() -> None:
    runtime, cache = batching()
    runtime.start(text_of([2] * 300))
    for _ in range(3):
        runtime.step()
    assert [size for _, size in cache.prefills] == [PART_TOKENS, PART_TOKENS, 300 - 2 * PART_TOKENS]


def test_a_large_vocabulary_makes_parts_smaller() -> None:
    assert part_tokens(2048) == PART_TOKENS
    assert part_tokens(150_000) == 32
    assert part_tokens(1 << 30) == 1


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one() -> None:
    runtime, _ = batching()
    long, short = text_of([2] * 1500), text_of([3] * 10)
    runtime.start(long)
    runtime.start(short)
    events = list(itertools.chain.from_iterable(runtime.step() for _ in range(3)))
    assert events[0].text is short


def test_short_prompts_that_keep_coming_do_not_starve_a_long_one() -> None:
    runtime, _ = batching(seats=3)
    long = text_of([2] * 600, max_tokens=1)
    runtime.start(long)
    ended: list[Text] = []
    for at in range(40):
        runtime.start(text_of([3, at], max_tokens=1))
        for event in runtime.step():
            runtime.stop(event.text)
            ended.append(event.text)
    assert long in ended


def test_a_text_waits_until_the_cache_has_room_for_the_whole_of_it() -> None:
    runtime, cache = batching(tokens=100, context=100)
    first, second = text_of([1] * 40, max_tokens=20), text_of([2] * 30, max_tokens=20)
    runtime.start(first)
    runtime.start(second)
    runtime.step()
    runtime.step()
    assert list(cache.held) == [0]
    runtime.stop(first)
    assert [event.text for event in runtime.step()] == [second]


def test_the_context_is_what_the_cache_has_room_for() -> None:
    runtime, _ = batching(tokens=100, context=2_000)
    assert runtime.context_tokens == 100
    with pytest.raises(ModelError, match="do not hold one token"):
        batching(tokens=0)


def test_a_stopped_text_gives_no_more_events_and_frees_its_seat() -> None:
    runtime, cache = batching(seats=1)
    texts = [text_of([1, 2], max_tokens=50), text_of([3], max_tokens=50)]
    for text in texts:
        runtime.start(text)
    runtime.step()
    runtime.stop(texts[0])
    assert cache.held == {}
    assert [event.text for event in runtime.step()] == [texts[1]]


def test_a_text_that_waits_can_be_stopped() -> None:
    runtime, _ = batching(seats=1)
    texts = [text_of([1], max_tokens=3), text_of([2], max_tokens=3)]
    for text in texts:
        runtime.start(text)
    runtime.stop(texts[1])
    write(runtime, texts[:1])
    assert runtime.step() == []


def test_the_beginning_that_two_texts_share_is_computed_once() -> None:
    runtime, cache = batching()
    beginning = [at % 40 for at in range(5 * BLOCK_TOKENS)]
    texts = [text_of([*beginning, 7, 8], max_tokens=3), text_of([*beginning, 9], max_tokens=3)]
    for text in texts:
        runtime.start(text)
    written = write(runtime, texts)
    assert [size for _, size in cache.prefills] == [len(beginning) + 1, 2]
    assert [written[text] for text in texts] == [expected(list(text.prompt), 3) for text in texts]


def test_the_next_turn_of_a_conversation_computes_what_is_new() -> None:
    runtime, cache = batching()
    first = text_of([at % 30 for at in range(3 * BLOCK_TOKENS)], max_tokens=BLOCK_TOKENS)
    runtime.start(first)
    answer = write(runtime, [first])[first]
    second = text_of([*first.prompt, *answer, 5, 6, 7], max_tokens=2)
    runtime.start(second)
    assert write(runtime, [second])[second] == expected(list(second.prompt), 2)
    # The last token that was drawn was never computed, so that its block is not known.
    assert cache.prefills[-1][1] == BLOCK_TOKENS + 3


def test_the_same_prompt_again_computes_its_end_for_the_logits() -> None:
    runtime, cache = batching()
    for _ in range(2):
        text = text_of([4] * (2 * BLOCK_TOKENS), max_tokens=2)
        runtime.start(text)
        assert write(runtime, [text])[text] == expected([4] * (2 * BLOCK_TOKENS), 2)
    assert cache.prefills[-1][1] == BLOCK_TOKENS


def test_beginnings_make_room_for_texts() -> None:
    runtime, cache = batching(tokens=160, context=160)
    first, second = text_of([1] * 96, max_tokens=4), text_of([2] * 140, max_tokens=4)
    for text in (first, second):
        runtime.start(text)
        write(runtime, [text])
    again = text_of([1] * 96, max_tokens=1)
    runtime.start(again)
    write(runtime, [again])
    assert cache.prefills[-1][1] == 96  # what was known of it had to go


def test_a_run_that_fails_costs_only_the_text_whose_fault_it_is() -> None:
    runtime, cache = batching()
    texts = [text_of([1, 1], max_tokens=9), text_of([2, 3], max_tokens=9), text_of([10, 9], max_tokens=9)]
    for text in texts:
        runtime.start(text)
    events: list[Event] = []
    for _ in range(3):
        events += runtime.step()
    cache.broken = {max(events, key=lambda event: event.token).token}
    guilty = max(events, key=lambda event: event.token).text
    for _ in range(6):
        events += runtime.step()
    failed = [event.text for event in events if event.failure is not None]
    assert failed == [guilty]
    assert {event.text for event in events[-2:]} == set(texts) - {guilty}
