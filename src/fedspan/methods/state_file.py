"""Server states as JSON and named tensors, for the header and the body of one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedspan.methods.base import ServerState
from fedspan.methods.messages import Template
from fedspan.methods.patches import Patch, PatchLog, patch_of, patch_tensors


def pack_state(state: ServerState, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the state's tensors to `tensors` and return the structure around them, as JSON."""
    t = state.template
    log = state.patches
    return {
        "template": {
            "modules": {name: list(shape) for name, shape in t.modules.items()},
            "rank": t.rank,
            "alpha": t.alpha,
            "rslora": t.rslora,
            "seed": t.seed,
            "num_clients": t.num_clients,
            "adaptive": t.adaptive,
        },
        "round_num": state.round_num,
        "exchange": state.exchange,
        "modules": {name: pack_tensors(held, f"module/{name}", tensors) for name, held in state.modules.items()},
        "dense": pack_tensors(state.dense, "dense", tensors),
        "extra": pack_tensors(state.extra, "extra", tensors),
        "patches": None
        if log is None
        else {
            "version": log.version,
            "total": _pack_patch(log.total, "patch/total", tensors),
            "increments": [_pack_patch(x, f"patch/{i}", tensors) for i, x in enumerate(log.increments)],
        },
    }


def unpack_state(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ServerState:
    """Return the state that `pack_state` took apart.

    Raises
    ------
    KeyError, TypeError, AttributeError, ValueError
        When something is missing or of another form.
    """
    t = structure["template"]
    log = structure["patches"]
    return ServerState(
        Template(**{**t, "modules": {n: (m, k) for n, (m, k) in t["modules"].items()}}),
        {name: unpack_tensors(keys, tensors) for name, keys in structure["modules"].items()},
        unpack_tensors(structure["dense"], tensors),
        structure["round_num"],
        structure["exchange"],
        None
        if log is None
        else PatchLog(
            _unpack_patch(log["total"], tensors),
            log["version"],
            tuple(_unpack_patch(x, tensors) for x in log["increments"]),
        ),
        unpack_tensors(structure["extra"], tensors),
    )


def pack_tensors(named: Mapping[str, Tensor], prefix: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Add named tensors to `tensors` under keys with that prefix and return name -> key."""
    keys = {name: f"{prefix}/{name}" for name in named}
    tensors.update({keys[name]: value for name, value in named.items()})
    return keys


def unpack_tensors(keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return name -> tensor."""
    return {name: tensors[key] for name, key in keys.items()}


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous and without shared memory, which safetensors refuses.

    A patch log's first increment is its total, for one.
    """
    separated: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        separated[name] = whole.clone() if whole.untyped_storage().data_ptr() in held else whole
        held.add(separated[name].untyped_storage().data_ptr())
    return separated


def _pack_patch(patch: Mapping[str, Patch], prefix: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    return {name: pack_tensors(patch_tensors(p), f"{prefix}/{name}", tensors) for name, p in patch.items()}


def _unpack_patch(structure: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor]) -> dict[str, Patch]:
    return {name: patch_of(unpack_tensors(keys, tensors)) for name, keys in structure.items()}
