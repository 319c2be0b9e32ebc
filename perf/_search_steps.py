"""Steps of compression_search.py, each a process of its own, so that its time is its own and it can be killed."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import torch
from _adapters import encoded, trained_adapter
from own_ray import local_ray

from cascade.artifacts import Run
from cascade.compression.adapter import AdapterWeights, load_peft_folder
from cascade.compression.format import encode_modifier
from cascade.compression.recipe import Room, compress, limits, recipe_from
from cascade.config import Config, PromptStyle, load_config
from cascade.models.base import load_base
from ray_jobs._bench import groundwork, load_bench
from ray_jobs._context import Job
from ray_jobs._held_out import held_out
from ray_jobs._runs import Runs
from ray_jobs._search import search
from ray_jobs._trial import Groundwork

CONFIG, ADAPTER, GROUND, SECONDS = "config.json", "adapter", "ground.pickle", "seconds"
STYLE = PromptStyle(name="direct", system="Give only the final answer.")
"""The quickstart's first; what `_adapters.encoded` trains with."""


@dataclass(frozen=True)
class Measured:
    """One point of the search space, evaluated on all held-out rows."""

    disk_bytes: int
    resident_bytes: int
    loss: float
    fits: bool
    seconds: float


@dataclass(frozen=True)
class Lab:
    """What all steps share: the config, the adapter, and what was measured of it once."""

    folder: Path
    config: Config
    adapter: AdapterWeights
    ground: Groundwork

    @classmethod
    def open(cls, folder: Path) -> Lab:
        config = Config.model_validate_json((folder / CONFIG).read_text())
        ground = pickle.loads((folder / GROUND).read_bytes())  # our own: `prepare` wrote it
        return cls(folder, config, load_peft_folder(folder / ADAPTER), ground)

    def run(self, name: str) -> Run:
        """Where a search of that name keeps what it finds."""
        return Run(Runs(self.config).store, self.config.domain, "search", name)


def config_for(folder: Path, options: argparse.Namespace) -> Config:
    """The quickstart's, with the held-out tasks and threads that were asked for."""
    config = load_config("configs/quickstart.yaml").model_dump(mode="json")
    config["storage"] = str(folder / "out")
    config["base"]["model"] = options.base
    config["tasks"]["validation"]["count"] = options.validation
    config["compression"]["calibration_rows"] = 4
    config["execution"]["cpus_per_actor"] = options.threads
    return Config.model_validate(config)


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Train the adapter unless one is given, calibrate it, and measure base and adapter."""
    config = config_for(folder, options)
    torch.set_num_threads(options.threads)
    source = options.adapter
    if source is None:
        loaded = load_base(config.base)
        source = trained_adapter(config, loaded, encoded(config, loaded), options.cache)
    (folder / ADAPTER).symlink_to(source.resolve())
    runs, adapter = Runs(config), load_peft_folder(source)
    examples, measured_on = (tuple(held_out(t)) for t in (runs.train_tasks, runs.validation_tasks))
    ground = groundwork(config, STYLE, adapter, examples, measured_on)
    (folder / GROUND).write_bytes(pickle.dumps(ground))
    (folder / CONFIG).write_text(config.model_dump_json())


def search_it(folder: Path, name: str, seed: int, trials: int, *, halving: bool) -> None:
    """One whole search, or the rest of one that was killed; its wall time without starting Ray goes beside it."""
    lab = Lab.open(folder)
    compression = lab.config.compression.model_copy(update={"trials": trials, "halving": halving})
    config = lab.config.model_copy(update={"seed": seed, "compression": compression})
    with local_ray():
        began = time.perf_counter()
        search(Job(config, Runs(lab.config), lab.run(name)), lab.adapter, STYLE, lab.ground)
        (folder / f"{name}.{SECONDS}").write_text(str(time.perf_counter() - began))


def alone(folder: Path, points: Path, results: Path) -> None:
    """Evaluate points in turn, as a trial does, with nothing around it; the results are a list of `Measured`."""
    lab = Lab.open(folder)
    bench = load_bench(
        lab.config.model_dump_json(),
        STYLE,
        tuple(held_out(Runs(lab.config).validation_tasks)),
        lab.config.execution.cpus_per_actor,
    )
    bounds = limits(lab.adapter, lab.config.compression)
    room = Room.of(lab.adapter, bounds, bench.loaded.model.dtype.itemsize)
    found = []
    for point in json.loads(points.read_text()):
        began = time.perf_counter()
        compressed = compress(lab.adapter, recipe_from(point, room), lab.ground.calibration)
        disk, resident = len(encode_modifier(compressed)), bench.slot.bytes_for(compressed)
        fits = disk <= bounds.disk and resident <= bounds.resident
        loss = bench.loss(compressed)
        found.append(asdict(Measured(disk, resident, loss, fits, time.perf_counter() - began)))
    results.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    made = steps.add_parser("prepare")
    made.add_argument("folder", type=Path)
    for name, kind, default in (("base", str, ""), ("validation", int, 0), ("threads", int, 1)):
        made.add_argument(f"--{name}", type=kind, default=default)
    made.add_argument("--adapter", type=Path)
    made.add_argument("--cache", type=Path)
    searched = steps.add_parser("search")
    searched.add_argument("folder", type=Path)
    searched.add_argument("name")
    searched.add_argument("seed", type=int)
    searched.add_argument("trials", type=int)
    searched.add_argument("--whole", action="store_true", help="every trial to its end")
    tried = steps.add_parser("alone")
    tried.add_argument("folder", type=Path)
    tried.add_argument("points", type=Path)
    tried.add_argument("results", type=Path)
    options: Any = parser.parse_args()
    if options.step == "prepare":
        prepare(options.folder, options)
    elif options.step == "search":
        search_it(options.folder, options.name, options.seed, options.trials, halving=not options.whole)
    else:
        alone(options.folder, options.points, options.results)


if __name__ == "__main__":
    main()
