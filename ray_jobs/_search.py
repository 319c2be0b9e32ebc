"""The pruning search: Ray Tune runs the trials, Optuna proposes them, held-out loss and bytes judge them.

A trial compresses the trained adapter by a recipe, puts it on the base and measures the loss on the validation
tasks' reference answers. The best few within the size limits are then compared by verdicts on validation tasks.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import optuna
import ray
from ray import tune

from cascade.compression.adapter import AdapterWeights
from cascade.compression.recipe import Limits, limits, matters, search_space, seed_points
from cascade.config import PromptStyle
from cascade.errors import CascadeError
from cascade.tasks import Example
from ray_jobs._context import Job
from ray_jobs._follow import Follower
from ray_jobs._held_out import Conversation, held_out
from ray_jobs._progress import polling
from ray_jobs._study import Distributions, FrontSampler, StudyFile, TrialSearch, distributions
from ray_jobs._trial import (
    TRIALS,
    Groundwork,
    Setting,
    Trial,
    TrialRunner,
    kept_files,
    pareto_front,
)

RETRIES = 3
"""Times that a trial is begun again whose node or process was lost."""
IN_PLACE = 256
"""Training examples that take the place of validation tasks where none of these has a reference answer."""


def search(job: Job, adapter: AdapterWeights, style: PromptStyle, ground: Groundwork) -> list[Trial]:
    """Try recipes; those of an interrupted search are not tried again.

    Returns:
        The trials by loss, also written to the run with the files of `kept_files`, and as an Optuna study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # On Ctrl-C Tune would end the search and hand over what it has, to be chosen from as if that were all.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    bounds = limits(adapter, job.config.compression)
    watch = Watch(job, distributions(search_space(job.config.compression)), bounds)
    with polling(watch.look):
        for _ in range(2):  # Tune gives up at once a trial whose process died before it had begun: one more go
            known = {t.params: t for t in job.run.read(TRIALS, Trial)}
            setting = Setting(job.config, job.run, style, adapter, held_out_answers(job), ground, bounds, known)
            results = _tuner(job, setting).fit()
            if not results.errors:
                break
    watch.look()
    _check_lost(job, results, len(watch.tried))
    trials = sorted(watch.tried.values(), key=lambda t: (t.loss, t.disk_bytes, t.recipe))
    job.run.write_table(TRIALS, Trial, trials)
    kept = kept_files(trials, job.config.compression)
    for file in {t.file for t in trials if t.fits and t.share == 1} - kept:
        job.run.store.delete(f"{job.run.folder}/{file}")
    watch.study.put()
    return trials


class Watch:
    """Looks on from the driver: tells people how far the search is, and writes what has ended into the study.

    Attributes:
        tried: the trials that have ended, by their parameters, in that order.
    """

    def __init__(self, job: Job, space: Distributions, bounds: Limits) -> None:
        self._job, self._trials = job, Follower(job.run, TRIALS, Trial)
        self.study = StudyFile(job.run, space, bounds)
        self.tried: dict[str, Trial] = {}

    def look(self) -> None:
        new = {t.params: t for t in self._trials.news() if t.params not in self.tried}
        self.tried |= new
        self.study.add(list(new.values()))
        best = min((t.loss for t in pareto_front(list(self.tried.values()))), default=None)
        found = "" if best is None else f", best loss {best:.3f}"
        job = self._job
        job.progress.update(job.run.job, len(self.tried), job.config.compression.trials, f"trials{found}")


def lay_groundwork(job: Job, adapter: AdapterWeights, examples: list[Example], style: PromptStyle) -> Groundwork:
    """Calibrate the adapter and measure what it gained, in a Ray task."""
    conversations = tuple((e.task_id, tuple(e.messages)) for e in examples)
    execution = job.config.execution
    task = ray.remote(_groundwork).options(num_cpus=execution.cpus_alone, num_gpus=execution.gpus)
    found: Groundwork = ray.get(task.remote(job.config, style, adapter, conversations, held_out_answers(job)))
    return found


def _groundwork(*given: Any) -> Groundwork:
    """`groundwork`, whose module, with torch and all, is imported where it works."""
    from ray_jobs._bench import groundwork

    return groundwork(*given)


def _tuner(job: Job, setting: Setting) -> tune.Tuner:
    resources = {"cpu": job.config.execution.cpus_per_actor, "gpu": job.config.execution.gpus}
    trainable = tune.with_resources(tune.with_parameters(TrialRunner, setting=setting), resources)
    storage = job.ray_storage()
    path, filesystem = f"{storage['storage_path']}/search", storage["storage_filesystem"]
    if tune.Tuner.can_restore(path, filesystem):
        return tune.Tuner.restore(path, trainable, resume_errored=True, storage_filesystem=filesystem)
    compression = job.config.compression
    space = distributions(search_space(compression))
    seeds = seed_points(compression)[: compression.trials]
    near_from = len(seeds) + compression.trials // 3
    sampler = FrontSampler(space, matters, seed=job.config.seed, near_from=near_from)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=TrialSearch(space, seeds, sampler, job.run, setting.limits),
            num_samples=compression.trials,
            max_concurrent_trials=job.config.execution.tune_concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="search",
            **storage,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
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


def held_out_answers(job: Job) -> tuple[Conversation, ...]:
    """What the search's loss is measured on: validation tasks with their reference answers.

    Where none has one (LiveCodeBench, code tasks without solutions), some of the examples that were trained on: less
    telling of the adapter, but what compression changes shows there too.
    """
    found = held_out(job.runs.validation_tasks)
    if not found:
        examples = job.runs.train_modifier.read("examples", Example)
        found = [(e.task_id, tuple(e.messages)) for e in examples[:: max(1, len(examples) // IN_PLACE)][:IN_PLACE]]
        logging.getLogger(__name__).warning(
            "no validation task has a reference answer: the search measures on %d training examples", len(found)
        )
    return tuple(found)
