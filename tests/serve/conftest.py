"""A stand-in store, an engine on it, and what each request must answer when it is alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_events import until
from stand_in import StandIn, build_stand_in

from cascade import modifiers
from cascade.compression.apply import LoraSlot
from cascade.models.base import LoadedBase, load_base
from cascade.models.generation import Batch, generate
from cascade.models.prompts import Prompts
from cascade.models.rows import Request
from cascade.tasks import Message
from serve.engine import Engine
from serve.events import Work
from serve.limits import Limits


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    torch.set_num_threads(1)
    return build_stand_in(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture(scope="session")
def loaded(stand_in: StandIn) -> LoadedBase:
    return load_base(stand_in.config.base, torch.device("cpu"))


class Reference:
    """Answers of a base of its own, one request at a time, with no engine in between."""

    def __init__(self, stand_in: StandIn) -> None:
        self._loaded = load_base(stand_in.config.base, torch.device("cpu"))
        self._slot, self._store = LoraSlot(self._loaded.model), stand_in.store

    def __call__(self, work: Work) -> str:
        self._slot.clear()
        messages = list(work.messages)
        if work.choice != "base":
            modifier, content = modifiers.load_current(self._store, work.choice)
            self._slot.fill(content)
            if modifier.system and all(m.role != "system" for m in messages):
                messages = [Message("system", modifier.system), *messages]
        text = self._loaded.tokenizer.apply_chat_template(
            [m.as_dict() for m in messages], tokenize=False, add_generation_prompt=True
        )
        prompt = self._loaded.tokenizer(text, add_special_tokens=False).input_ids
        assert work.max_tokens is not None
        request = Request(prompt, work.max_tokens, work.stop, work.temperature, work.top_p, work.seed)
        return generate(self._loaded, [request])[0].text


@pytest.fixture(scope="session")
def reference(stand_in: StandIn) -> Reference:
    return Reference(stand_in)


@pytest.fixture
def make_engine(stand_in: StandIn, loaded: LoadedBase, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines on the one base, each closed before the next test."""
    made = []

    def make(**limits: float) -> Engine:
        made.append(Engine(loaded, stand_in.store, tmp_path / "forms", Limits(**limits)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


class Passes:
    """How often rows were computed, as steps of answers or parts of prompts."""

    def __init__(self) -> None:
        self.count = 0

    async def until(self, reached: Callable[[], bool]) -> int:
        """Wait; how many passes it took."""
        before = self.count
        await until(reached)
        return self.count - before


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Counts instead of seconds, which are others' on a busy machine. A pass takes a millisecond at least."""
    found = Passes()

    def counted(compute: Callable[..., object]) -> Callable[..., object]:
        def computed(*given: object) -> object:
            time.sleep(0.001)
            found.count += 1
            return compute(*given)

        return computed

    monkeypatch.setattr(Batch, "step", counted(Batch.step))
    monkeypatch.setattr(Prompts, "advance", counted(Prompts.advance))
    return found


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(patience_s=0.2)


def work(choice: str, question: str = "What is 1 plus 2?", max_tokens: int = 16, **more: object) -> Work:
    """A greedy request."""
    fields: dict[str, object] = {"temperature": 0.0} | more
    return Work(choice, (Message("user", question),), max_tokens, **fields)  # type: ignore[arg-type]


@pytest.fixture(name="work")
def work_fixture() -> object:
    return work
