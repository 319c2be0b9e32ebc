"""train_modifier: train the domain's LoRA modifier on every verified example.

`python -m ray_jobs.train_modifier --config configs/quickstart.yaml`
"""

from __future__ import annotations

from ray_jobs._context import Job, Metrics, main
from ray_jobs._dataset import training_examples
from ray_jobs._results import training_style
from ray_jobs._train import train_modifier


def work(job: Job) -> Metrics:
    examples, about = training_examples(job)
    return train_modifier(job, examples, training_style(job.runs)) | about


if __name__ == "__main__":
    main("train_modifier", work)
