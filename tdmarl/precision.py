"""In which precision networks multiply."""

from __future__ import annotations

import torch
from torch import nn

from tdmarl.nets import AgentGRU, AgentLinear, AgentMLP

PRECISIONS = ("float32", "bfloat16")


def set_precision(precision: str, *networks: nn.Module) -> None:
    """Lets the hidden layers of networks multiply in bfloat16, in which GPUs and some CPUs are several times as fast.

    What a hidden :class:`AgentLinear` multiplies, and its result, are rounded to eight binary digits, in the backward
    pass too. Everything else stays float32: parameters, gradients, optimizers, normalization, activations, the last
    layer, and what is made of its output: log-probabilities, values, losses. A policy rounds alike where it acts and
    where it learns, or ratios of its probabilities would not be one at first. CPUs with instructions for it
    (AVX512-BF16) multiply twice as fast as in float32; on others it is mostly slower, and for trying out what a GPU
    will compute.

    Args:
        precision (str): ``float32`` or ``bfloat16``.
        *networks (nn.Module): in which :class:`AgentMLP` are looked for; TensorDict modules, too.

    Raises:
        ValueError: nothing would be rounded, or something recurrent is among them: the state after a sequence must
            be the one that its single steps gave.

    Example:
        >>> net, x = AgentMLP(1, 1, 1, hidden=(1,)), torch.tensor([[1 + 2**-9]])
        >>> _ = nn.init.ones_(net.layers[0].weight)
        >>> net.layers[0](x).item()
        1.001953125
        >>> set_precision("bfloat16", net)
        >>> net.layers[0](x).item()
        1.0
    """
    if precision not in PRECISIONS:
        tf32 = ": torch.set_float32_matmul_precision('high') is for the whole process" if precision == "tf32" else ""
        raise ValueError(f"precision={precision!r} must be one of {PRECISIONS}{tf32}.")
    if precision == "float32":
        return
    parts = [part for network in networks for part in network.modules()]
    if any(isinstance(part, AgentGRU) for part in parts):
        raise ValueError(
            "precision='bfloat16' does not go with recurrent networks, whose states it would let drift apart: use "
            "precision='float32', or TF32 by torch.set_float32_matmul_precision('high')."
        )
    layers = [
        layer
        for part in parts
        if isinstance(part, AgentMLP)
        for layer in list(part.layers)[:-1]
        if isinstance(layer, AgentLinear)
    ]
    if not layers:
        raise ValueError(
            "precision='bfloat16' is for the hidden layers of tdmarl.AgentMLP, and there are none: let networks of "
            "your own round what they multiply, such as by torch.autocast."
        )
    for layer in layers:
        layer.products = torch.bfloat16
