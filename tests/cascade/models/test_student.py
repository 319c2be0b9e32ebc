"""How the student is asked: worked examples, styles, prefills, raw text and likelihoods."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cascade import benchmarks
from cascade.config import PromptStyle
from cascade.errors import DataError
from cascade.models.rows import Generated, Request
from cascade.models.student import Student, _split_choices, _whole
from cascade.models.worked_examples import WorkedExamples, styled_messages
from cascade.tasks import Completion, Message, Task, Verdict

PLAIN = PromptStyle(name="plain")


class Answers:
    """A benchmark whose right answer is known by the task's id."""

    def reference_answer(self, task):
        return f"answer to {task.id}"


@pytest.fixture(autouse=True)
def known_benchmark(monkeypatch):
    monkeypatch.setattr(benchmarks, "get", lambda name: Answers())


def make_task(number, category="a", prompt=None, **more):
    messages = (Message("user", prompt or f"question {number}"),)
    fields = {"split": "train", "messages": messages, "reference": None, "category": category} | more
    return Task(f"quiz/{number}", "quiz", "reasoning", **fields)


POOL = [make_task(i, "abc"[i % 3]) for i in range(60)]


def shown(messages):
    """(question, answer) pairs of worked examples."""
    return [(q.content, a.content) for q, a in zip(messages[::2], messages[1::2], strict=True)]


@given(st.integers(0, 12), st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), max_size=30), st.data())
def test_worked_examples_never_contain_the_question(count, made, data):
    # Prompts repeat under other ids, as they do in benchmarks with duplicates.
    pool = [make_task(i, category, f"prompt {prompt}") for i, (prompt, category) in enumerate(made)]
    task = data.draw(st.sampled_from(pool or [make_task(99)]))
    kept = WorkedExamples.from_pool(pool)
    messages = kept.for_task(task, count)
    assert task.prompt not in [m.content for m in messages]
    assert f"answer to {task.id}" not in [m.content for m in messages]
    usable = {t.id for tasks in kept.by_category.values() for t in tasks if t.prompt != task.prompt}
    assert len(messages) == 2 * min(count, len(usable))
    assert [m.role for m in messages] == ["user", "assistant"] * (len(messages) // 2)


def test_worked_examples_are_of_the_same_category_first():
    examples = WorkedExamples.from_pool(POOL, most=4)
    pairs = shown(examples.for_task(POOL[1], 6))
    assert pairs[:4] == [(f"question {i}", f"answer to quiz/{i}") for i in (4, 7, 10, 13)]
    assert {int(q.split()[1]) % 3 for q, _ in pairs[4:]} == {0}
    new = make_task(1000, "b", split="test")
    assert shown(examples.for_task(new, 5)) == [(f"question {i}", f"answer to quiz/{i}") for i in (1, 4, 7, 10, 13)]


def test_tasks_without_a_known_answer_are_not_shown(monkeypatch):
    def answer(task):
        if task.id == "quiz/0":
            raise DataError("no solution")
        return " " if task.id == "quiz/1" else "yes"

    monkeypatch.setattr(Answers, "reference_answer", lambda self, task: answer(task))
    examples = WorkedExamples.from_pool([make_task(i) for i in range(3)], most=0)
    assert shown(examples.for_task(make_task(9), 3)) == [("question 2", "yes")]


def test_only_chat_tasks_of_one_message_are_shown_or_get_examples():
    conversation = (Message("system", "s"), Message("user", "q"))
    odd = [
        make_task(0, form="completion"),
        make_task(1, form="likelihood", choices=(" a", " b")),
        make_task(2, messages=conversation),
    ]
    assert WorkedExamples.from_pool(odd).by_category == {}
    examples = WorkedExamples.from_pool(POOL)
    assert [examples.for_task(t, 3) for t in odd] == [[], [], []]
    assert examples.for_task(POOL[0], 0) == []


def test_styles_put_system_message_and_examples_before_the_question():
    examples = WorkedExamples.from_pool(POOL)
    task = make_task(500, "a", "What now?")
    assert styled_messages(task, PLAIN, examples) == [Message("user", "What now?")]
    style = PromptStyle(name="full", system="Be brief.", shots=2)
    messages = styled_messages(task, style, examples)
    assert messages[0] == Message("system", "Be brief.")
    assert shown(messages[1:-1]) == [("question 0", "answer to quiz/0"), ("question 3", "answer to quiz/3")]
    assert messages[-1] == Message("user", "What now?")
    assert styled_messages(task, style) == [messages[0], messages[-1]]


def test_a_task_keeps_its_own_system_message():
    own = (Message("system", "Mine."), Message("user", "q"))
    assert styled_messages(make_task(0, messages=own), PromptStyle(name="s", system="Be brief.")) == list(own)


def text_of(loaded, ids):
    return loaded.tokenizer.decode(ids)


def test_prompt_of_a_chat_task_is_the_rendered_conversation(loaded):
    style = PromptStyle(name="s", system="Be brief.", shots=1)
    ids = Student(loaded).prompt_ids(make_task(900, prompt="Why?"), style, WorkedExamples.from_pool(POOL))
    assert text_of(loaded, ids) == (
        "<|system|>Be brief.</s><|user|>question 0</s><|assistant|>answer to quiz/0</s><|user|>Why?</s><|assistant|>"
    )


def test_a_prefill_is_continued_and_not_ended(loaded):
    messages = (Message("user", "Write f."), Message("assistant", "```python\ndef f():\n    "))
    ids = Student(loaded).prompt_ids(make_task(0, messages=messages), PLAIN)
    assert text_of(loaded, ids) == "<|user|>Write f.</s><|assistant|>```python\ndef f():\n    "


def test_raw_text_is_continued_without_template_or_examples(loaded):
    task = make_task(0, form="completion", prompt="def f():\n    ")
    style = PromptStyle(name="s", system="Be brief.", shots=3)
    ids = Student(loaded).prompt_ids(task, style, WorkedExamples.from_pool(POOL))
    assert ids == loaded.tokenizer("def f():\n    ").input_ids
    assert text_of(loaded, ids) == "def f():\n    "


@pytest.mark.parametrize(("form", "kept"), [("completion", "    a"), ("chat", "   a")])
def test_code_that_goes_on_keeps_its_indentation_where_decoders_strip_a_blank(loaded, monkeypatch, form, kept):
    pieces = ["<unk>", "</s>", "<0x0A>", "▁", "▁▁", "▁▁▁▁", "a"]
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    llama = Tokenizer(model)
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama, eos_token="</s>")
    student = Student(replace(loaded, tokenizer=tokenizer))
    answer = Generated((5, 6), tokenizer.decode([5, 6]), "stop")
    assert answer.text == "   a"
    assert student._text(make_task(0, form=form), Request([6, 2], 9), answer) == kept


def test_answers_come_in_order_of_the_tasks_with_their_figures(loaded):
    student = Student(loaded, modifier="v3", tokens=300, max_tokens=12)
    choose = make_task("c", form="likelihood", prompt="Sky is", choices=(" blue", " a"))
    tasks = [make_task(0, max_tokens=5), choose, make_task(1), make_task(2, form="completion", max_tokens=9)]
    completions = student.answer(tasks, PLAIN)
    assert [c.task_id for c in completions] == [t.id for t in tasks]
    assert [c.completion_tokens for c in completions] == [5, 0, 12, 9]
    assert {(c.model, c.modifier) for c in completions} == {(loaded.name, "v3")}
    assert [c.prompt_tokens for c in completions if c.task_id != choose.id] == [
        len(student.prompt_ids(t, PLAIN)) for t in tasks if t is not choose
    ]
    assert all(c.seconds > 0 for c in completions)
    assert [c.text for c in completions] == [student.answer([t], PLAIN)[0].text for t in tasks]
    assert student.answer([], PLAIN) == []


def test_verdicts_come_in_order_of_the_tasks_and_are_made_beside_the_answers(loaded, monkeypatch):
    tasks = [make_task(i, max_tokens=2 + i % 5) for i in range(9)]
    threads = set()

    def score(task, completion):
        assert completion.task_id == task.id
        threads.add(threading.current_thread())
        return Verdict(task.id, "base", "", "pass" if len(completion.text) % 2 else "fail")

    monkeypatch.setattr(benchmarks, "score", score)
    student, style = Student(loaded, max_tokens=6), PromptStyle(name="plain")
    completions, verdicts = student.judged(tasks, style)
    assert [replace(c, seconds=0) for c in completions] == [replace(c, seconds=0) for c in student.answer(tasks, style)]
    assert [(v.task_id, v.passed) for v in verdicts] == [(c.task_id, len(c.text) % 2 == 1) for c in completions]
    assert threading.current_thread() not in threads


def test_a_scorer_that_fails_is_not_passed_over(loaded, monkeypatch):
    def score(task, completion):
        raise DataError("the tests of this task cannot be read")

    monkeypatch.setattr(benchmarks, "score", score)
    with pytest.raises(DataError, match="cannot be read"):
        Student(loaded, max_tokens=2).judged([make_task(1)], PromptStyle(name="plain"))


def test_stop_strings_of_a_task_cut_its_answer(loaded):
    student = Student(loaded, max_tokens=30)
    whole = student.answer([make_task(7)], PLAIN)[0].text
    stop = whole[5:7]
    cut = student.answer([make_task(7, stop=(stop,))], PLAIN)[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_sampling_is_of_seed_and_task_whatever_the_batch(loaded):
    student = Student(loaded, temperature=1.0, max_tokens=10, seed=4)
    texts = [c.text for c in student.answer(POOL[:6], PLAIN)]
    backwards = replace(student, tokens=200).answer(POOL[5::-1], PLAIN)
    assert [c.text for c in backwards] == texts[::-1]
    assert [c.text for c in replace(student, seed=5).answer(POOL[:6], PLAIN)] != texts
    twins = [replace(POOL[0], id=f"quiz/twin {i}") for i in range(4)]
    assert len({c.text for c in student.answer(twins, PLAIN)}) == 4


def direct(loaded, context, choice):
    """Log-likelihood of a choice's characters after a context, in a byte-level vocabulary."""
    ids = loaded.tokenizer(context + choice).input_ids
    start = len(loaded.tokenizer(context).input_ids)
    with torch.no_grad():
        log_p = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))


def test_likelihoods_of_the_choices_and_the_likeliest(loaded):
    rng = random.Random(2)
    choices = tuple(" " + "".join(rng.choice("abcdef") for _ in range(n)) for n in (4, 1, 9))
    tasks = [make_task(i, form="likelihood", prompt=p, choices=choices) for i, p in enumerate(("Is", "Sky is it"))]
    for task, completion in zip(tasks, Student(loaded).answer(tasks, PLAIN), strict=True):
        expected = [direct(loaded, task.prompt, c) for c in choices]
        assert completion.choice_logprobs == pytest.approx(expected, abs=1e-3)
        assert completion.choice_tokens == (5, 2, 10)
        assert completion.text == choices[expected.index(max(expected))]
        assert completion.prompt_tokens == len(task.prompt)


class Tokens:
    """A loaded base of which only the tokenizer is asked."""

    def __init__(self, *merges):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {t: i for i, t in enumerate(["<s>", "</s>", *alphabet, *map("".join, merges)])}
        core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")

    def split(self, context, *choices):
        """Context and choices as tokens; Ġ is a space, Ċ a line break."""
        task = make_task(0, form="likelihood", prompt=context, choices=choices)
        [question] = _split_choices(self, [task])
        names = self.tokenizer.convert_ids_to_tokens
        return names(question.context), [names(c) for c in question.choices]


def test_spaces_at_the_end_of_the_context_belong_to_the_choice():
    tokens = Tokens(("Ġ", "y"))
    assert tokens.split("Q: ", "y", "n") == (["Q", ":"], [["Ġy"], ["Ġ", "n"]])
    assert tokens.split("Q:", " y", " n") == tokens.split("Q: ", "y", "n")
    assert tokens.split("Q:\n", "y") == (["Q", ":"], [["Ċ", "y"]])


def test_a_choice_that_merges_with_the_context_keeps_its_tokens():
    tokens = Tokens(("(", "A"))
    assert tokens.split("Q (", "A", "B") == (["Q", "Ġ"], [["(A"], ["(", "B"]])


def test_choices_that_begin_alike_are_cut_at_the_context():
    assert Tokens().split("Q", " ab", " ac", " a") == (["Q"], [["Ġ", "a", "b"], ["Ġ", "a", "c"], ["Ġ", "a"]])


def test_without_a_context_choices_follow_the_first_token():
    assert Tokens().split(" ", "a", "b") == (["<s>"], [["Ġ", "a"], ["Ġ", "b"]])
    tokens = Tokens()
    tokens.tokenizer.bos_token = None
    assert tokens.split(" ", "a", "b")[0] == ["</s>"]


def test_an_empty_choice_is_refused():
    with pytest.raises(DataError, match=r"task quiz/0: a choice is empty"):
        Tokens().split("Q", "a", "")


class Talks(Answers):
    """Conversations of as many answers as the task's difficulty."""

    def reply(self, task, said):
        return () if len(said) + 1 == 2 * task.difficulty else (Message("user", f"go on after {len(said)}"),)


def test_conversations_go_on_until_the_benchmark_is_silent(loaded, monkeypatch):
    monkeypatch.setattr(benchmarks, "get", lambda name: Talks())
    single = [make_task(9, max_tokens=4)]
    talks = [make_task(i, difficulty=i, max_turns=3, max_tokens=4) for i in (1, 2, 3, 7)]
    student = Student(loaded, tokens=300)
    answers = student.answer([*talks, *single], PLAIN)
    assert [c.task_id for c in answers] == [t.id for t in (*talks, *single)]
    assert [sum(m.role == "assistant" for m in c.turns) for c in answers] == [1, 2, 3, 3, 0]
    third = answers[2]
    assert [m.role for m in third.turns] == ["assistant", "user", "assistant", "user", "assistant"]
    assert (third.turns[-1].content, third.turns[3].content) == (third.text, "go on after 3")
    assert third.said == third.turns
    assert answers[-1].said == (Message("assistant", answers[-1].text),)
    alone = student.answer([replace(talks[2], messages=(*talks[2].messages, *third.turns[:-1]), max_turns=1)], PLAIN)
    assert alone[0].text == third.text
    assert third.completion_tokens > alone[0].completion_tokens


def test_a_conversation_is_cut_off_where_any_of_its_answers_was():
    rounds = [
        Completion("t", "m", "", text, reason) for text, reason in (("a", "stop"), ("b", "length"), ("c", "stop"))
    ]
    assert _whole(rounds, ()).finish_reason == "length"
    assert _whole(rounds[::2], ()).finish_reason == "stop"
