"""Stop strings over a text in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from models.generation.stops import StopWatch


def given_by(watch: StopWatch, text: list[str]) -> str:
    out = ""
    for piece in text:
        out += watch.push(piece)
        if watch.stopped:
            return out
    return out + watch.finish()


def test_without_stop_strings_everything_passes_at_once() -> None:
    watch = StopWatch(())
    assert (watch.push("a"), watch.push("bc"), watch.finish()) == ("a", "bc", "")


def test_a_stop_string_over_several_pieces_is_never_given() -> None:
    watch = StopWatch(("STOP",))
    assert [watch.push(piece) for piece in ("one S", "TO", "P two")] == ["one ", "", ""]
    assert watch.stopped


def test_what_only_began_like_a_stop_string_comes_after_all() -> None:
    watch = StopWatch(("STOP",))
    assert (watch.push("ST"), watch.push("ART")) == ("", "START")
    assert (watch.push("ST"), watch.finish()) == ("", "ST")


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_pieces_give_what_the_whole_text_holds_before_its_first_stop(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    watch = StopWatch(stops)
    out = given_by(watch, pieces)
    assert whole.startswith(out)
    assert not any(stop in out for stop in stops)
    assert watch.stopped == any(stop in whole for stop in stops)
    if not watch.stopped:
        assert out == whole
