"""The driver's side of the training: what it refuses before workers start, and what it makes of their errors."""

from __future__ import annotations

import pickle
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError, UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from stand_in import save_tiny_base

from cascade.artifacts import Run
from cascade.config import Probe, PromptStyle, Training
from cascade.errors import ConfigError, DataError
from cascade.models import bits
from cascade.store import StorageError, Store
from cascade.tasks import Example, Message, Task
from ray_jobs import _train
from ray_jobs._context import LOCK, SCRATCH, Job, run_job
from ray_jobs._train import GiveUpOnUserErrors, check_before, user_error
from ray_jobs._train_controller import RAY_FOLDER, Assigned
from ray_jobs._train_ledger import PROGRESS

STYLE = PromptStyle(name="plain")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_base(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Store(str(tmp_path)), "sums", "train_modifier", "0f0f")


def assigned(base: str, run: Run, **training: Any) -> Assigned:
    config: Any = SimpleNamespace(
        base=SimpleNamespace(model=base, revision=None),
        training=Training.model_validate(training),
        probe=Probe(enabled=False),
    )
    return Assigned(config, run, STYLE, (), ())


def example(answer: str) -> Example:
    messages = (Message("user", "q"), Message("assistant", answer))
    return Example("e", "quiz", "sums", "", 1, messages, "t", 1)


def test_ctrl_c_in_training_is_an_interruption_then_and_after(run: Run) -> None:
    def interrupted() -> None:  # as Ray Train is
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        signal.raise_signal(signal.SIGINT)

    trainer: Any = SimpleNamespace(fit=interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _train._fit(trainer, run)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_the_workers_would_refuse_is_refused_before_they_start(base: str, run: Run) -> None:
    check_before(assigned(base, run), [example(" "), example("yes")])
    with pytest.raises(DataError, match=r"none of the examples.*1 are longer than training\.lora\.max_length = 8 tok"):
        check_before(assigned(base, run, lora={"max_length": 8}), [example("a long answer")])


@pytest.mark.parametrize(
    ("training", "said"),
    [({"trackers": ["wandb"]}, "training.trackers names wandb"), ({"base_bits": 8}, "base_bits: 8 needs bitsandbytes")],
)
def test_missing_packages_are_named_before_workers_start(
    base: str, run: Run, monkeypatch: pytest.MonkeyPatch, training: Any, said: str
) -> None:
    missing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(bits, "importlib", missing)
    monkeypatch.setattr(_train.trackers, "importlib", missing)
    with pytest.raises(ConfigError, match=said):
        check_before(assigned(base, run, **training), [example("yes")])


def test_a_loss_that_decides_needs_reference_answers(run: Run) -> None:
    messages = (Message("user", "q"),)
    tasks = [Task("livecodebench/1", "livecodebench", "code", "validation", messages, {})]
    runs: Any = SimpleNamespace(validation_tasks=tasks)
    for validation, fine in (({"keep": "best_loss"}, False), ({"patience": 2}, False), ({}, True)):
        config: Any = SimpleNamespace(training=Training.model_validate({"validation": validation}))
        job = Job(config, runs, run)
        if fine:
            assert _train._assign(job, STYLE).held_out == ()
            continue
        with pytest.raises(DataError, match=r"none of the 1 validation tasks has a reference answer.*keep: last"):
            _train._assign(job, STYLE)


OWN = DataError("mend the data")
WRAPPED = [
    OWN,
    UserExceptionWithTraceback(OWN, "Traceback …"),
    WorkerGroupError("2 failed", {0: RuntimeError("lost a peer"), 1: UserExceptionWithTraceback(OWN, "Traceback …")}),
    ControllerError(OWN),
    pickle.loads(pickle.dumps(ControllerError(OWN))),
]


@pytest.mark.parametrize("error", WRAPPED)
def test_the_users_error_is_found_in_what_ray_wraps_around_it(error: Exception) -> None:
    found = user_error(error)
    assert isinstance(found, DataError)
    assert str(found) == "mend the data"


def test_other_errors_are_nobodys_to_mend_and_are_tried_again() -> None:
    error = WorkerGroupError("1 failed", {0: RuntimeError("out of memory")})
    assert user_error(error) is None
    GiveUpOnUserErrors().after_exception(None, error.worker_failures)
    with pytest.raises(DataError, match="mend the data"):
        GiveUpOnUserErrors().after_exception(None, {0: RuntimeError("lost a peer"), 1: WRAPPED[1]})


def test_a_storage_that_takes_nothing_is_tried_again_and_said_at_the_end(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as found:
        Store(str(tmp_path / "file")).write_bytes("curve.parquet", b"")
    failed = UserExceptionWithTraceback(found.value, "Traceback …")
    GiveUpOnUserErrors().after_exception(None, {0: failed})
    with pytest.raises(DataError, match="mend the data"):
        GiveUpOnUserErrors().after_exception(None, {0: failed, 1: WRAPPED[1]})
    trainer: Any = FailingTrainer(WorkerGroupError("1 failed", {0: failed}))
    with pytest.raises(StorageError, match=r"file/curve\.parquet cannot be written: File exists$"):
        _train._fit(trainer, run)


class FailingTrainer:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def fit(self) -> None:
        raise self.error


def test_the_driver_raises_the_users_error_alone(run: Run) -> None:
    trainer: Any = FailingTrainer(WRAPPED[2])
    with pytest.raises(DataError, match=r"^mend the data$"):
        _train._fit(trainer, run)
    other: Any = FailingTrainer(WorkerGroupError("1 failed", {0: RuntimeError("out of memory")}))
    with pytest.raises(WorkerGroupError, match="1 failed"):
        _train._fit(other, run)


def test_a_corrupt_state_of_ray_says_how_to_begin_again(run: Run) -> None:
    cause = CheckpointManagerInitializationError("a checkpoint does not exist anymore")
    task = RayTaskError("TrainController.__init__", f"{type(cause).__name__}: {cause}", cause)
    trainer: Any = FailingTrainer(ActorDiedError(task))
    with pytest.raises(DataError, match=r"remove .*/sums/train_modifier@0f0f/train and run again"):
        _train._fit(trainer, run)


def test_what_a_training_needs_is_deleted_behind_its_end_and_not_before(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {RAY_FOLDER, PROGRESS, LOCK} == set(SCRATCH)
    runs: Any = SimpleNamespace(config={}, run=lambda name: run)
    checkpoint = f"{run.folder}/{RAY_FOLDER}/checkpoint/state.safetensors"

    def work(job: Job) -> dict[str, Any]:
        run.store.write_bytes(checkpoint, b"weights")
        run.store.write_json(f"{run.folder}/{PROGRESS}", {"step": 1})
        return {"steps": 3}

    with monkeypatch.context() as patch:  # killed before the job is marked as done
        patch.setattr(Run, "finish", lambda self, metrics: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_job("train_modifier", work, runs)
    assert run.store.exists(checkpoint)
    with monkeypatch.context() as patch:  # killed in the middle of deleting
        patch.setattr(Store, "delete", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_job("train_modifier", work, runs)
    assert run.done
    assert run.store.exists(checkpoint)
    assert run_job("train_modifier", work, runs) == {"steps": 3}
    assert run.store.list(run.folder) == ["manifest.json"]


def test_an_example_of_every_kind_of_refusal_is_needed_to_refuse_all(base: str, run: Run) -> None:
    refused = replace(example("x"), messages=(Message("user", "q"),))
    with pytest.raises(DataError, match="1 have no assistant text"):
        check_before(assigned(base, run), [refused])
