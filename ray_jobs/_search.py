"""The pruning search: Ray Tune runs the trials, Optuna proposes them, held-out loss and bytes judge them.

A trial compresses the trained adapter by a recipe, puts it on the base and measures the loss on the validation
tasks' reference answers. The best few within the size limit are then compared by verdicts on validation tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from cascade import benchmarks
from cascade.artifacts import Run
from cascade.compression.adapter import AdapterWeights
from cascade.compression.apply import LoraSlot
from cascade.compression.packed import CompressedAdapter
from cascade.compression.recipe import (
    byte_limit,
    compress,
    disk_bytes,
    recipe_from,
    resident_bytes,
    search_space,
    seed_points,
)
from cascade.config import Config, PromptStyle
from cascade.models.base import LoadedBase, end_token_ids, load_base
from cascade.tasks import Message, Task
from cascade.training.examples import encode_example
from cascade.training.loop import TargetLoss, mean_loss
from cascade.training.packing import Row, pack
from ray_jobs._context import Job
from ray_jobs._evaluate import limit_threads
from ray_jobs._progress import polling

TRIALS = "trials"
"""Table of the recipes that were tried; each trial adds its own row."""


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried; also what Tune shows of it.

    Attributes:
        recipe: the recipe as JSON text.
        disk_bytes: exact size of its modifier file; resident_bytes: what serving holds of it.
        fits: whether the file keeps the size limit.
        loss: mean held-out loss per target token, nats.
    """

    recipe: str
    disk_bytes: int
    resident_bytes: int
    loss: float
    fits: bool


def search(job: Job, adapter: AdapterWeights, style: PromptStyle) -> list[Trial]:
    """Try recipes; those of an interrupted search are not tried again. Trials are also written to the run."""
    parameters = {
        "config": job.config,
        "run": job.run,
        "adapter": adapter,
        "held_out": held_out(job.runs.validation_tasks),
        "style": style,
        "limit": byte_limit(adapter, job.config.compression),
    }
    execution = job.config.execution
    resources = {"cpu": execution.cpus_per_actor, "gpu": 1 if execution.use_gpu else 0}
    trainable = tune.with_resources(tune.with_parameters(_trial, **parameters), resources)
    with polling(lambda: _show_progress(job)):
        _tuner(job, trainable, adapter).fit()
    trials = sorted(job.run.read(TRIALS, Trial), key=lambda t: (t.loss, t.disk_bytes, t.recipe))
    job.run.write_table(TRIALS, Trial, trials)
    return trials


def _show_progress(job: Job) -> None:
    trials = job.run.read(TRIALS, Trial)
    best = min((t.loss for t in trials if t.fits), default=float("nan"))
    job.progress.update(job.run.job, len(trials), job.config.compression.trials, f"trials, best loss {best:.3f}")


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


def held_out(tasks: Sequence[Task]) -> list[tuple[str, tuple[Message, ...]]]:
    """Validation tasks with their reference answers: what the search's loss is measured on."""
    return [
        (t.id, (*t.messages, Message("assistant", benchmarks.get(t.benchmark).reference_answer(t))))
        for t in tasks
        if t.form == "chat"
    ]


def _trial(
    params: dict[str, Any],
    config: Config,
    run: Run,
    adapter: AdapterWeights,
    held_out: list[tuple[str, tuple[Message, ...]]],
    style: PromptStyle,
    limit: int,
) -> None:
    """One trial. The base is loaded once per Tune actor, which goes on to the next trial (`reuse_actors`)."""
    recipe = recipe_from(params)
    compressed = compress(adapter, recipe)
    bench = _bench(config.model_dump_json(), style, tuple(held_out))
    size = disk_bytes(compressed)
    trial = Trial(recipe.model_dump_json(), size, resident_bytes(compressed), bench.loss(compressed), size <= limit)
    run.write_part(TRIALS, [trial])
    tune.report(dataclasses.asdict(trial))


@dataclass(frozen=True)
class _Bench:
    """A base with a slot, and the rows on which loss is measured."""

    loaded: LoadedBase
    slot: LoraSlot
    rows: list[Row]

    def loss(self, adapter: AdapterWeights | CompressedAdapter) -> float:
        self.slot.fill(adapter)
        return mean_loss(TargetLoss(self.loaded.model), self.rows, self.loaded.device)


@functools.lru_cache(maxsize=1)
def _bench(config_json: str, style: PromptStyle, held_out: tuple[tuple[str, tuple[Message, ...]], ...]) -> _Bench:
    config = Config.model_validate(json.loads(config_json))
    limit_threads(config.execution, config.execution.cpus_per_actor)
    loaded = load_base(config.base)
    ends, longest = end_token_ids(loaded), config.training.lora.max_length
    encoded = [
        encode_example(task_id, messages, loaded.tokenizer, system=style.system, end_ids=ends)
        for task_id, messages in held_out
    ]
    rows = pack([e for e in encoded if e.targets and len(e) <= longest], longest)
    return _Bench(loaded, LoraSlot(loaded.model), rows)
