"""What a process may take of its machine."""

from __future__ import annotations

import torch

from cascade.config import Execution
from cascade.models.base import keep_to_share


def limit_process(execution: Execution, cpus: float) -> None:
    """Keep torch to what the process was given of the machine: CPU threads, and its share of a GPU's memory."""
    torch.set_num_threads(execution.threads or max(1, int(cpus)))
    if execution.use_gpu:
        keep_to_share(execution.gpu_share)
