"""Training cannot be lost: workers and the driver are killed, workers go and come, the result is the unbroken one."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml
from clusters import WITHOUT_DASHBOARD, add_worker
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from stand_in import save_tiny_base
from sums import own_sums
from train_alone import examples_of, train

from cascade.config import load_config
from cascade.errors import DataError
from cascade.models.base import end_token_ids, load_base
from cascade.training.examples import encode_examples
from cascade.training.looks import Look
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora
from cascade.training.measures import StepReport
from cascade.training.packing import plan_steps
from ray_jobs._results import ADAPTER, training_style
from ray_jobs._runs import Runs
from ray_jobs._train_controller import RAY_FOLDER
from ray_jobs._train_ledger import PROGRESS, Attempt

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
LONG = {"epochs": 150, "checkpoint_steps": 50}
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "helpers" / "train_alone.py"


def write_config(
    folder: Path, *, epochs: int, checkpoint_steps: int, execution: dict[str, object], stage: int = 0
) -> Path:
    """Sums for a tiny base, in float32 on the CPU."""
    base = folder / "base"
    if not base.exists():
        save_tiny_base(base)
    tier = {"endpoints": [{"base_url": "answer-key"}], "answer_key": {"max_difficulty": 1}}
    prices = {"input_usd_per_million": 1.0, "output_usd_per_million": 1.0}
    config = {
        "domain": "sums",
        "storage": str(folder / "out"),
        "base": {"model": str(base), "dtype": "float32"},
        "tasks": own_sums(folder, train=24, validation=8, test=8),
        "student": {"max_tokens": 8},
        "tiers": [{"name": f"answer-key-{n}", **tier, **prices} for n in (1, 2, 3)],
        "budget_usd": 1.0,
        "training": {
            "lora": {"rank": 4, "epochs": epochs, "tokens_per_step": 400, "max_length": 256, "learning_rate": 3e-4},
            "checkpoint_steps": checkpoint_steps,
            "zero_stage": stage,
            "validation": {"tasks": 8, "every_epochs": epochs / 4},
        },
        "execution": execution,
    }
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(config: Path, *more: str, **variables: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{SCRIPT.parent}", "CUDA_VISIBLE_DEVICES": ""} | variables
    log = open(config.with_suffix(".log"), "ab")  # noqa: SIM115 (the process's own)
    return subprocess.Popen([sys.executable, str(SCRIPT), str(config), *more], cwd=ROOT, env=environment, stderr=log)


def wait_until(
    reached: Callable[[], bool], driver: subprocess.Popen[bytes], config: Path, seconds: float = 300
) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert driver.poll() is None, config.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, "training did not get that far"
        time.sleep(0.05)


def steps_done(runs: Runs) -> int:
    """As the workers note it, once a second."""
    path = f"{runs.train_modifier.folder}/{PROGRESS}"
    return int(runs.store.read_json(path)["step"]) if runs.store.exists(path) else 0


def workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def unbroken(runs: Runs) -> tuple[list[StepReport], dict[str, torch.Tensor]]:
    """The same training in this process, without Ray and DeepSpeed: its curve and its weights."""
    torch.set_num_threads(1)  # others that compute beside it would slow down more threads tenfold
    config = runs.config
    loaded = load_base(config.base, torch.device("cpu"))
    lora = config.training.lora
    system = training_style(runs).system
    encoded = encode_examples(
        examples_of(runs), loaded.tokenizer, max_length=lora.max_length, system=system, end_ids=end_token_ids(loaded)
    )
    model = add_lora(loaded, lora, config.seed)
    plan = plan_steps(encoded.examples, lora, config.seed, row_tokens=1024)
    curve = list(run_steps(TorchEngine(TargetLoss(model), lora), plan, lora))
    return curve, {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


def check_is_the_unbroken(runs: Runs, starts: int) -> list[StepReport]:
    """Same losses, same examples in each step, one adapter with the same weights, and a ledger that knows of it all."""
    expected, weights = unbroken(runs)
    run = runs.train_modifier
    assert run.done
    curve = run.read("curve", StepReport)
    assert [p.step for p in curve] == [p.step for p in expected]
    assert [p.sample_ids for p in curve] == [p.sample_ids for p in expected]
    assert max(abs(a.loss - b.loss) for a, b in zip(curve, expected, strict=True)) < 1e-4
    adapter = load_file(Path(runs.store.path(f"{run.folder}/{ADAPTER}")) / "adapter_model.safetensors")
    assert adapter.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(adapter[name].float(), weight.detach(), atol=1e-3, rtol=1e-2)
    folders = list(Path(runs.store.path(run.folder)).rglob("adapter_model.safetensors"))
    assert len(folders) == 1
    looks = run.read("looks", Look)
    assert [look.step for look in looks] == [round(len(curve) * k / 4) for k in (1, 2, 3, 4)]
    assert runs.store.list(f"{run.folder}/tensorboard")
    assert not {RAY_FOLDER, PROGRESS} & set(runs.store.list(run.folder))
    seen = run.metrics["seen_least"], run.metrics["seen_most"]
    assert seen == (runs.config.training.lora.epochs,) * 2
    attempts = run.read("attempts", Attempt)
    assert len(attempts) == run.metrics["attempts"] >= starts
    assert run.metrics["steps_again"] == sum(a.again for a in attempts) > 0
    return curve


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training whose worker was killed three times, and then its driver; for tests to copy."""
    folder = tmp_path_factory.mktemp("broken")
    config = write_config(folder, execution={"train_workers": 1}, **LONG)
    runs = Runs(load_config(config))
    checkpoints = Path(runs.store.path(runs.train_modifier.folder)) / RAY_FOLDER
    saved = lambda: len(list(checkpoints.rglob("checkpoint*/position.json"))) > 0  # noqa: E731
    driver = start(config)
    points = (lambda: steps_done(runs) >= 1, saved, lambda: steps_done(runs) > 200)
    for reached in points:  # before any checkpoint, behind the first, and well on the way
        wait_until(reached, driver, config)
        (worker,) = workers_of(driver)
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda gone=worker.pid: [w.pid for w in workers_of(driver)] not in ([], [gone]), driver, config)
    wait_until(lambda: steps_done(runs) > 300, driver, config)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # Ray's processes notice that their driver is gone
    assert not runs.train_modifier.done
    return folder


def test_three_killed_workers_and_a_killed_driver_change_nothing(tmp_path: Path, broken: Path) -> None:
    folder = shutil.copytree(broken, tmp_path / "copy")
    # How it is computed may change meanwhile.
    config = write_config(folder, execution={"train_workers": 2}, stage=2, **LONG)
    assert start(config).wait(300) == 0, config.with_suffix(".log").read_text()[-3000:]
    curve = check_is_the_unbroken(Runs(load_config(config)), starts=5)
    assert {point.workers for point in curve} == {1, 2}


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray for what trains in this process."""
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}.items():
        monkeypatch.setenv(name, value)
    variables = {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", **WITHOUT_DASHBOARD}
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


def test_what_cannot_be_gone_on_from_says_how_to_begin_again(tmp_path: Path, broken: Path, local_ray: None) -> None:
    folder = shutil.copytree(broken, tmp_path / "copy")
    runs = Runs(load_config(write_config(folder, execution={"train_workers": 1}, **LONG)))
    begun = Path(runs.store.path(runs.train_modifier.folder)) / RAY_FOLDER
    states = list(begun.rglob("state.safetensors"))
    assert states
    for file in states:
        file.unlink()
    for said in ("training cannot go on from its checkpoint", "what an earlier start of the training left cannot be"):
        with pytest.raises(DataError, match=f"^{said}") as refused:
            train(runs)
        assert f"remove {begun} and run again" in str(refused.value)
        for checkpoint in begun.glob("checkpoint_*/"):  # Ray's own note of them stays
            if checkpoint.is_dir():
                shutil.rmtree(checkpoint)
    shutil.rmtree(begun)
    train(runs)
    assert runs.train_modifier.done


def test_a_worker_that_goes_and_one_that_comes_change_nothing(tmp_path: Path, cluster: Cluster) -> None:
    """Elastic: two workers, then the one whose node is left, then two again; with what ZeRO 2 spreads over them."""
    elastic = {"train_workers": 2, "train_workers_min": 1}
    config = write_config(tmp_path, epochs=300, checkpoint_steps=25, execution=elastic, stage=2)
    runs = Runs(load_config(config))
    add_worker(cluster, num_cpus=1)
    taken = add_worker(cluster, num_cpus=1)
    driver = start(config, "2", RAY_ADDRESS=cluster.address)
    wait_until(lambda: steps_done(runs) > 100, driver, config)
    cluster.remove_node(taken, allow_graceful=False)
    before = steps_done(runs)
    wait_until(lambda: steps_done(runs) > before + 100, driver, config)
    add_worker(cluster, num_cpus=1)
    assert driver.wait(400) == 0, config.with_suffix(".log").read_text()[-3000:]
    workers = [step.workers for step in check_is_the_unbroken(runs, starts=3)]
    assert [count for count, _ in itertools.groupby(workers)] == [2, 1, 2]
