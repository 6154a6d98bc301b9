"""How many CPU threads a model computes with."""

from __future__ import annotations

from typing import Any

SMALL = 100_000_000
"""Parameters below which one CPU thread is faster than several."""


def use_fitting_threads(model: Any) -> None:
    """Let this process compute with one thread where a torch model on a CPU is small.

    Sharing its little work out costs more than doing it, and many times more on a machine with other work.
    """
    import torch

    parameters = list(model.parameters())
    if parameters[0].device.type == "cpu" and sum(parameter.numel() for parameter in parameters) < SMALL:
        torch.set_num_threads(1)
