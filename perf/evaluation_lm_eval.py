"""The other side of `evaluation.py`, in lm-evaluation-harness's own environment: the same tasks by its own templates.

Reads the path of a JSON file {model, dtype, device, batch, threads, include, tasks, out}; times what happens inside
the model's `loglikelihood` and `generate_until` alone, so that neither imports nor the loading of data count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

SCORES = ("exact_match", "acc", "acc_norm", "pass_at_1")


class Timed(HFLM):
    """lm-eval's `hf` backend with a clock."""

    wall = cpu = 0.0

    def _timed(self, call: Any, *arguments: Any, **more: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return call(*arguments, **more)
        finally:
            self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu

    def loglikelihood(self, *arguments: Any, **more: Any) -> Any:
        return self._timed(super().loglikelihood, *arguments, **more)

    def generate_until(self, *arguments: Any, **more: Any) -> Any:
        return self._timed(super().generate_until, *arguments, **more)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    model = Timed(
        pretrained=settings["model"],
        dtype=settings["dtype"],
        softmax_dtype="float32",
        device=settings["device"],
        batch_size=settings["batch"],
    )
    manager = TaskManager(include_path=settings["include"], include_defaults=False)
    tasks = settings["tasks"]
    done = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)
    samples = [_plain(sample) for task in tasks for sample in done["samples"][task]]
    Path(settings["out"]).write_text(json.dumps({"wall": model.wall, "cpu": model.cpu, "samples": samples}))


def _plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Id, prompt, what the model said (a text, or the log-likelihood of every choice), and the harness's own scores."""
    first = sample["arguments"][0]
    prompt = first[0] if isinstance(first, (list, tuple)) else first
    answers = [r[0] for r in sample["resps"]]
    said = answers[0] if isinstance(answers[0], str) else [float(a[0]) for a in answers]
    scores = {name: float(sample[name]) for name in SCORES if name in sample}
    return {"id": sample["doc"]["cascade_id"], "prompt": prompt, "said": said, "scores": scores}


if __name__ == "__main__":
    main()
