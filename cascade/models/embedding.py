"""Texts as vectors, pooled from the base itself: no second model is loaded to compare tasks with each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cascade.models.base import LoadedBase

MAX_TOKENS = 512
"""Longer texts, and those beyond the base's context, are represented by their first tokens."""


@torch.inference_mode()
def embed(loaded: LoadedBase, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
    """Mean of the last hidden states of each text, without a chat template.

    Args:
        texts: any; an empty one is the zero vector.
        batch_size: texts computed together. Those of like length are, so that little is padding.

    Returns:
        float32 array of shape (texts, hidden size).
    """
    tokenizer, device = loaded.tokenizer, loaded.device
    most = min(MAX_TOKENS, loaded.context or MAX_TOKENS)
    ids = [tokenizer(text, add_special_tokens=False, truncation=True, max_length=most).input_ids for text in texts]
    vectors = np.zeros((len(texts), loaded.model.config.hidden_size), dtype=np.float32)
    order = sorted((i for i, tokens in enumerate(ids) if tokens), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = len(ids[rows[-1]])
        padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in rows], device=device)
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in rows], device=device)
        states = loaded.model.base_model(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
        weights = mask.unsqueeze(-1).to(torch.float32)
        pooled = (states.to(torch.float32) * weights).sum(1) / weights.sum(1)
        vectors[rows] = pooled.cpu().numpy()
    return vectors
