"""Streaming text: what was sent is never taken back, and comes to the same as decoding the whole."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from stand_in import byte_tokenizer

from serve.text import TextStream

TOKENIZER = byte_tokenizer()


def streamed(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """Parts that are sent for an answer, as the engine makes them."""
    tokens = TOKENIZER(text, add_special_tokens=False).input_ids
    stream = TextStream(TOKENIZER, stop)
    parts = [stream.push(token) for token in tokens]
    return [*parts, stream.finish(cut_at_first_stop(text, stop))]


def cut_at_first_stop(text: str, stop: tuple[str, ...]) -> str:
    """What the generator makes of it: it ends with the character that first completes a stop string."""
    for end in range(1, len(text) + 1):
        if found := [text.index(s) for s in stop if s in text[:end]]:
            return text[: min(found)]
    return text


def test_text_goes_out_as_soon_as_it_is_sure() -> None:
    assert streamed("abc") == ["a", "b", "c", ""]


def test_characters_of_several_bytes_go_out_whole() -> None:
    assert [p for p in streamed("é中🙂!") if p] == ["é", "中", "🙂", "!"]


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    parts = streamed("one, two. END and more", (" END",))
    assert "".join(parts) == "one, two."
    parts = streamed("a b", (" END",))
    assert parts == ["a", "", " b", ""]
    assert streamed("a E", (" END",)) == ["a", "", "", " E"]


@settings(max_examples=60, deadline=None)
@example("aba", ["b", "aba"])
@given(st.text(alphabet="ab中 .", max_size=30), st.lists(st.text(alphabet="ab.", min_size=1, max_size=3), max_size=2))
def test_parts_come_to_the_answer_cut_at_the_first_stop(text: str, stop: list[str]) -> None:
    assert "".join(streamed(text, tuple(stop))) == cut_at_first_stop(text, tuple(stop))


def test_bytes_that_are_no_text_lose_nothing() -> None:
    tokens = [TOKENIZER.convert_tokens_to_ids(t) for t in ("Ã", "Ã", "a")]
    stream = TextStream(TOKENIZER, ())
    parts = [stream.push(t) for t in tokens]
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert "".join([*parts, stream.finish(whole)]) == whole
