"""What each training worker runs: DeepSpeed steps, looks at held-out tasks, checkpoints that lose nothing.

A checkpoint holds adapter and optimiser whole, the data position with what the looks found, and the best adapter so
far. Whoever continues from it, with however many workers and on whatever ZeRO stage, takes the same steps as if nothing
had happened. It is written and stored while training goes on, and Ray's controller notes it when it next looks, after
two seconds at most; until then it is none. So the next one waits for it: a loss costs two intervals at most, mostly
one.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.torch import get_device

from cascade.errors import DataError
from cascade.models.base import LoadedBase, end_token_ids, load_base, named_when_full
from cascade.models.student import Student
from cascade.tasks import Example, Task
from cascade.training.deepspeed_engine import DeepSpeedEngine
from cascade.training.examples import EncodedSet, encode_conversations, encode_examples
from cascade.training.layout import most_tokens
from cascade.training.looks import Look, best_of, is_better, is_enough, look_steps, needs_loss
from cascade.training.loop import TargetLoss, run_steps, summed_loss
from cascade.training.lora import add_lora, save_adapter
from cascade.training.memory import settle_objects
from cascade.training.packing import Step, pack, plan_steps
from cascade.training.recompute import recompute_activations
from cascade.training.state_file import write_state
from cascade.training.trackers import Trackers
from ray_jobs._results import ADAPTER, LOOKS
from ray_jobs._share import limit_process
from ray_jobs._train_controller import Assigned, begun_in
from ray_jobs._train_ledger import Recorder

BEST = "best"
"""Folder of the best adapter so far, in every checkpoint."""
POSITION = "position.json"
"""How far a checkpoint is, and what the looks found until then."""
PREEMPTION_S = 5.0
"""Seconds between two questions whether a node is about to be taken away: notice may be given half a minute before."""


MORE_MEMORY = "raise execution.gpu_share, lower execution.row_tokens, or set training.gradient_checkpointing"


def train_worker(settings: dict[str, Any]) -> None:
    """Train from the last checkpoint, or the beginning, to the end; every worker runs this."""
    assigned: Assigned = settings["assigned"]
    limit_process(assigned.config.execution, assigned.config.execution.cpus_per_worker)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None and _had_ended(checkpoint):  # only the hand-over to the driver was missing
        with checkpoint.as_directory() as folder:
            metrics = json.loads((Path(folder) / POSITION).read_text())["metrics"]
            first = ray.train.get_context().get_world_rank() == 0
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if first else None)
        return
    with named_when_full("training", MORE_MEMORY), ExitStack() as stack:
        _Session(assigned, checkpoint, stack).train()


def _had_ended(checkpoint: Checkpoint) -> bool:
    with checkpoint.as_directory() as folder:
        return (Path(folder) / ADAPTER).exists()


class _Session:
    """One worker's part of one attempt at the training."""

    def __init__(self, assigned: Assigned, checkpoint: Checkpoint | None, stack: ExitStack) -> None:
        self.assigned, config = assigned, assigned.config
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.first = self.rank == 0
        self.loaded = load_base(config.base, get_device(), bits=config.training.base_bits)
        self.encoded = _encode(assigned, self.loaded)
        self.model = add_lora(self.loaded, config.training.lora, config.seed)
        if config.training.gradient_checkpointing:
            recompute_activations(self.model)
        # ZeRO 3 gathers weights in the hooks of the modules that fused layers go past.
        module = TargetLoss(self.model, fused=config.training.zero_stage < 3)
        if config.execution.compile:
            module.compile_parts()
        self.row_tokens = config.execution.row_tokens or most_tokens(module.inputs)
        lora = config.training.lora
        self.plan = plan_steps(self.encoded.examples, lora, config.seed, row_tokens=self.row_tokens, workers=self.world)
        self.held_out = self._held_out()
        self.engine = DeepSpeedEngine(module, config.training, self.loaded.device, self.loaded.model.dtype)
        self.best = Path(stack.enter_context(tempfile.TemporaryDirectory())) / BEST
        self.looks: list[Look] = []
        self.start = self._restore(checkpoint)
        self.recorder = Recorder(assigned.run, len(self.plan), self.first)
        self.recorder.start(self.start, self.world, self.encoded)
        self.trackers = Trackers.open(config, assigned.run, self.start) if self.first else Trackers([])
        stack.callback(self.trackers.close)
        stack.callback(gc.unfreeze)
        self.asked, self.is_time = time.monotonic(), False
        self.under_way = False

    def train(self) -> None:
        config = self.assigned.config
        steps = run_steps(
            self.engine,
            self.plan,
            config.training.lora,
            start=self.start,
            rank=self.rank,
            world=self.world,
            reduce_sum=self._sum_and_agree,
        )
        due = look_steps(len(self.plan), config.training)
        to_save = at_once = False
        for report in [] if self._has_enough() else steps:
            self.recorder.add(report)
            self.trackers.step(report)
            if report.step == self.start:
                settle_objects()
            done = report.step + 1
            if done in due:
                self._look(done)
            if done == len(self.plan) or self._has_enough():
                break
            at_once = at_once or self._is_preempted()
            to_save = to_save or at_once or done % config.training.checkpoint_steps == 0
            if to_save and not report.skipped:  # the weights may be why it was: what is kept has computed a finite step
                self._checkpoint(done, at_once)
                to_save = at_once = False
        self._finish()

    def _has_enough(self) -> bool:
        return is_enough(self.looks, self.assigned.config.training)

    def _sum_and_agree(self, value: float) -> float:
        """A sum over the workers, and by the way whether the first finds it time to ask for a notice: all must ask."""
        mine = float(self.first and time.monotonic() - self.asked >= PREEMPTION_S)
        total, asking = _sums_over_workers(value, mine)
        self.is_time = asking > 0
        return total

    def _is_preempted(self) -> bool:
        if not self.is_time:
            return False
        self.asked = time.monotonic()
        return ray.train.get_preemption_info() is not None

    def _look(self, done: int) -> None:
        """Measure the held-out tasks; keep the adapter if it is the best so far."""
        loss, count = _sum_over_workers(self._held_out_loss()), sum(step.targets for step in self.held_out)
        answered = self.assigned.answered
        passed = round(_sum_over_workers(self._passed(answered[self.rank :: self.world])))
        look = Look(done, loss / count if count else float("nan"), len(answered), passed)
        best = is_better(look, best_of(self.looks), self.assigned.config.training)
        look = dataclasses.replace(look, best=best)
        self.looks.append(look)
        self.trackers.look(look)
        if look.best and self.assigned.config.training.validation.keep != "last":
            self._save_adapter(self.best)

    def _held_out(self) -> list[Step]:
        """The validation tasks that fit, as steps of one row for each worker."""
        config, given = self.assigned.config, self.assigned.held_out
        longest = config.training.lora.max_length
        encoded = encode_conversations(
            given,
            self.loaded.tokenizer,
            max_length=longest,
            system=self.assigned.style.system,
            end_ids=end_token_ids(self.loaded),
        )
        kept = encoded.examples
        if not kept and needs_loss(config.training):
            raise DataError(
                f"none of {len(given)} validation tasks with a reference answer is at most training.lora.max_length = "
                f"{longest} tokens long, but training.validation.keep or patience goes by the loss on them: raise "
                "max_length, or set keep: last and patience: null"
            )
        rows = pack(kept, max(self.row_tokens or 0, longest), self.world) if kept else []
        return [Step(tuple(rows[i : i + self.world])) for i in range(0, len(rows), self.world)]

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """This worker's part of the summed loss."""
        return sum(summed_loss(self.engine, step, self.rank, self.world) for step in self.held_out)

    @torch.no_grad()
    def _passed(self, tasks: Sequence[Task]) -> int:
        if not tasks:
            return 0
        config = self.assigned.config
        student = Student(
            self.loaded,
            modifier="training",
            tokens=config.execution.student_tokens,
            temperature=config.student.temperature,
            max_tokens=config.student.max_tokens,
            seed=config.seed,
        )
        was_training = self.model.training
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):
            _, verdicts = student.judged(tasks, self.assigned.style)
        self.model.train(was_training)
        return sum(verdict.passed for verdict in verdicts)

    def _save_adapter(self, folder: Path) -> None:
        """Write the adapter as it is now. Every worker calls it, the first writes.

        Raises:
            DataError: it holds what is no number, or none that a file in fp16 can hold.
        """
        weights = self.engine.weights()
        unsound = [name for name, weight in weights.items() if not weight.half().isfinite().all()]
        if unsound:
            raise DataError(
                f"the adapter's weights are not finite ({unsound[0]} and {len(unsound) - 1} more): lower "
                "training.lora.learning_rate or training.lora.alpha"
            )
        if self.first:
            shutil.rmtree(folder, ignore_errors=True)
            save_adapter(self.model, self.loaded, self.assigned.config.seed, folder, weights)

    def _checkpoint(self, done: int, at_once: bool) -> None:
        """Report a checkpoint, which is written and stored while training goes on.

        Args:
            at_once: wait until it is one, for this node is about to be taken away.
        """
        self._wait_for_the_last()
        state, storage = self.engine.state(done), ray.train.get_context().get_storage()
        # Not the session's: an error that ends it must leave whole what is being stored.
        outbox = tempfile.TemporaryDirectory()
        if self.first:
            self._write_position(Path(outbox.name), {})
            if self.best.exists():
                shutil.copytree(self.best, Path(outbox.name) / BEST, copy_function=_link_or_copy)
        looks = list(self.looks)

        def store(checkpoint: Checkpoint, name: str) -> Checkpoint:
            """On the first worker; Ray calls it again where an object store was too busy for it."""
            nonlocal state
            if state is not None:
                write_state(state, outbox.name)
                state = None  # its copies take a GPU's memory
            self._write_down(done, looks)  # first: what is behind a checkpoint is not trained again
            stored: Checkpoint = storage.persist_current_checkpoint(checkpoint, name)
            outbox.cleanup()
            return stored

        ray.train.report(
            {"step": done},
            checkpoint=Checkpoint.from_directory(outbox.name) if self.first else None,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=store,
            delete_local_checkpoint_after_upload=False,  # it is gone by then
        )
        self.under_way = True
        if at_once:
            self._wait_for_the_last()

    def _wait_for_the_last(self) -> None:
        """Wait until Ray's controller has noted the last checkpoint, if there is one under way."""
        if self.under_way:
            ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
        self.under_way = False

    def _finish(self) -> None:
        self._wait_for_the_last()
        with tempfile.TemporaryDirectory() as folder:
            if self.assigned.config.training.validation.keep == "last":
                self._save_adapter(Path(folder) / ADAPTER)
            elif self.first:
                shutil.copytree(self.best, Path(folder) / ADAPTER)
            self._write_down(len(self.plan), self.looks)
            metrics = self._metrics()
            if self.first:
                self._write_position(Path(folder), metrics)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if self.first else None)

    def _write_position(self, folder: Path, metrics: dict[str, Any]) -> None:
        looks = [dataclasses.asdict(look) for look in self.looks]
        (folder / POSITION).write_text(json.dumps({"looks": looks, "metrics": metrics}))

    def _write_down(self, done: int, looks: list[Look]) -> None:
        """Store what the steps until then measured. One thread at a time does: a checkpoint waits for the last."""
        self.recorder.write(done)
        if self.first:
            self.assigned.run.write_table(LOOKS, Look, looks)  # without what an earlier start found further on
            self.trackers.flush()

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """The step to go on with: 0, or where the last checkpoint was taken.

        Raises:
            DataError: the checkpoint cannot be gone on from; says how to begin again.
            OSError: it cannot be read now. Ray tries again, and so can people: nothing is lost yet.
        """
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            try:
                position = json.loads((Path(folder) / POSITION).read_text())
                self.looks = [Look(**look) for look in position["looks"]]
                if self.first and (Path(folder) / BEST).exists():
                    shutil.copytree(Path(folder) / BEST, self.best)
                return self.engine.load(folder)
            except (FileNotFoundError, ValueError, TypeError, DataError) as error:
                raise DataError(
                    f"training cannot go on from its checkpoint ({error}): remove {begun_in(self.assigned.run)} and "
                    "run again, which trains anew on the same examples"
                ) from error

    def _metrics(self) -> dict[str, Any]:
        """What the training was; the same on every worker."""
        steps = self.looks[-1].step if self._has_enough() else len(self.plan)
        best = best_of(self.looks)
        done = self.plan[:steps]
        found: dict[str, Any] = {
            "steps": steps,
            "planned_steps": len(self.plan),
            "examples": len(self.encoded.examples),
            "tokens": sum(s.tokens for s in done),
            "targets": sum(s.targets for s in done),
            "refused_too_long": len(self.encoded.too_long),
            "refused_without_target": len(self.encoded.without_target),
            "refused_by_template": len(self.encoded.by_template),
        }
        if best is not None:
            kept_last = self.assigned.config.training.validation.keep == "last"
            shown = self.looks[-1] if kept_last else best
            found |= {"kept_step": shown.step}
            found |= {"validation_loss": shown.loss} if self.held_out else {}
            found |= {"validation_passed": shown.passed} if shown.answered else {}
        return found


def _link_or_copy(source: str, target: str) -> None:
    """A second name of the file, whose first is soon another file's; a copy where there are no second names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _encode(assigned: Assigned, loaded: LoadedBase) -> EncodedSet:
    longest = assigned.config.training.lora.max_length
    encoded = encode_examples(
        assigned.run.read("examples", Example),
        loaded.tokenizer,
        max_length=longest,
        system=assigned.style.system,
        end_ids=end_token_ids(loaded),
    )
    encoded.check(f"training.lora.max_length = {longest}")
    return encoded


def _sum_over_workers(value: float) -> float:
    return _sums_over_workers(value)[0]


def _sums_over_workers(*values: float) -> list[float]:
    if ray.train.get_context().get_world_size() == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=get_device())
    torch.distributed.all_reduce(totals)
    return totals.tolist()
