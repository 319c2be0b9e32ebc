"""The pruning search: Ray Tune runs the trials, Optuna proposes them, held-out loss and bytes judge them.

A trial compresses the trained adapter by a recipe, puts it on the base and measures the loss on the validation
tasks' reference answers. The best few within the size limits are then compared by verdicts on validation tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from cascade import benchmarks
from cascade.artifacts import Run
from cascade.compression.adapter import AdapterWeights, fp16_bytes
from cascade.compression.apply import LoraSlot
from cascade.compression.calibrate import calibrate
from cascade.compression.format import encode_modifier
from cascade.compression.packed import CompressedAdapter
from cascade.compression.pareto import front
from cascade.compression.recipe import (
    Limits,
    compress,
    limits,
    recipe_from,
    search_space,
    seed_points,
)
from cascade.compression.truncate import Calibration
from cascade.config import Config, PromptStyle
from cascade.models.base import LoadedBase, end_token_ids, load_base
from cascade.tasks import Example, Message
from cascade.training.examples import encode_example
from cascade.training.loop import TargetLoss, mean_loss
from cascade.training.packing import Row, pack
from ray_jobs._context import Job
from ray_jobs._evaluate import limit_threads
from ray_jobs._progress import polling

TRIALS = "trials"
"""Table of the recipes that were tried; each trial adds its own row."""
FRONT = "front"
"""Folder of the modifier files of the Pareto front."""
STUDY = "study.db"
"""The search as an Optuna study, for `optuna-dashboard sqlite:///…/study.db`."""
Conversation = tuple[str, tuple[Message, ...]]
"""Task id and messages up to the answer."""


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried; also what Tune shows of it.

    Attributes:
        recipe: the recipe as JSON text; params: the point of the search space that it came from, the same.
        disk_bytes: exact size of its modifier file; resident_bytes: what serving holds of it.
        fits: whether both keep their limit.
        loss: mean held-out loss per target token, nats.
        seconds: of compressing and measuring, without what Tune needs around it.
    """

    recipe: str
    params: str
    disk_bytes: int
    resident_bytes: int
    loss: float
    fits: bool
    seconds: float

    @property
    def file(self) -> str:
        """Of the modifier file, inside the run; kept for the Pareto front."""
        return f"{FRONT}/{hashlib.sha256(self.params.encode()).hexdigest()[:12]}.safetensors"


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Of the trials that fit, those that no other one beats in both bytes and loss; smallest first."""
    return front([t for t in trials if t.fits], lambda t: (t.disk_bytes, t.loss))


@dataclass(frozen=True)
class Setting:
    """What all trials of a search share: one copy in Ray's object store.

    Attributes:
        held_out: validation tasks with their reference answers.
        calibration: how much each component of the adapter matters on training examples.
    """

    config: Config
    run: Run
    style: PromptStyle
    adapter: AdapterWeights
    held_out: tuple[Conversation, ...]
    calibration: Calibration
    limits: Limits


def search(job: Job, adapter: AdapterWeights, style: PromptStyle, calibration: Calibration) -> list[Trial]:
    """Try recipes; those of an interrupted search are not tried again.

    Returns:
        The trials by loss, also written to the run with the files of the Pareto front, and as an Optuna study.
    """
    bounds = limits(adapter, job.config.compression)
    setting = Setting(job.config, job.run, style, adapter, _held_out(job), calibration, bounds)
    trainable = tune.with_resources(tune.with_parameters(_trial, setting=setting), _resources(job.config))
    with polling(lambda: _show_progress(job)):
        _tuner(job, trainable, adapter).fit()
    tried = {t.params: t for t in job.run.read(TRIALS, Trial)}
    trials = sorted(tried.values(), key=lambda t: (t.loss, t.disk_bytes, t.recipe))
    job.run.write_table(TRIALS, Trial, trials)
    kept = {t.file for t in pareto_front(trials)}
    for file in {t.file for t in trials if t.fits} - kept:
        job.run.store.delete(f"{job.run.folder}/{file}")
    _write_study(job, trials, adapter)
    return trials


@dataclass(frozen=True)
class Groundwork:
    """What is measured once before the search.

    Attributes:
        calibration: how much each component of the adapter matters on examples that it was trained on.
        base_loss, trained_loss: held-out loss of the bare base and with the adapter as trained, nats per token.
    """

    calibration: Calibration
    base_loss: float
    trained_loss: float

    def gain(self, loss: float) -> float:
        """The share of the improvement in held-out loss that is left at a loss; NaN where there was none."""
        gained = self.base_loss - self.trained_loss
        return (self.base_loss - loss) / gained if gained > 0 else float("nan")


def lay_groundwork(job: Job, adapter: AdapterWeights, examples: list[Example], style: PromptStyle) -> Groundwork:
    """Calibrate the adapter and measure what it gained, in a Ray task."""
    conversations = tuple((e.task_id, tuple(e.messages)) for e in examples)
    found: Groundwork = ray.get(
        ray.remote(_groundwork)
        .options(num_cpus=job.config.execution.cpus_per_actor, num_gpus=1 if job.config.execution.use_gpu else 0)
        .remote(job.config, style, adapter, conversations, _held_out(job))
    )
    return found


def _groundwork(
    config: Config,
    style: PromptStyle,
    adapter: AdapterWeights,
    examples: tuple[Conversation, ...],
    held_out: tuple[Conversation, ...],
) -> Groundwork:
    bench = _bench(config.model_dump_json(), style, held_out)
    rows = _rows(bench.loaded, config, style, examples)
    step = max(1, len(rows) // config.compression.calibration_rows)
    calibration = calibrate(bench.loaded.model, adapter, rows[::step][: config.compression.calibration_rows])
    return Groundwork(calibration, bench.loss(None), bench.loss(adapter))


def _resources(config: Config) -> dict[str, float]:
    return {"cpu": config.execution.cpus_per_actor, "gpu": 1 if config.execution.use_gpu else 0}


def _show_progress(job: Job) -> None:
    trials = job.run.read(TRIALS, Trial)
    best = min((t.loss for t in trials if t.fits), default=None)
    found = "" if best is None else f", best loss {best:.3f}"
    job.progress.update(job.run.job, len(trials), job.config.compression.trials, f"trials{found}")


def _tuner(job: Job, trainable: Any, adapter: AdapterWeights) -> tune.Tuner:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = job.ray_storage()
    path, filesystem = f"{storage['storage_path']}/search", storage["storage_filesystem"]
    if tune.Tuner.can_restore(path, filesystem):
        return tune.Tuner.restore(path, trainable, resume_errored=True, storage_filesystem=filesystem)
    compression = job.config.compression
    algorithm = OptunaSearch(
        space=_distributions(search_space(compression, adapter=adapter)),
        metric=["loss", "disk_bytes"],
        mode=["min", "min"],
        points_to_evaluate=seed_points(compression, adapter=adapter)[: compression.trials],
        sampler=TPESampler(seed=job.config.seed, n_startup_trials=4),
    )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            num_samples=compression.trials,
            max_concurrent_trials=job.config.execution.tune_concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="search", **storage, verbose=0),
    )


def _distributions(space: dict[str, tuple[Any, ...]]) -> dict[str, BaseDistribution]:
    """The library's plain description of the search space in Optuna's terms."""
    kinds = {"uniform": FloatDistribution, "choice": CategoricalDistribution}
    return {name: kinds[kind](*arguments) for name, (kind, *arguments) in space.items()}


def _held_out(job: Job) -> tuple[Conversation, ...]:
    """Validation tasks with their reference answers: what the search's loss is measured on."""
    return tuple(
        (t.id, (*t.messages, Message("assistant", benchmarks.get(t.benchmark).reference_answer(t))))
        for t in job.runs.validation_tasks
        if t.form == "chat"
    )


def _write_study(job: Job, trials: list[Trial], adapter: AdapterWeights) -> None:
    """The search as an Optuna study in SQLite.

    Written when the search is over: the study that proposes is kept and restored by Tune, together with its own
    state, so that a kill cannot leave the two at odds.
    """
    space = _distributions(search_space(job.config.compression, adapter=adapter))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / STUDY
        study = optuna.create_study(
            storage=f"sqlite:///{file}", study_name=job.run.name, directions=["minimize", "minimize"]
        )
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            study.set_metric_names(["held-out loss", "bytes on disk"])
        for trial in trials:
            notes = {"recipe": trial.recipe, "resident_bytes": trial.resident_bytes, "fits": trial.fits}
            values = [trial.loss, float(trial.disk_bytes)]
            params = json.loads(trial.params)
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=space, values=values, user_attrs=notes)
            )
        job.run.store.write_bytes(f"{job.run.folder}/{STUDY}", file.read_bytes())


def _trial(params: dict[str, Any], setting: Setting) -> None:
    """One trial. The base is loaded once per Tune actor, which goes on to the next trial (`reuse_actors`)."""
    key = json.dumps(params, sort_keys=True)
    # Tune notes its state every few seconds: what ended after the last note of a killed search is proposed again.
    known = [t for t in setting.run.read(TRIALS, Trial) if t.params == key]
    trial = known[0] if known else _measure(params, setting, key)
    if not known:
        setting.run.write_part(TRIALS, [trial])
    tune.report(dataclasses.asdict(trial))


def _measure(params: dict[str, Any], setting: Setting, key: str) -> Trial:
    bench = _bench(setting.config.model_dump_json(), setting.style, setting.held_out)
    began = time.perf_counter()
    recipe = recipe_from(
        params,
        resident=setting.limits.resident / fp16_bytes(setting.adapter),
        bytes_per_number=bench.loaded.model.dtype.itemsize,
    )
    compressed = compress(setting.adapter, recipe, setting.calibration)
    data, resident = encode_modifier(compressed), bench.slot.bytes_for(compressed)
    fits = len(data) <= setting.limits.disk and resident <= setting.limits.resident
    loss = bench.loss(compressed)
    trial = Trial(recipe.model_dump_json(), key, len(data), resident, loss, fits, time.perf_counter() - began)
    if fits:
        setting.run.store.write_bytes(f"{setting.run.folder}/{trial.file}", data)
    return trial


@dataclass(frozen=True)
class _Bench:
    """A base with a slot, and the rows on which loss is measured."""

    loaded: LoadedBase
    slot: LoraSlot
    rows: list[Row]

    def loss(self, adapter: AdapterWeights | CompressedAdapter | None) -> float:
        """Held-out loss with an adapter, or of the bare base; nats per target token."""
        if adapter is None:
            self.slot.clear()
        else:
            self.slot.fill(adapter)
        return mean_loss(TargetLoss(self.loaded.model), self.rows, self.loaded.device)


@functools.lru_cache(maxsize=1)
def _bench(config_json: str, style: PromptStyle, held_out: tuple[Conversation, ...]) -> _Bench:
    config = Config.model_validate(json.loads(config_json))
    limit_threads(config.execution, config.execution.cpus_per_actor)
    loaded = load_base(config.base)
    return _Bench(loaded, LoraSlot(loaded.model), _rows(loaded, config, style, held_out))


def _rows(loaded: LoadedBase, config: Config, style: PromptStyle, conversations: Sequence[Conversation]) -> list[Row]:
    """Packed rows of the conversations that have something to learn and are not too long."""
    ends, longest = end_token_ids(loaded), config.training.lora.max_length
    encoded = [
        encode_example(task_id, messages, loaded.tokenizer, system=style.system, end_ids=ends)
        for task_id, messages in conversations
    ]
    return pack([e for e in encoded if e.targets and len(e) <= longest], longest)
