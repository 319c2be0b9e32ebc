"""Routing: who gets a request, how sure the router is, what that gains, and what else the router could look at.

    python perf/routing.py --data FOLDER [--folder CACHE]     # FOLDER holds mbpp.jsonl; an hour on two cores, once
    python perf/routing.py --data FOLDER --size large         # a GPU, once: see perf/routing_lab.py

Base SmolLM2-135M-Instruct and three modifiers trained on it (their teacher **replays the answer key**) answer the same
held-out tasks: BFCL single turn, MBPP, and six families of reasoning-gym. From those verdicts routers are trained
as `train_router` trains them, cross-fitted over five folds, so that no figure is of a query that its router has seen.
Routes are also counted on further tasks of the three domains, without verdicts, and on general chat from another
source than the router's own (chatterbot-corpus, BSD). A task's route is right if no candidate answers it better, that
of chat if it is the base; the four kinds of queries count alike, however many there are of each. Intervals are 95 %.
The last line is JSON: the figures with their targets.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import yaml
from _figures import at_most
from numpy.typing import NDArray
from routing_lab import SEED, Lab, add_options, base_states, lab_of, tasks

from cascade.benchmarks.sources import wheel_folder
from cascade.config import Router
from cascade.routing.calibration import calibrate, expected_calibration_error
from cascade.routing.features import featurize
from cascade.routing.model import BASE, RouterModel, query_of
from cascade.routing.network import target_matrix, train_network
from cascade.routing.train import Figure, follow_ups, general_chat, train_router
from cascade.tasks import Message, Task

FOLDS, DRAWS = 5, 10_000
CHAT_WHEEL = ("chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
FOLLOW_UPS = (
    "Are you absolutely sure about this answer?",
    "Can you rephrase your previous answer so that a child understands it?",
    "Could you double check the last step for me?",
    "Hmm, I expected something else.",
    "How would the result change if there were twice as many?",
    "I do not follow, please elaborate.",
    "In the previous response, what did you assume?",
    "Make the answer half as long.",
    "My teacher says it should be different.",
    "Now write it out in full.",
    "Ok but what about the one before that?",
    "Please fix the mistake you just made.",
    "Rewrite your previous response.",
    "So which of them is right?",
    "Take a second look at it.",
    "That was quick! Can you also handle the remaining ones?",
    "The third one is missing.",
    "What would happen if we left that out?",
    "Why did you choose this one and not the other?",
    "Would the same approach work for larger ones?",
)
"""Of this project's own writing too, but none of the router's own."""
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def main() -> None:
    options = parse()
    lab = lab_of(options)
    routing = Routing(lab.judged, {part: lab.verdicts(part) for part in (BASE, *(d.name for d in lab.size.domains))})
    figures = routing.measure()
    figures |= right_routes(routing, lab)
    figures |= further_routes(routing, lab, options.further)
    figures |= latency(routing)
    if not options.skip_inputs:
        compare_inputs(routing, lab)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--further", type=int, default=400, help="tasks of a domain whose routes alone are counted")
    parser.add_argument("--skip-inputs", action="store_true", help="no comparison of inputs: it runs the base on each")
    return parser.parse_args()


def at_least(figure: Figure, target: float) -> dict[str, Any]:
    return {**shown(figure), "target": target, "met": figure.value >= target}


def above_zero(figure: Figure) -> dict[str, Any]:
    return {**shown(figure), "target": 0, "met": figure.low > 0}


def shown(figure: Figure) -> dict[str, Any]:
    return {"value": round(figure.value, 4), "interval": [round(figure.low, 4), round(figure.high, 4)], "n": figure.n}


def text_of(figure: Figure) -> str:
    return f"{figure.value:6.1%} [{100 * figure.low:.1f}, {100 * figure.high:.1f}] (n {figure.n})"


@dataclass
class Routing:
    """Judged tasks, who answered them rightly, and what routers that have not seen them say of each.

    Attributes:
        known, probability: see `RouterModel.probabilities`; shapes (tasks,) and (tasks, candidates), cross-fitted.
    """

    judged: list[Task]
    passed: dict[str, list[bool]]

    def __post_init__(self) -> None:
        self.queries = [query_of(t) for t in self.judged]
        self.candidates = (BASE, *sorted(set(self.passed) - {BASE}))
        self.right = np.array([self.passed[c] for c in self.candidates]).T
        self.label = np.array([self.candidates.index(t.domain) for t in self.judged])
        self.fold = np.random.default_rng(SEED).permutation(len(self.judged)) % FOLDS
        self.settings = Router()
        self.known, self.probability = np.empty(len(self.judged)), np.empty(self.right.shape)
        for k in range(FOLDS):
            model, test = self.trained(self.fold != k, k), self.fold == k
            queries = [self.queries[i] for i in np.flatnonzero(test)]
            self.known[test], self.probability[test], _ = model.probabilities(queries)
        self.choice = self.chosen(self.known, self.probability, self.settings.threshold)

    @cached_property
    def whole(self) -> RouterModel:
        """A router of all judged tasks."""
        return self.trained(np.ones(len(self.judged), dtype=bool), SEED)

    def right_by(self, choice: NDArray[np.int64]) -> Bools:
        """Whether the chosen candidates answer rightly."""
        found: Bools = self.right[np.arange(len(choice)), choice]
        return found

    def trained(self, rows: Bools, seed: int) -> RouterModel:
        """A router as `train_router` makes it of these rows."""
        at = np.flatnonzero(rows)
        outcomes_there = {c: [self.passed[c][i] for i in at] for c in self.candidates}
        return train_router([self.queries[i] for i in at], outcomes_there, self.settings, seed)[0]

    def measure(self) -> dict[str, Any]:
        """Cross-fitted figures of the router as it ships."""
        chosen, routed = self.choice, self.right_by(self.choice)
        best, oracle = int(self.right.mean(0).argmax()), np.asarray(self.right.any(1))
        chance = self.right.mean(1)  # the expectation of a draw, so that its noise is not in the comparison
        print(f"\nright answers on {len(chosen)} held-out tasks, threshold {self.settings.threshold}")
        for name, column in zip(self.candidates, self.right.T, strict=True):
            print(f"   always {name:<12} {text_of(Figure.share(column))}")
        print(f"   at random           {chance.mean():6.1%}")
        print(f"   routed              {text_of(Figure.share(routed))}")
        print(f"   oracle              {text_of(Figure.share(oracle))}")
        for number, name in enumerate(self.candidates[1:], 1):
            own = self.label == number
            counts = {c: int((chosen[own] == i).sum()) for i, c in enumerate(self.candidates)}
            print(
                f"   {name} tasks go to {counts}; right: routed {routed[own].mean():.1%}, best {oracle[own].mean():.1%}"
            )
        print("\nquality against cost: threshold, share that modifiers answer, right answers")
        for threshold in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99):
            there = self.chosen(self.known, self.probability, threshold)
            share = Figure.share(self.right_by(there))
            print(f"   {threshold:4.2f}  {(there > 0).mean():6.1%}  {text_of(share)}")
        pooled, outcome = self.probability.ravel(), self.right.ravel()
        score = routed.astype(float).tolist()
        single = Figure.difference(self.right[:, best].astype(float).tolist(), score, SEED)
        draw = Figure.difference(chance.tolist(), score, SEED)
        print(f"   routed minus {self.candidates[best]} alone {text_of(single)}; minus random {text_of(draw)}")
        return {
            "route to the domain's own modifier": at_least(Figure.share(chosen == self.label), 0.97),
            "route to a candidate as right as any": at_least(Figure.share(routed == oracle), 0.97),
            "expected calibration error": at_most(
                expected_calibration_error(pooled, outcome), 0.03, n=int(pooled.size)
            ),
            "gain over best single": above_zero(single),
            "gain over random": above_zero(draw),
        }

    def chosen(self, known: Floats, right: Floats, threshold: float) -> NDArray[np.int64]:
        """Index of the candidate per row, by the rule of `RouterModel.decide`."""
        rule = RouterModel(None, self.candidates, 0, 0, threshold)  # type: ignore[arg-type]
        routes = [rule.decide(float(k), r, threshold).choice for k, r in zip(known, right, strict=True)]
        return np.array([self.candidates.index(c) for c in routes], dtype=np.int64)


# ---------------------------------------------------------------------------------------------- right routes


def right_routes(routing: Routing, lab: Lab) -> dict[str, Any]:
    """Share of right routes by kind of query and over the kinds, and how much of it could be had."""
    oracle = routing.right.any(1)
    split = oracle & ~routing.right.all(1)
    chat = np.array([routing.whole.route(line).choice == BASE for line in chat_lines()])

    def by_kind(choice: NDArray[np.int64]) -> dict[str, Bools]:
        as_right = routing.right_by(choice) == oracle
        return {c: as_right[routing.label == i] for i, c in enumerate(routing.candidates) if i} | {"general chat": chat}

    kinds = by_kind(routing.choice)
    print("\nright routes (a task's: to a candidate as right as any; general chat's: to the base)")
    for i, (name, hits) in enumerate(kinds.items(), 1):
        where = split & (routing.label == i)
        part = routing.right_by(routing.choice)[where]
        apart = f"; candidates differ on {len(part)}, of those {part.mean():.1%} right" if len(part) else ""
        print(f"   {name:<12} {text_of(Figure.share(hits))}{apart}")
    pooled = balanced(kinds)
    print(f"   kinds alike  {text_of(pooled)}")
    print(f"   by the domain's name instead {text_of(balanced(by_kind(routing.label)))}")
    sampled = [lab.sampled(c) for c in routing.candidates]
    if all(s is not None for s in sampled):
        informed = by_kind(
            (np.array(sampled).T + 1e-3 * routing.probability).argmax(1)
        )  # its own opinion where samples tie
        shares = ", ".join(f"{name} {hits.mean():.1%}" for name, hits in informed.items())
        print(
            f"   by who is oftenest right in {lab.size.samples} answers drawn to this very task "
            f"{text_of(balanced(informed))}: {shares}"
        )
    return {"right routes, kinds of queries alike": at_least(pooled, 0.97)}


def balanced(kinds: dict[str, Bools]) -> Figure:
    """Mean of the kinds' shares; its interval by bootstrap within each kind."""
    rng = np.random.default_rng(SEED)
    draws = np.mean([rng.binomial(len(hits), hits.mean(), DRAWS) / len(hits) for hits in kinds.values()], axis=0)
    low, high = np.percentile(draws, [2.5, 97.5])
    value = float(np.mean([hits.mean() for hits in kinds.values()]))
    return Figure(value, sum(map(len, kinds.values())), float(low), float(high))


# ---------------------------------------------------------------------------------------------- further routes


def chat_lines() -> list[str]:
    """What people say to a chatbot: the first line of each conversation, but for those about programming."""
    package, version, sha256 = CHAT_WHEEL
    folder = wheel_folder(package, version, "chatterbot_corpus/data/english/", sha256)
    found: dict[str, None] = {}
    for path in sorted(folder.glob("*.yml")):
        if path.stem != "coding":
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            found |= {str(talk[0]): None for talk in content["conversations"]}
    known = {line.lower() for line in general_chat()}
    return [line for line in found if line.lower() not in known]


def further_routes(routing: Routing, lab: Lab, most: int) -> dict[str, Any]:
    """Routes of queries without verdicts: further tasks of the domains, general chat, and turns of conversations."""
    model = routing.whole
    own = set(routing.queries)
    further: dict[str, list[tuple[Message, ...]]] = {}
    for domain in lab.size.domains:
        found = [t for t in tasks(domain, "test", lab.data, most + len(own), lab.seed) if query_of(t) not in own]
        if found:
            further[domain.name] = [t.messages for t in found[:most]]
    further[BASE] = [(Message("user", line),) for line in chat_lines()]
    print("\nroutes of queries that no router was trained on, by threshold")
    right: list[bool] = []
    for name, talks in further.items():
        for threshold in (0.5, 0.8, 0.95):
            hits = [model.route(talk, threshold).choice == name for talk in talks]
            print(f"   {name:<12} at {threshold:.2f} to {name}: {text_of(Figure.share(hits))}")
            right += hits if threshold == routing.settings.threshold else []
    first = {d.name: [t.messages for t in routing.judged if t.domain == d.name][:most] for d in lab.size.domains}
    conversations(model, first | further)
    return {"further queries and general chat, right route": at_least(Figure.share(right), 0.97)}


def conversations(model: RouterModel, talks_of: dict[str, list[tuple[Message, ...]]]) -> None:
    """Second turns: follow-ups that say nothing themselves, changes of subject, thanks."""
    rng = np.random.default_rng(SEED)
    assert not set(FOLLOW_UPS) & set(follow_ups())
    print("\nroutes of second turns")
    pause = Message("assistant", "…")
    for first, own in talks_of.items():
        talks = [(*talk, pause, Message("user", str(rng.choice(FOLLOW_UPS)))) for talk in own]
        hits = [model.route(talk).choice == model.route(talk[:-2]).choice for talk in talks]
        print(f"   {first}, then a follow-up: stays where it was {text_of(Figure.share(hits))}")
    for first, second in ((BASE, "reasoning"), (BASE, "code"), ("reasoning", BASE), ("code", BASE)):
        pairs = zip(talks_of[first], rng.permutation(len(talks_of[second])), strict=False)
        turns = [((*talk, pause, *talks_of[second][i]), talks_of[second][i]) for talk, i in pairs]
        hits = [model.route(talk).choice == model.route(alone).choice for talk, alone in turns]
        print(f"   {first}, then {second}: goes where it goes alone {text_of(Figure.share(hits))}")


def latency(routing: Routing) -> dict[str, Any]:
    """Milliseconds of a decision on one core, from the conversation to the route; a tenth are 60,000 letters long."""
    torch.set_num_threads(1)
    model = routing.trained(routing.fold != 0, 0)
    longest = [(Message("user", "What is 2 + 3? " * 4000),)] * (len(routing.judged) // 9)
    talks = [t.messages for t in routing.judged] + longest
    took = []
    for talk in talks:
        began = time.perf_counter()
        model.route(talk)
        took.append(1000 * (time.perf_counter() - began))
    median, high = np.percentile(took, [50, 95])
    size = sum(p.numel() * 4 for p in model.network.parameters()) / 1e6
    print(f"\na route takes {median:.2f} ms, p95 {high:.2f} ms (n {len(took)}); the router is {size:.1f} MB")
    return {"route p95 ms": at_most(float(high), 5, n=len(took)), "router MB": at_most(size, 13)}


# ---------------------------------------------------------------------------------------------- other inputs


def compare_inputs(routing: Routing, lab: Lab) -> None:
    """The same network on other inputs: log loss, calibration, routes and right answers, cross-fitted."""
    kept = lab.folder / "states.npz"
    chat = list(general_chat())
    if not kept.exists():
        states, entropy = base_states(lab.loaded, [*routing.queries, *chat])
        np.savez(kept, states=states, entropy=entropy)
    stored = np.load(kept)
    grams = featurize([*routing.queries, *chat], routing.settings.features)
    plain = featurize([*(t.prompt for t in routing.judged), *chat], routing.settings.features)
    inputs = {
        "n-grams, without the tools' mark": plain,
        "n-grams (as shipped)": grams,
        "the base's mean hidden state": stored["states"],
        "n-grams and hidden state": np.hstack([grams, stored["states"]]),
        "n-grams, hidden state, entropy": np.hstack([grams, stored["states"], stored["entropy"] / 10]),
    }
    print(f"\ninputs compared ({len(routing.judged)} tasks, {len(chat)} lines of general chat, {FOLDS} folds)")
    print(f"   {'':<34} log loss     ECE   own modifier   right answers   chat to base")
    for name, vectors in inputs.items():
        print(f"   {name:<34} " + _with_inputs(routing, vectors.astype(np.float32), len(chat)), flush=True)


def _with_inputs(routing: Routing, vectors: NDArray[np.float32], chat: int) -> str:
    n = len(routing.judged)
    columns = [[*routing.passed[c], *[None] * chat] for c in routing.candidates] + [[True] * n + [False] * chat]
    targets = target_matrix(columns)
    fold = np.concatenate([routing.fold, np.random.default_rng(SEED).permutation(chat) % FOLDS])
    logits = np.empty(targets.shape)
    for k in range(FOLDS):
        rest = fold != k
        network = train_network(
            vectors[rest], targets[rest], hidden=routing.settings.hidden, epochs=routing.settings.epochs, seed=k
        )
        logits[~rest] = network.logits(vectors[~rest])
    probability = np.empty(targets.shape)
    for i in range(targets.shape[1]):
        rows = ~np.isnan(targets[:, i])
        found = calibrate(logits[rows, i], targets[rows, i] > 0.5, SEED)
        probability[:, i] = found.calibrator(logits[:, i])
        probability[rows, i] = found.held_out
    right, known = probability[:n, :-1], probability[:, -1]
    clipped = np.clip(right, 1e-3, 1 - 1e-3)
    loss = -float(np.where(routing.right, np.log(clipped), np.log(1 - clipped)).mean())
    error = expected_calibration_error(right.ravel(), routing.right.ravel())
    chosen = routing.chosen(known[:n], right, routing.settings.threshold)
    routed = routing.right[np.arange(n), chosen]
    to_base = (known[n:] < routing.settings.threshold).mean()
    own = (chosen == routing.label).mean()
    return f"{loss:8.4f}  {error:6.4f}   {own:10.1%}   {text_of(Figure.share(routed))}   {to_base:.1%}"


if __name__ == "__main__":
    main()
