"""The live view of a pipeline as a page beside its runs: `<storage>/<domain>/progress.html`.

Written every few seconds through the store, so on an object store as well; a page that cannot be written stops nobody.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cascade.reports.progress import Pipeline, State, Step, Tier, render_progress
from ray_jobs import JOBS
from ray_jobs._json_lines import JsonLines
from ray_jobs._meter import TierState
from ray_jobs._progress import Progress, Several, Tracked, headline, polling
from ray_jobs._runs import Runs

PAGE = "progress.html"
_EVERY_S, _EVERY_REMOTE_S = 2.0, 10.0


@contextmanager
def showing(runs: Runs, title: str, jobs: tuple[str, ...], before: tuple[str, ...] = ()) -> Iterator[Progress]:
    """A display on the terminal (or JSON lines) and a page in the store, for the time of the block.

    Args:
        jobs: those that are to be run, in their order.
        before: earlier ones, which the page shows as well.
    """
    page = LivePage(runs, (*before, *jobs))
    for job in before:
        if runs.run(job).done:
            page.reused(job)
    as_json = runs.config.execution.logs == "json"
    display = JsonLines(runs).told() if as_json else Progress.live(title, jobs)
    with display as shown, page.kept():
        yield Several(shown, page)


class LivePage(Tracked):
    """What is known of a pipeline, as a page."""

    def __init__(self, runs: Runs, jobs: tuple[str, ...]) -> None:
        super().__init__(jobs)
        self.runs, self.began = runs, time.perf_counter()
        self.state: State = "running"
        self.message = self.dashboard = ""
        self.past: dict[int, Tier] = {}
        self.every_s = _EVERY_S if runs.store.is_local else _EVERY_REMOTE_S

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write the page again and again while the block runs, and once more when it has ended, however it did."""
        self.write()
        try:
            with polling(self.write, self.every_s):
                yield
            self.state = "done"
        except BaseException as error:
            self.state = "failed"
            self.message = str(error) or type(error).__name__
            raise
        finally:
            self.write()

    def write(self) -> None:
        """Write the page as things are now."""
        with suppress(OSError):
            text = render_progress(self.pipeline())
            self.runs.store.write_bytes(f"{self.runs.config.domain}/{PAGE}", text.encode())

    def connected(self, dashboard: str) -> None:
        self.dashboard = dashboard

    def reused(self, job: str) -> None:
        super().reused(job)
        manifest, row = self.runs.run(job).manifest, self.rows[job]
        row.note = headline(manifest["metrics"])
        row.began, row.ended = 0.0, manifest.get("seconds", 0.0)
        self._note_tier(manifest["metrics"])

    def finished(self, job: str, metrics: dict[str, Any]) -> None:
        super().finished(job, metrics)
        self._note_tier(metrics)

    def _note_tier(self, metrics: dict[str, Any]) -> None:
        """A tier that has ended tells its figures in its job's metrics."""
        if "tier" in metrics and "cost_usd" in metrics:
            number, asked = int(metrics["tier"]), int(metrics["asked"])
            budget = self.runs.config.tier(number).budget_usd
            self.past[number] = Tier(
                number, metrics["teacher"], asked, asked, metrics["verified"], metrics["cost_usd"], budget
            )
            self.tiers.pop(number, None)

    def pipeline(self) -> Pipeline:
        """What the page shows."""
        config = self.runs.config
        tiers = self.past | {n: self._tier(state) for n, state in self.tiers.items()}
        return Pipeline(
            domain=config.domain,
            state=self.state,
            message=self.message,
            steps=[self._step(job) for job in self.rows],
            tiers=[tiers[n] for n in sorted(tiers)],
            budget_usd=config.budget_usd,
            seconds=time.perf_counter() - self.began,
            refresh_s=self.every_s,
            links=self._links(),
            commands=self._commands(),
        )

    def _step(self, job: str) -> Step:
        row = self.rows[job]
        ended = row.state in ("done", "reused")
        state: State = "failed" if self.state == "failed" and row.state == "running" else row.state
        link = f"{self.runs.run(job).name}/manifest.json" if ended else ""
        return Step(job, state, row.done, row.total, row.note, row.seconds, row.seconds_left, link)

    def _tier(self, state: TierState) -> Tier:
        return Tier(
            state.tier,
            state.teacher,
            state.done,
            state.total,
            state.verified,
            state.spent_usd,
            self.runs.config.tier(state.tier).budget_usd,
            state.requests_per_minute,
            state.seconds_left,
        )

    def _links(self) -> list[tuple[str, str]]:
        links = [("report", "report.html")] if self.state == "done" and self._is_whole else []
        if self.dashboard and self.state == "running":
            links += [("Ray's dashboard", self.dashboard), ("its metrics", f"{self.dashboard}/#/metrics")]
        return links

    @property
    def _is_whole(self) -> bool:
        return all(row.state in ("done", "reused") for row in self.rows.values()) and set(JOBS) == set(self.rows)

    def _commands(self) -> list[tuple[str, str]]:
        """How to look at training and search, as soon as there is something to see."""
        commands = []
        for job, folder, what in (
            ("train_modifier", "tensorboard", "The training's loss"),
            ("compress_modifier", "search", "The search, trial by trial"),
        ):
            if self.rows.get(job) and self.rows[job].state:
                where = self.runs.store.uri_of(f"{self.runs.run(job).folder}/{folder}")
                commands.append((what, f"tensorboard --logdir '{where}'"))
        row = self.rows.get("compress_modifier")
        if row and row.state and self.runs.store.is_local:
            study = self.runs.store.path(f"{self.runs.compress_modifier.folder}/study.journal")
            commands.append(("The search as an Optuna study", f"optuna-dashboard '{study}'"))
        return commands
