"""Planted leaks are found, all of them; clean examples stay; near-duplicates go."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cascade.scoring.decontaminate import clean, deduplicate, find_overlaps
from cascade.tasks import Example, Message, Task

RNG = random.Random(3)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(3, 9))) for _ in range(3000)]


def prose(length: int) -> str:
    return " ".join(RNG.choices(WORDS, k=length))


def task(number: int, prompt: str, benchmark: str = "b") -> Task:
    return Task(f"{benchmark}/{number}", benchmark, "d", "test", (Message("user", prompt),), None)


def example(prompt: str, answer: str = "the answer") -> Example:
    return Example("b/x", "b", "d", "c", 1, (Message("user", prompt), Message("assistant", answer)), "t", 1)


def conversation(*messages: Message) -> Example:
    return Example("jsonl/x", "jsonl", "d", "c", 1, messages, "t", 1)


def disguise(text: str) -> str:
    """Other case, spacing and punctuation, which must not hide a leak."""
    return "  ".join(w.upper() if RNG.random() < 0.3 else w + "," for w in text.split())


def test_every_planted_leak_is_found_and_nothing_else() -> None:
    tasks = [task(i, prose(RNG.randint(20, 60))) for i in range(300)]
    short = [task(i, prose(5)) for i in range(300, 320)]
    examples, planted = [], {}
    for i in range(600):
        if i % 3 == 0:
            leaked = RNG.choice(tasks)
            words = leaked.prompt.split()
            start = RNG.randrange(len(words) - 12)
            part = disguise(" ".join(words[start : start + 13]))
            text = f"{prose(20)} {part} {prose(20)}"
            examples.append(example(text) if i % 2 else example(prose(10), text))
            planted[i] = leaked.id
        elif i % 50 == 1:
            leaked = RNG.choice(short)
            examples.append(example(f" {leaked.prompt.upper()} "))
            planted[i] = leaked.id
        else:
            examples.append(example(prose(40), prose(30)))
    found = {o.example: o.task_id for o in find_overlaps(examples, tasks + short)}
    assert found == planted
    kept, overlaps = clean(examples, tasks + short)
    assert len(kept) == 600 - len(planted)
    assert {o.kind for o in overlaps} == {"exact", "ngram"}


def test_questions_in_scripts_without_blanks_are_found_within_other_text() -> None:
    question = "一个农夫有十七只羊，除了九只以外都死了。农夫还剩下多少只羊？"
    other = "一个商人有三匹马，卖掉了一匹。商人还剩下多少匹马？"
    leaked, clean_one = example(f"请回答：{question}谢谢。"), example(other)
    assert [o.example for o in find_overlaps([leaked, clean_one], [task(1, question)])] == [0]
    assert len(deduplicate([leaked, clean_one, example(f"请答：{question}谢谢。")])) == 2


def test_soft_hyphens_hide_no_leak() -> None:
    text = prose(13)
    assert find_overlaps([example(f"{prose(5)} {text[:2]}\u00ad{text[2:]} {prose(5)}")], [task(1, text)])


def test_boilerplate_and_templates_are_no_leaks() -> None:
    instruction = prose(30)
    tasks = [task(i, f"{instruction} {prose(20)}") for i in range(50)]
    assert find_overlaps([example(f"{instruction} {prose(20)}")], tasks) == []
    template = prose(25)
    generated = [task(i, f"{template} {i}", "reasoning_gym") for i in range(5)]
    assert find_overlaps([example(f"{template} 77")], generated) == []
    leaked = find_overlaps([example(f"Solve this: {template} 3. Thanks")], generated)
    assert [o.task_id for o in leaked] == ["reasoning_gym/3"]


def questions_of(benchmark: str, *asked: str) -> list[Task]:
    """Tasks with these bare questions, wrapped as their benchmark does."""
    wrapping = {
        "mbpp": "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n"
        "assert f(1) == 2\n[BEGIN]\n",
        "arc": "Question: {}\nAnswer:",
        "mmlu": "The following are multiple choice questions (with answers) about law.\n\n{}\nA. one\nB. two\n"
        "C. three\nD. four\nAnswer:",
        "bbh": "Q: {}\nA: Let's think step by step.\n",
    }
    return [task(i, wrapping.get(benchmark, "{}").format(text), benchmark) for i, text in enumerate(asked)]


@pytest.mark.parametrize("benchmark", ["mbpp", "arc", "mmlu", "bbh", "humaneval"])
def test_a_short_question_is_found_without_what_its_benchmark_puts_around_it(benchmark: str) -> None:
    short, long = "Write a function to count vowels.", "Which of the two heavy stones falls faster here?"
    tasks = questions_of(benchmark, short, long)
    plain = [
        example(f"  {short.upper()} "),
        example(f"Tell me. {long} Thanks!"),
        example("Hello", f"You asked: {long}"),
    ]
    assert [(o.example, o.task_id) for o in find_overlaps(plain, tasks)] == [
        (0, f"{benchmark}/0"), (1, f"{benchmark}/1"), (2, f"{benchmark}/1")
    ]  # fmt: skip
    wrapped = [replace(example(t.prompt), benchmark=benchmark) for t in questions_of(benchmark, short)]
    assert {o.kind for o in find_overlaps(wrapped, questions_of("b", short))} == {"exact"}
    assert find_overlaps([example(f"Tell me. {short} Thanks!"), example("Write a function to count")], tasks) == []


def test_a_long_question_made_of_boilerplate_is_found_whole() -> None:
    boilerplate = prose(14)
    tasks = [task(i, f"{boilerplate} {i}") for i in range(50)]
    assert find_overlaps([example(f"{prose(5)} {boilerplate} {prose(5)}")], tasks) == []
    assert [o.task_id for o in find_overlaps([example(f"{prose(5)} {boilerplate} 7, {prose(5)}")], tasks)] == ["b/7"]


def test_questions_that_differ_in_symbols_alone_are_told_apart() -> None:
    head = "Complete the rest of the sequence so that all is closed:"
    tasks = [task(i, f"{head} {signs}") for i, signs in enumerate(("[ { (", "< ( {", "( ( ["))]
    assert [o.task_id for o in find_overlaps([example(f"Now: {head} < ( {{ and so on")], tasks)] == ["b/1"]
    sums = [task(0, "State the final answer to the following arithmetic problem: 3 + 4 =", "reasoning_gym")]
    assert find_overlaps([example(sums[0].prompt.replace("+", "-"))], sums) == []
    assert find_overlaps([example(f"Please. {sums[0].prompt}")], sums)


def test_near_duplicates_go_and_the_first_stays() -> None:
    originals = [example(prose(60)) for _ in range(40)]
    copies = []
    for e in originals[:20]:
        words = e.messages[0].content.split()
        words[0] = "changed"
        copies.append(example(" ".join(words)))
    assert deduplicate(originals + copies) == originals
    assert deduplicate([*originals, originals[3]]) == originals
    assert deduplicate([]) == []


INSTRUCTION = "Classify the message of a customer as billing, network or contract, and answer with the category alone. "


def test_what_examples_share_around_their_questions_makes_them_no_duplicates() -> None:
    asks = [
        f"My {thing} {trouble} since {day}"
        for thing in ("phone", "bill", "line")
        for trouble in ("is wrong", "is gone")
        for day in ("Monday", "May")
    ]
    tools = prose(300)
    under_one_system = [
        conversation(Message("system", tools), Message("user", ask), Message("assistant", "billing")) for ask in asks
    ]
    assert deduplicate(under_one_system) == under_one_system
    assert deduplicate([*under_one_system, conversation(*under_one_system[0].messages)]) == under_one_system
    in_one_message = [
        conversation(Message("user", 3 * INSTRUCTION + ask), Message("assistant", "billing")) for ask in asks
    ]
    assert deduplicate(in_one_message) == in_one_message
    assert deduplicate([*in_one_message, conversation(*in_one_message[0].messages)]) == in_one_message


def test_one_question_with_other_options_is_another() -> None:
    question = "Which of these is true of it?"
    made = [
        conversation(Message("user", f"{question}\n(A) {prose(9)}\n(B) {prose(9)}"), Message("assistant", "A"))
        for _ in range(3)
    ]
    assert deduplicate(made) == made


def test_what_a_few_of_many_tasks_share_is_content_and_templates_lend_words_to_no_leak() -> None:
    template = prose(20)
    shared = prose(20)  # one question asked of fifteen sets of tools, as BFCL does
    tasks = [task(i, f"{template} {prose(15)}") for i in range(485)]
    tasks += [task(i, f"{template} {shared} {prose(3)}") for i in range(485, 500)]
    assert find_overlaps([example(f"{prose(5)} {shared[:-1]}")], tasks)
    borrowed = " ".join(template.split()[-8:] + tasks[0].prompt.split()[20:25])
    assert find_overlaps([example(f"{prose(5)} {borrowed}")], tasks) == []


def chat(of: Task | Example, record: str, question: str) -> Task | Example:
    messages = (Message("system", record), Message("user", question))
    return replace(of, benchmark="jsonl", messages=messages + of.messages[1:] if isinstance(of, Example) else messages)


@pytest.mark.parametrize("length", [4, 9, 15])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_chats_that_share_their_last_message_are_compared_whole(length: int, count: int) -> None:
    question, records = prose(length), [prose(20) for _ in range(40)]
    tasks = [chat(task(i, ""), records[i], question) for i in range(count)]
    examples = [chat(example(""), record, question) for record in records[20:]]
    assert clean(examples, tasks) == (examples, [])
    leaked = chat(example(""), records[0].upper(), question)
    quoted = chat(example("", f"It says: {disguise(records[0])}"), records[21], question)
    bare = replace(example(question), benchmark="jsonl")
    found = find_overlaps([*examples, leaked, quoted, bare], tasks)
    assert {o.example for o in found} == {20, 21, 22}
    assert {o.task_id for o in found if o.example < 22} == {"b/0"}


def test_a_question_that_tells_is_found_after_another_system_message() -> None:
    asked = [prose(5) for _ in range(10)]
    tasks = [chat(task(i, ""), "Be brief.", question) for i, question in enumerate(asked)]
    assert len(find_overlaps([chat(example(""), "Be kind.", question) for question in asked], tasks)) == 10
