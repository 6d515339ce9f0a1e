"""Adapters on the experts of a mixture, which PEFT keeps in one pair of factors for all of them (`target_parameters`).

Here every expert e of a parameter is a module of its own, with factors B_e (m, r) and A_e (r, n). PEFT's pair of E
experts is lora_A (E·r, n), expert by expert, and lora_B (m, r·E), in which the expert changes fastest. The pair of
several parameters in one module lie inside each other: that of the last one at the module's own path, each one before
it below one more `base_layer`. A path is called a stack here, and its experts `path.0` to `path.(E-1)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspan.methods.messages import Factors
from fedspan.support.errors import FedspanError

INNER = ".base_layer"


def expert_name(stack: str, expert: int) -> str:
    """Return the name of one expert's module."""
    return f"{stack}.{expert}"


def stack_path(module: str, place: int, count: int) -> str:
    """Return PEFT's path of the pair of the parameter at that place among the `count` adapted ones of a module."""
    return module + INNER * (count - 1 - place)


def split(
    where: Path | str, config: Mapping[str, Any], pairs: Mapping[str, Mapping[str, Tensor]]
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, int]]:
    """Return the pairs with every stack as its experts' own, and each stack's number of experts.

    Parameters
    ----------
    where
        The folder or the adapter, as messages name it.
    config
        PEFT's configuration.
    pairs
        {"A": lora_A, "B": lora_B} by module, of which one may be missing.

    Raises
    ------
    FedspanError
        For a stack whose shapes do not fit each other or the configuration's rank.
    """
    if not config.get("target_parameters"):
        return dict(pairs), {}
    own: dict[str, Mapping[str, Tensor]] = {}
    stacks: dict[str, int] = {}
    rank = int(config["r"])
    for name, pair in pairs.items():
        if not _is_stack(config, name, pair):
            own[name] = pair
            continue
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank or 0 in (*a.shape, *b.shape):
            raise FedspanError(
                f"{where}: {name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: expected ({rank}·E, in) and "
                f"(out, {rank}·E) for E experts of the config's rank"
            )
        stacks[name] = count = a.shape[0] // rank
        by_expert = b.reshape(-1, rank, count)  # (m, r, E)
        for e, part in enumerate(a.reshape(count, rank, -1)):
            own[expert_name(name, e)] = {"A": part, "B": by_expert[:, :, e]}
    if not stacks:
        names = config["target_parameters"]
        raise FedspanError(
            f"{where}: target_parameters = {names!r}, and no factors of theirs: expected lora_A and lora_B"
        )
    return own, stacks


def join(pairs: Mapping[str, Factors], stacks: Mapping[str, int]) -> dict[str, Factors]:
    """Return the pairs with the experts of every stack, all of one rank and scaling, in one pair as PEFT has it."""
    inside = {expert_name(stack, e) for stack, count in stacks.items() for e in range(count)}
    joined = {name: f for name, f in pairs.items() if name not in inside}
    for stack, count in stacks.items():
        own = [pairs[expert_name(stack, e)] for e in range(count)]
        a = torch.cat([f.a for f in own])  # (E·r, n)
        b = torch.stack([f.b for f in own], dim=2).flatten(1)  # (m, r·E)
        joined[stack] = Factors(b, a, own[0].scaling)
    return joined


def plain_modules(names: Sequence[str], stacks: Mapping[str, int]) -> list[str]:
    """Return the modules that are no experts of a stack: those that PEFT lists in `target_modules`."""
    return [name for name in names if name.rpartition(".")[0] not in stacks]


def _is_stack(config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor]) -> bool:
    """Return whether the pair belongs to a parameter: it has the rows of several experts, or the name of an owner."""
    if not {"A", "B"} <= pair.keys():
        return False
    owners = {parameter.rpartition(".")[0] for parameter in config["target_parameters"]} - {""}
    path = name.replace(INNER, "")
    owned = any(path == owner or path.endswith(f".{owner}") for owner in owners)
    return owned or pair["A"].shape[0] != int(config["r"])
