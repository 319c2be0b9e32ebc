"""Which examples are trained on, and that the others are listed and never cut."""

from __future__ import annotations

import pytest

from cascade.tasks import Example, Message
from cascade.training.examples import encode_example, encode_examples


def example(name, *contents):
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], c) for i, c in enumerate(contents))
    return Example(name, "quiz", "reasoning", "", 1, messages, "teacher", 1)


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded.tokenizer


def test_the_end_token_is_learned_though_it_pads(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    encoded = encode_example("x", example("x", "2 + 2?", "4").messages, tokenizer)
    assert tokenizer.decode(encoded.input_ids) == "<|user|>2 + 2?</s><|assistant|>4</s>"
    assert encoded.is_target == (False,) * (len(encoded) - 2) + (True, True)
    assert encoded.targets == 2


def test_examples_that_cannot_be_learned_are_refused_and_listed(tokenizer):
    examples = [
        example("good", "q", "an answer"),
        example("question alone", "q"),
        example("empty", "q", ""),
        example("blank", "q", " \n"),
        example("long", "q" * 20, "a" * 40),
        example("also good", "q", "a", "r", "b"),
        example("nothing"),
    ]
    encoded = encode_examples(examples, tokenizer, max_length=40)
    assert [e.sample_id for e in encoded.examples] == ["good", "also good"]
    assert encoded.without_target == ("question alone", "empty", "blank", "nothing")
    assert encoded.too_long == ("long",)


def test_an_example_is_whole_or_refused_never_cut(tokenizer):
    one = example("x", "question", "answer")
    length = len(encode_example("x", one.messages, tokenizer))
    fits = encode_examples([one], tokenizer, max_length=length)
    assert [len(e) for e in fits.examples] == [length]
    assert tokenizer.decode(fits.examples[0].input_ids).endswith("answer</s>")
    too_long = encode_examples([one], tokenizer, max_length=length - 1)
    assert (too_long.examples, too_long.too_long) == ((), ("x",))


def test_the_system_message_counts_towards_the_length(tokenizer):
    one = example("x", "question", "answer")
    length = len(encode_example("x", one.messages, tokenizer))
    assert encode_examples([one], tokenizer, max_length=length, system="Be brief.").too_long == ("x",)
    longer = encode_examples([one], tokenizer, max_length=2 * length, system="Be brief.").examples[0]
    assert tokenizer.decode(longer.input_ids).startswith("<|system|>Be brief.</s><|user|>question")


def test_further_end_tokens_end_the_answer(tokenizer):
    other = tokenizer.convert_tokens_to_ids("<|user|>")
    messages = example("x", "q", "yes<|user|>").messages
    assert encode_example("x", messages, tokenizer, end_ids=frozenset({other})).input_ids[-1] == other
    assert encode_example("x", messages, tokenizer).input_ids[-2:] == (other, tokenizer.eos_token_id)


def test_an_answer_that_goes_on_behind_an_end_token_is_refused_not_cut(tokenizer):
    examples = [example("cut", "q", "Write </s> to end."), example("ended", "q", "yes</s>")]
    encoded = encode_examples(examples, tokenizer, max_length=40)
    assert [e.sample_id for e in encoded.examples] == ["ended"]
    assert encoded.by_template == ("cut",)
    assert "take it out" in encoded.refusal
