"""The state of a local optimizer by the names of what it steps on, to be kept between a client's rounds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedspan.algebra.galore import GaloreAdamW


def state_by_name(optimizer: torch.optim.Optimizer, stepped: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return "TENSOR:PART" -> the state's tensors, on the CPU.

    Parameters
    ----------
    stepped
        The parameters of the optimizer by name. Those that have never had a gradient have no state.
    """
    return {
        f"{name}:{part}": value.detach().cpu()
        for name, parameter in stepped.items()
        for part, value in optimizer.state.get(parameter, {}).items()
    }


def put_state(
    optimizer: torch.optim.Optimizer, stepped: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
) -> None:
    """Let an optimizer that has taken no step continue from such a state.

    What is kept about tensors that are not trained now is left alone. Everything is copied: steps work in place, and a
    client goes back to the old state when its answer is not counted.
    """
    for key, value in kept.items():
        name, _, part = key.rpartition(":")
        parameter = stepped.get(name)
        if parameter is None:
            continue
        # GaLore reads its counts on the CPU; torch's fused AdamW has its own beside the parameter.
        counted = value.ndim == 0 and isinstance(optimizer, GaloreAdamW)
        optimizer.state[parameter][part] = value.to("cpu" if counted else parameter.device, copy=True)
