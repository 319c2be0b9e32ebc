"""Cascade's loop on DeepSpeed inside a Ray Train worker, as a contender of perf/training.py."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def worker(settings: dict[str, Any]) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    sys.argv = ["training_ours.py", settings["job"]]
    from training_ours import run
    from training_plain import read_job

    job, train, validation = read_job()
    with open(settings["out"], "w") as out:
        sys.stdout = out  # the report's last line
        run(job, train, validation).report()
        sys.stdout = sys.__stdout__


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    gpu = job["device"] == "cuda"
    variables = {"DS_ACCELERATOR": job["device"], "TOKENIZERS_PARALLELISM": "false"}
    ray.init(address="local", num_cpus=max(2, job["threads"]), log_to_driver=False, runtime_env={"env_vars": variables})
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "report")
        TorchTrainer(
            worker,
            train_loop_config={"job": sys.argv[1], "out": out},
            scaling_config=ScalingConfig(num_workers=1, use_gpu=gpu, resources_per_worker={"CPU": 1, "GPU": int(gpu)}),
            run_config=RunConfig(name="perf", storage_path=folder),
        ).fit()
        print(Path(out).read_text().strip().splitlines()[-1])
    ray.shutdown()


if __name__ == "__main__":
    main()
