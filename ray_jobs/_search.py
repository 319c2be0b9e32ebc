"""The pruning search: Ray Tune runs the trials, Optuna proposes them, held-out loss and bytes judge them.

A trial compresses the trained adapter by a recipe, puts it on the base and measures the loss on the validation
tasks' reference answers. The best few within the size limits are then compared by verdicts on validation tasks.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
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
from cascade.compression.adapter import AdapterWeights
from cascade.compression.calibrate import calibrate
from cascade.compression.recipe import (
    limits,
    search_space,
    seed_points,
)
from cascade.compression.truncate import Calibration
from cascade.config import Config, PromptStyle
from cascade.errors import CascadeError
from cascade.tasks import Example, Message
from ray_jobs._context import Job
from ray_jobs._progress import polling
from ray_jobs._trial import TRIALS, Conversation, Setting, Trial, load_bench, packed_rows, pareto_front, run_trial

RETRIES = 3
"""Times that a trial is begun again whose node or process was lost."""
STUDY = "study.db"
"""The search as an Optuna study, for `optuna-dashboard sqlite:///…/study.db`."""


def search(job: Job, adapter: AdapterWeights, style: PromptStyle, calibration: Calibration) -> list[Trial]:
    """Try recipes; those of an interrupted search are not tried again.

    Returns:
        The trials by loss, also written to the run with the files of the Pareto front, and as an Optuna study.
    """
    bounds = limits(adapter, job.config.compression)
    setting = Setting(job.config, job.run, style, adapter, held_out_answers(job), calibration, bounds)
    trainable = tune.with_resources(tune.with_parameters(run_trial, setting=setting), resources(job.config))
    with polling(lambda: _show_progress(job)):
        results = _tuner(job, trainable, adapter).fit()
        if results.errors:  # Tune gives up at once a trial whose process died before it had begun: one more go
            results = _tuner(job, trainable, adapter).fit()
    tried = {t.params: t for t in job.run.read(TRIALS, Trial)}
    _check_lost(job, results, len(tried))
    trials = sorted(tried.values(), key=lambda t: (t.loss, t.disk_bytes, t.recipe))
    job.run.write_table(TRIALS, Trial, trials)
    kept = {t.file for t in pareto_front(trials)}
    for file in {t.file for t in trials if t.fits and t.share == 1} - kept:
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
        .options(num_cpus=job.config.execution.cpus_per_actor, num_gpus=job.config.execution.gpus)
        .remote(job.config, style, adapter, conversations, held_out_answers(job))
    )
    return found


def _groundwork(
    config: Config,
    style: PromptStyle,
    adapter: AdapterWeights,
    examples: tuple[Conversation, ...],
    held_out: tuple[Conversation, ...],
) -> Groundwork:
    bench = load_bench(config.model_dump_json(), style, held_out)
    rows = packed_rows(bench.loaded, config, style, examples)
    step = max(1, len(rows) // config.compression.calibration_rows)
    calibration = calibrate(bench.loaded.model, adapter, rows[::step][: config.compression.calibration_rows])
    return Groundwork(calibration, bench.loss(None), bench.loss(adapter))


def resources(config: Config) -> dict[str, float]:
    """What a trial, or anything that evaluates as one does, asks Ray for."""
    return {"cpu": config.execution.cpus_per_actor, "gpu": config.execution.gpus}


def _show_progress(job: Job) -> None:
    trials = job.run.read(TRIALS, Trial)
    best = min((t.loss for t in pareto_front(trials)), default=None)
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
        run_config=tune.RunConfig(
            name="search", **storage, verbose=0, failure_config=tune.FailureConfig(max_failures=RETRIES)
        ),
    )


def _check_lost(job: Job, results: tune.ResultGrid, measured: int) -> None:
    """Say which trials failed for good: with none left there is no search, with some it is a smaller one.

    Raises:
        CascadeError: no trial was measured.
    """
    errors = results.errors
    if not errors:
        return
    found = (
        f"{len(errors)} of {job.config.compression.trials} trials failed {RETRIES + 1} times, the first: {errors[0]}"
    )
    if not measured:
        raise CascadeError(f"{found}\nMend what it says and run again: failed trials are tried again.")
    logging.getLogger(__name__).warning("%s", found)


def _distributions(space: dict[str, tuple[Any, ...]]) -> dict[str, BaseDistribution]:
    """The library's plain description of the search space in Optuna's terms."""
    kinds: dict[str, Callable[..., BaseDistribution]] = {
        "uniform": FloatDistribution,
        "log-uniform": functools.partial(FloatDistribution, log=True),
        "choice": CategoricalDistribution,
    }
    return {name: kinds[kind](*arguments) for name, (kind, *arguments) in space.items()}


def held_out_answers(job: Job) -> tuple[Conversation, ...]:
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
            noted = ("recipe", "resident_bytes", "fits", "share")
            notes = {name: getattr(trial, name) for name in noted}
            values = [trial.loss, float(trial.disk_bytes)]
            params = json.loads(trial.params)
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=space, values=values, user_attrs=notes)
            )
        job.run.store.write_bytes(f"{job.run.folder}/{STUDY}", file.read_bytes())
