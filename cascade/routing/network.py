"""The router's network: a small feed-forward net from hashed n-grams to one logit per candidate.

Its last two outputs are not candidates. One says whether the query is of the kind that the candidates were measured on
at all: without it a router would hand a letter of condolence to a reasoning modifier with the confidence of a sum. The
other says whether it is a follow-up, which means nothing without what came before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cascade.config import ROUTER_BYTES, router_bytes
from cascade.errors import ConfigError
from cascade.models.threads import alone

_BATCH = 32
_MOST_STEPS = 1500
"""Of the optimiser. Thousands of queries need fewer passes than hundreds: with as many the network learns them by
heart, and is sure of queries that it does not know."""
_DROPOUT = 0.1
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 1e-3


class RouterNetwork(nn.Module):
    """Three linear layers.

    Args:
        features: length of an input vector.
        hidden: width of both hidden layers.
        outputs: candidates + 2.

    Raises:
        ConfigError: the weights would exceed `ROUTER_BYTES`.
    """

    def __init__(self, features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        size = router_bytes(features, hidden, outputs)
        if size > ROUTER_BYTES:
            raise ConfigError(
                f"{features} features in layers of {hidden} make a router of {size / 1e6:.1f} MB, of which at most "
                f"{ROUTER_BYTES / 1e6:.0f} are allowed: lower router.features or router.hidden"
            )
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.ReLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (queries, outputs) for vectors of shape (queries, features)."""
        logits: torch.Tensor = self.layers(x)
        return logits

    @torch.inference_mode()
    def logits(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logits of feature vectors, shape (queries, outputs)."""
        self.eval()
        return self(torch.from_numpy(vectors)).double().numpy()


def joined(networks: Sequence[RouterNetwork]) -> RouterNetwork:
    """One network whose logits are the mean of those of several: side by side in its layers, without links between.

    Raises:
        ConfigError: see `RouterNetwork`.
    """
    parts = [[layer for layer in network.layers if isinstance(layer, nn.Linear)] for network in networks]
    first, _, last = parts[0]
    with torch.random.fork_rng(devices=[]):
        whole = RouterNetwork(first.in_features, first.out_features * len(parts), last.out_features)
    wide = [layer for layer in whole.layers if isinstance(layer, nn.Linear)]
    firsts, seconds, lasts = zip(*parts, strict=True)
    with torch.no_grad():
        wide[0].weight.copy_(torch.cat([layer.weight for layer in firsts]))
        wide[1].weight.copy_(torch.block_diag(*(layer.weight for layer in seconds)))
        wide[2].weight.copy_(torch.cat([layer.weight for layer in lasts], dim=1) / len(parts))
        wide[0].bias.copy_(torch.cat([layer.bias for layer in firsts]))
        wide[1].bias.copy_(torch.cat([layer.bias for layer in seconds]))
        wide[2].bias.copy_(torch.stack([layer.bias for layer in lasts]).mean(0))
    return whole.eval()


def train_network(
    vectors: NDArray[np.float32], targets: NDArray[np.float32], *, hidden: int, epochs: int, seed: int
) -> RouterNetwork:
    """Fit a network to outcomes.

    It is computed in one thread: products so small are no faster in several, and many times slower where another
    process wants one of the cores. So the router does not depend on their number either, with which sums change.

    Args:
        vectors: shape (queries, features).
        targets: shape (queries, outputs): 1 right, 0 wrong, NaN not measured (no loss).
        hidden: width of the hidden layers.
        epochs: passes over the queries at most; fewer where they would take more than 1,500 steps of 32.
        seed: decides the start and the order; the caller's random state is left alone.

    Raises:
        ConfigError: see `RouterNetwork`.
    """
    x, y = torch.from_numpy(vectors), torch.from_numpy(targets)
    epochs = max(1, min(epochs, _MOST_STEPS // math.ceil(len(x) / _BATCH)))
    measured = (~y.isnan()).float()
    y = y.nan_to_num()
    with alone(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RouterNetwork(x.shape[1], hidden, y.shape[1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
        network.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(_BATCH):
                loss = binary_cross_entropy_with_logits(network(x[batch]), y[batch], reduction="none")
                loss = (loss * measured[batch]).sum() / measured[batch].sum().clamp(min=1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return network.eval()


def target_matrix(columns: Sequence[Sequence[bool | None]]) -> NDArray[np.float32]:
    """Outcomes per output as a matrix (queries, outputs); None becomes NaN."""
    return np.array([[np.nan if v is None else float(v) for v in column] for column in columns], dtype=np.float32).T
