"""What the README beside a trained adapter says."""

from __future__ import annotations

from types import SimpleNamespace

import yaml

from cascade.config import Base, Training
from cascade.scoring.statistics import Score
from cascade.tasks import Example, Message
from cascade.training.card import adapter_card, data_sha256

METRICS = {"steps": 9, "targets": 1200, "tokens": 34567, "validation_loss": 0.25, "kept_step": 6}
CONFIG = SimpleNamespace(domain="sums", seed=17, base=Base(model="org/small"), training=Training())


def example(name, teacher="answer-key-small", tier=1, answer="4"):
    messages = (Message("user", "2 + 2?"), Message("assistant", answer))
    return Example(name, "quiz", "sums", "", 1, messages, teacher, tier)


EXAMPLES = [example("a"), example("b", "gpt", 3), example("c", "org/small", 0)]


def test_the_card_says_what_it_fits_and_what_it_learned_from():
    card = adapter_card(CONFIG, "ab" * 32, EXAMPLES, METRICS)
    front, text = card.removeprefix("---\n").split("\n---\n")
    assert yaml.safe_load(front) == {
        "base_model": "org/small",
        "library_name": "peft",
        "tags": ["lora", "cascade", "sums"],
    }
    for said in (
        "ab" * 32,
        data_sha256(EXAMPLES),
        "3 examples",
        "2 verified answers of answer-key-small, gpt, 1 of the base's own",
        "only replay the tasks' known answers",
        "9 steps, 1,200 learned of 34,567 tokens; loss 0.250 on validation tasks after step 6",
        "not measured on test tasks yet",
        "Licence",
    ):
        assert said in text, said
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["training"]["lora"]["rank"] == 16


def test_scores_come_with_n_and_interval():
    score = Score(n=200, passed=100, accuracy=0.5, low=0.43, high=0.57, unparsed=0)
    card = adapter_card(
        CONFIG, "", [example("b", "gpt", 3)], {k: METRICS[k] for k in list(METRICS)[:3]}, {"base": score}
    )
    assert "on 200 held-out test tasks, with 95 % intervals: base 50.0% [43.0%, 57.0%]." in card
    assert "answer-key" not in card


def test_the_hash_is_of_the_content():
    assert data_sha256(EXAMPLES) == data_sha256(EXAMPLES[::-1])
    assert data_sha256([example("a")]) != data_sha256([example("a", answer="5")])
