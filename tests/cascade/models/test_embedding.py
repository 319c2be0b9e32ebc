"""Embeddings pooled from the base: what shares a batch changes nothing, padding counts for nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_in import save_tiny_base

from cascade.config import Base
from cascade.models.base import load_base
from cascade.models.embedding import MAX_TOKENS, embed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding") / "base"
    save_tiny_base(folder)
    return load_base(Base(model=str(folder), dtype="float32"))


def test_a_vector_is_the_mean_of_the_last_hidden_states(tiny) -> None:
    text = "Reverse this list."
    ids = torch.tensor([tiny.tokenizer(text, add_special_tokens=False).input_ids])
    with torch.inference_mode():
        states = tiny.model(ids, output_hidden_states=True).hidden_states[-1][0]
    np.testing.assert_allclose(embed(tiny, [text])[0], states.mean(0).numpy(), atol=1e-5)


def test_neither_order_nor_batch_change_a_vector(tiny) -> None:
    texts = ["one", "a much longer text about rivers", "", "two words", "x" * 2000, "a"]
    together = embed(tiny, texts, batch_size=3)
    assert together.shape == (6, tiny.model.config.hidden_size)
    assert not together[2].any()
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embed(tiny, [text])[0], vector, atol=1e-5)
    np.testing.assert_allclose(embed(tiny, ["x" * MAX_TOKENS])[0], embed(tiny, ["x" * 2000])[0], atol=1e-5)
    assert embed(tiny, []).shape == (0, tiny.model.config.hidden_size)
