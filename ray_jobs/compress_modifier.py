"""compress_modifier: search for the smallest file that keeps what the modifier learned.

`python -m ray_jobs.compress_modifier --config configs/quickstart.yaml`
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import PurePosixPath

from cascade.compression.adapter import AdapterWeights, fp16_bytes
from cascade.compression.pareto import best_of
from cascade.compression.recipe import limits
from cascade.errors import CascadeError
from cascade.scoring.statistics import Score, paired_loss
from cascade.tasks import Example, Verdict
from ray_jobs._context import Job, Metrics, main
from ray_jobs._evaluate import Assignment, evaluate
from ray_jobs._results import ADAPTER, read_adapter, training_style
from ray_jobs._search import lay_groundwork, search
from ray_jobs._trial import Groundwork, Trial, nearest_front, pareto_front
from ray_jobs._winner import finish, in_words

FILE = "modifier.safetensors"


def work(job: Job) -> Metrics:
    trained = job.runs.train_modifier.require()
    path = f"{trained.folder}/{ADAPTER}"
    adapter = read_adapter(job.run.store, path)
    assert isinstance(adapter, AdapterWeights)
    style = training_style(job.runs)
    examples = trained.read("examples", Example)
    ground = lay_groundwork(job, adapter, examples, style)
    trials = search(job, adapter, style, ground)
    finalists = _finalists(job, trials, ground, adapter)
    verdicts = _compare(job, finalists, path)
    chosen, reason = _choose(job, finalists, verdicts)
    winner = finalists[chosen]
    finished = finish(job, adapter, examples, style, ground, winner)
    job.run.store.write_bytes(f"{job.run.folder}/{FILE}", finished.data)
    last, recovery = finished.stages[-1], finished.recovery
    scores = {name: Score.of(v) for name, v in verdicts.items()}
    full = fp16_bytes(adapter)
    return {
        "disk_bytes": last.disk_bytes,
        "resident_bytes": last.resident_bytes,
        "fp16_bytes": full,
        "ratio": last.disk_bytes / full,
        "resident_ratio": last.resident_bytes / full,
        "trials": len(trials),
        "ended_early": sum(t.share < 1 for t in trials),
        "front": len(pareto_front(trials)),
        "base_loss": ground.base_loss,
        "trained_loss": ground.trained_loss,
        "loss": last.loss,
        "gain_kept": ground.gain(last.loss),
        "reason": f"{reason}; {in_words(recovery, winner)}" if recovery else reason,
        "recovery": asdict(recovery) if recovery else None,
        "recipe": winner.recipe,
        "validation": {name: {"passed": s.passed, "n": s.n, "accuracy": s.accuracy} for name, s in scores.items()},
        "finalists": {_name(trial): trial.recipe for trial in finalists},
        "chosen": _name(winner),
    }


def _finalists(job: Job, trials: list[Trial], ground: Groundwork, adapter: AdapterWeights) -> list[Trial]:
    """Whose verdicts are compared, smallest first.

    Where the best is wanted, those that are nearest to the adapter as trained. Otherwise, of the Pareto front, the one
    of least loss and, of those that keep the wanted share of the gain, the smallest and some between, evenly: where few
    tasks decide, the smallest may fail by chance.
    """
    wanted = job.config.compression
    candidates = pareto_front(trials)
    if not candidates and any(t.fits for t in trials):
        raise CascadeError("the held-out loss of no trial is a number: set base.dtype to float32")
    if not candidates:
        bounds, disk = limits(adapter, wanted), min(t.disk_bytes for t in trials)
        resident = min(t.resident_bytes for t in trials)
        raise CascadeError(
            f"no trial stayed within {bounds.disk} bytes on disk and {bounds.resident} in memory (the smallest had "
            f"{disk} and {resident}): raise compression.max_ratio, target_bytes or max_resident_ratio, or trials"
        )
    if wanted.choose == "best":
        return (nearest_front(trials) or candidates)[-wanted.finalists :]
    *smaller, best = candidates
    enough = [t for t in smaller if ground.gain(t.loss) >= wanted.keep_gain]
    count = min(len(enough), wanted.finalists - 1)
    return [*(enough[i * len(enough) // count] for i in range(count)), best]


def _compare(job: Job, finalists: list[Trial], trained: str) -> dict[str, list[Verdict]]:
    """Verdicts on the validation tasks, of the modifier as trained and of every finalist."""
    style, tasks = training_style(job.runs), job.runs.validation_tasks
    adapters = {"trained": trained} | {_name(trial): f"{job.run.folder}/{trial.file}" for trial in finalists}
    return evaluate(job, [Assignment(name, tasks, style, adapter, name) for name, adapter in adapters.items()])


def _name(finalist: Trial) -> str:
    """After its file, not its place: verdicts of a search that was interrupted may be of other finalists."""
    return f"candidate-{PurePosixPath(finalist.file).stem}"


def _choose(job: Job, finalists: list[Trial], verdicts: dict[str, list[Verdict]]) -> tuple[int, str]:
    """By the config's rule: the smallest within the tolerated loss of accuracy, or the best; and why.

    A loss counts with one standard error on top (Breiman's rule): few tasks tolerate less than many, and a candidate
    that was lucky on them is not taken for it. Nor does luck make the best (`best_of`).

    Args:
        verdicts: of the modifier as trained and of every finalist, all in one order of tasks.
    """
    wanted = job.config.compression
    trained = [v.passed for v in verdicts["trained"]]
    found = [[v.passed for v in verdicts[_name(trial)]] for trial in finalists]
    good = [n for n, passed in enumerate(found) if sum(paired_loss(trained, passed)) <= wanted.tolerance]
    if good and wanted.choose == "smallest":
        chosen = min(good, key=lambda n: finalists[n].disk_bytes)
        why = f"the smallest that lost, by one standard error at most, {wanted.tolerance:.1%} of validation tasks"
    else:
        chosen = best_of([t.drift for t in finalists], found)
        why = "the nearest to the uncompressed within the size limits, and none is surely more accurate"
        why += "" if good else f"; none lost surely at most {wanted.tolerance:.1%}"
    outcome = f"{sum(found[chosen])} of {len(trained)} passed, uncompressed {sum(trained)}"
    return chosen, f"{why} ({outcome}; finalists: {len(finalists)})"


if __name__ == "__main__":
    main("compress_modifier", work)
