"""compress_modifier: search for the smallest file that keeps what the modifier learned.

`python -m ray_jobs.compress_modifier --config configs/quickstart.yaml`
"""

from __future__ import annotations

from cascade.compression.adapter import AdapterWeights, fp16_bytes
from cascade.compression.format import encode_modifier
from cascade.compression.methods import Recipe
from cascade.compression.recipe import byte_limit, compress
from cascade.errors import CascadeError
from cascade.scoring.statistics import Score
from cascade.tasks import Verdict
from ray_jobs._context import Job, Metrics, main
from ray_jobs._evaluate import Assignment, evaluate, read_adapter
from ray_jobs._search import Trial, search
from ray_jobs._test import training_style
from ray_jobs._train import ADAPTER

FILE = "modifier.safetensors"


def work(job: Job) -> Metrics:
    trained = job.runs.train_modifier.require()
    path = f"{trained.folder}/{ADAPTER}"
    adapter = read_adapter(job.run.store, path)
    assert isinstance(adapter, AdapterWeights)
    trials = search(job, adapter, training_style(job.runs))
    finalists = _finalists(job, trials, adapter)
    verdicts = _compare(job, finalists, adapter, path)
    chosen, reason = _choose(job, finalists, verdicts)
    data = job.run.store.read_bytes(_candidate(job, chosen))
    job.run.store.write_bytes(f"{job.run.folder}/{FILE}", data)
    scores = {name: Score.of(v) for name, v in verdicts.items()}
    return {
        "disk_bytes": len(data),
        "fp16_bytes": fp16_bytes(adapter),
        "ratio": len(data) / fp16_bytes(adapter),
        "trials": len(trials),
        "reason": reason,
        "recipe": finalists[chosen].recipe,
        "validation": {name: {"passed": s.passed, "n": s.n, "accuracy": s.accuracy} for name, s in scores.items()},
        "chosen": f"candidate{chosen}",
    }


def _finalists(job: Job, trials: list[Trial], adapter: AdapterWeights) -> list[Trial]:
    """The trials of least held-out loss within the size limit."""
    fitting = [t for t in trials if t.fits]
    if not fitting:
        limit, smallest = byte_limit(adapter, job.config.compression), min(t.disk_bytes for t in trials)
        raise CascadeError(
            f"no trial stayed within {limit} bytes (the smallest had {smallest}): "
            "raise compression.max_ratio or compression.target_bytes, or compression.trials"
        )
    return fitting[: job.config.compression.finalists]


def _candidate(job: Job, number: int) -> str:
    return f"{job.run.folder}/candidates/{number}.safetensors"


def _compare(job: Job, finalists: list[Trial], adapter: AdapterWeights, trained: str) -> dict[str, list[Verdict]]:
    """Verdicts on the validation tasks, of the modifier as trained and of every finalist."""
    style, tasks = training_style(job.runs), job.runs.validation_tasks
    assignments = [Assignment("trained", tasks, style, trained, "trained")]
    for number, trial in enumerate(finalists):
        data = encode_modifier(compress(adapter, Recipe.model_validate_json(trial.recipe)))
        job.run.store.write_bytes(_candidate(job, number), data)
        name = f"candidate{number}"
        assignments.append(Assignment(name, tasks, style, _candidate(job, number), name))
    return evaluate(job, assignments)


def _choose(job: Job, finalists: list[Trial], verdicts: dict[str, list[Verdict]]) -> tuple[int, str]:
    """The smallest finalist within the tolerated loss of accuracy; if there is none, the most accurate."""
    accuracy = {name: Score.of(v).accuracy for name, v in verdicts.items()}
    needed = accuracy["trained"] - job.config.compression.tolerance
    numbers = range(len(finalists))
    good = [n for n in numbers if accuracy[f"candidate{n}"] >= needed]
    if good:
        return min(good, key=lambda n: finalists[n].disk_bytes), "smallest within the tolerance on validation tasks"
    best = max(numbers, key=lambda n: (accuracy[f"candidate{n}"], -finalists[n].disk_bytes))
    return best, "most accurate on validation tasks; none was within the tolerance"


if __name__ == "__main__":
    main("compress_modifier", work)
