"""Where Python may look at tensors' values: only where that waits for nothing. All who look ask here."""

from __future__ import annotations

import torch
from torch import Tensor


def is_free(device: torch.device) -> bool:
    """Whether reading a tensor's values waits for nothing: on a CPU, whose memory is just looked at.

    What takes another way elsewhere is tried out on a CPU by letting this say False.
    """
    return device.type == "cpu"


def is_surely_false(flags: Tensor) -> bool:
    """Whether no flag is set, if that is known without waiting; else no."""
    return is_free(flags.device) and not flags.numpy().any()
