"""Where a base's context ends: answers end there too, and what does not fit is said and counted, never cut."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from stand_in import byte_tokenizer
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, MistralConfig, MistralForCausalLM

from cascade import benchmarks
from cascade.config import Base, Config, Lora, Probe, PromptStyle, Training
from cascade.errors import ConfigError
from cascade.models.attention import can_share, enable_sharing
from cascade.models.base import LoadedBase
from cascade.models.embedding import embed
from cascade.models.files import check_lengths
from cascade.models.student import Student
from cascade.scoring.statistics import Score
from cascade.tasks import Completion, Message, Task, Verdict

PLAIN = PromptStyle(name="plain")
CONTEXT = 48
YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def base_of(model: torch.nn.Module) -> LoadedBase:
    loaded = LoadedBase(model.eval().requires_grad_(False), byte_tokenizer(), "tiny", "")  # type: ignore[arg-type]
    enable_sharing(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def table() -> LoadedBase:
    """A base that looks positions up in a table: beyond its context there are none."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(byte_tokenizer()), n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, eos_token_id=1
    )
    return base_of(GPT2LMHeadModel(config))


@pytest.fixture
def turns(loaded: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> LoadedBase:
    """A base whose positions are turns, of as short a context."""
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", CONTEXT)
    return loaded


@pytest.fixture(params=["table", "turns"])
def short(request: pytest.FixtureRequest) -> LoadedBase:
    base: LoadedBase = request.getfixturevalue(request.param)
    return base


@contextmanager
def positions_of(loaded: LoadedBase):
    """The furthest position that the model computes with inside, in a list."""
    core = loaded.model.base_model
    module = core.wpe if hasattr(core, "wpe") else core.rotary_emb
    furthest = [0]

    def note(_, inputs, named):
        furthest[0] = max(furthest[0], int([*inputs, *named.values()][-1].max()))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    yield furthest
    handle.remove()


class Talk:
    """A benchmark that always asks on, and takes any answer for right."""

    def reply(self, task: Task, said: tuple[Message, ...]) -> tuple[Message, ...]:
        return (Message("user", "and?"),)

    def score(self, task: Task, completion: Completion) -> Verdict:
        return Verdict(task.id, completion.model, completion.modifier, "pass", completion.text)


@pytest.fixture(autouse=True)
def known_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "get", lambda name: Talk())


def make_task(name: str, prompt: str, **more) -> Task:
    return Task(name, "quiz", "reasoning", "test", (Message("user", prompt),), None, form="completion", **more)


def test_answers_end_where_the_context_does(short: LoadedBase) -> None:
    tasks = [make_task(str(n), "x" * n) for n in (10, 30, 44, CONTEXT - 1)]
    with positions_of(short) as furthest:
        answers = Student(short, max_tokens=30).answer(tasks, PLAIN)
    lengths = [(a.prompt_tokens + a.completion_tokens, a.finish_reason) for a in answers]
    assert lengths == [(40, "length"), *[(CONTEXT, "length")] * 3]
    assert furthest[0] == CONTEXT - 2  # the last token of all is chosen, and not read


def test_prompts_that_leave_no_room_are_errors_that_say_so_and_harm_no_others(short: LoadedBase) -> None:
    tasks = [make_task(str(n), "x" * n) for n in (CONTEXT + 40, 10, CONTEXT)]
    student = Student(short, max_tokens=5)
    completions, verdicts = student.judged(tasks, PLAIN)
    assert [(c.finish_reason, c.text == "") for c in completions] == [
        ("error", True),
        ("length", False),
        ("error", True),
    ]
    assert [v.outcome for v in verdicts] == ["error", "pass", "error"]
    assert (
        verdicts[0].evidence == "the prompt's 88 tokens leave no room for an answer in the base's context of 48 tokens"
    )
    score = Score.of(verdicts)
    assert (score.n, score.passed, score.errors) == (3, 1, 2)
    assert completions[1].text == student.answer(tasks[1:2], PLAIN)[0].text


def test_choices_are_compared_where_all_of_them_fit(short: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ("ab", "cdefg")  # of which the last token is only predicted
    tasks = [make_task(str(n), "x" * n, choices=choices) for n in (CONTEXT - 3, CONTEXT - 4, 7, 3 * CONTEXT)]
    tasks = [Task(**{f: getattr(t, f) for f in t.__slots__} | {"form": "likelihood"}) for t in tasks]
    with positions_of(short) as furthest:
        completions, verdicts = Student(short).judged(tasks, PLAIN)
    assert [v.outcome for v in verdicts] == ["error", "pass", "pass", "error"]
    assert [len(c.choice_logprobs) for c in completions] == [0, 2, 2, 0]
    assert "the prompt's 45 tokens leave no room" in verdicts[0].evidence
    assert furthest[0] == CONTEXT - 1
    alone = Student(short).answer(tasks[1:2], PLAIN)[0]
    assert completions[1].choice_logprobs == pytest.approx(alone.choice_logprobs, abs=1e-4)


def test_conversations_that_fill_the_context_end_there_and_are_judged_by_what_was_said(short: LoadedBase) -> None:
    def talk(name: str, prompt: str) -> Task:
        return Task(name, "quiz", "reasoning", "test", (Message("user", prompt),), None, max_turns=9)

    tasks = [talk("goes on", "hi"), talk("has no room", "x" * CONTEXT)]
    completions, verdicts = Student(short, max_tokens=8).judged(tasks, PLAIN)
    said = [m.content for m in completions[0].turns if m.role == "assistant"]
    assert 1 < len(said) < 9
    assert all(said)
    assert completions[0].finish_reason == "length"
    assert [v.outcome for v in verdicts] == ["pass", "error"]
    assert (verdicts[0].answer, completions[1].turns) == (said[-1], ())


def test_texts_beyond_the_context_are_embedded_by_their_beginning(table: LoadedBase) -> None:
    vectors = embed(table, ["x" * CONTEXT, "x" * 3 * CONTEXT])
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-5)


def test_a_base_whose_attention_cannot_be_shared_answers_where_there_are_no_choices_to_compare() -> None:
    config = MistralConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    loaded = base_of(MistralForCausalLM(config))
    assert not can_share(loaded.model)
    assert [c.completion_tokens for c in Student(loaded, max_tokens=3).answer([make_task("a", "hi")], PLAIN)] == [3]


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (GPT2Config(n_positions=77), 77),
        (LlamaConfig(max_position_embeddings=99), 99),
        (BloomConfig(), None),
        (LlamaConfig(max_position_embeddings=64, rope_parameters=YARN), 256),  # as Qwen says what it is stretched to
        (LlamaConfig(max_position_embeddings=256, rope_parameters=YARN), 256),
    ],
)
def test_the_context_is_what_the_config_of_the_base_says(config, context) -> None:
    class Model:
        pass

    model = Model()
    model.config = config
    assert LoadedBase(model, byte_tokenizer(), "", "").context == context


@pytest.mark.parametrize(
    ("training", "probe", "said"),
    [
        (CONTEXT, CONTEXT, ""),
        (CONTEXT + 1, CONTEXT, "training.lora.max_length: 49 tokens are more than the 48 of the base's context"),
        (CONTEXT, CONTEXT + 1, "probe.lora.max_length: 49 tokens are more than the 48 of the base's context"),
    ],
)
def test_examples_may_be_no_longer_than_the_context(training: int, probe: int, said: str, tmp_path: Path) -> None:
    GPT2Config(n_positions=CONTEXT).save_pretrained(tmp_path)
    config = Config.model_construct(
        base=Base(model=str(tmp_path)),
        training=Training(lora=Lora(max_length=training)),
        probe=Probe(lora=Lora(max_length=probe)),
    )
    if not said:
        check_lengths(config)
        return
    with pytest.raises(ConfigError, match=said):
        check_lengths(config)
