"""How far a stream has come, in one safetensors file that is replaced atomically.

Tensors are stored as they are; the structure around them is JSON in the file's own header, so nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.patches import patch_tensors
from fedspan.methods.queries import Queries
from fedspan.support.errors import FedspanError
from fedspan.support.files import read_tensors, write_bytes

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the source, finished or not."""

    asked: str
    """`digest_of_questions` of what it asked."""
    stack: tuple[Partial, ...] = ()
    """The sums so far of every node between the root and the source that is being read; one when finished."""
    num_clients: int = 0
    """Updates folded."""
    roll: str = ""
    """`RollCall.digest` of their clients."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A stream between two blocks."""

    step: str
    """`digest_of_step` of what is being aggregated, into what."""
    block: int
    finished: tuple[Pass, ...] = ()
    current: Pass | None = None


def write(path: Path, saved: Saved) -> None:
    """Replace `path` by this; whatever goes wrong, the file that was there survives."""
    tensors: dict[str, Tensor] = {}
    structure = {
        "format": _FORMAT,
        "step": saved.step,
        "block": saved.block,
        "finished": [_pack_pass(x, tensors) for x in saved.finished],
        "current": None if saved.current is None else _pack_pass(saved.current, tensors),
    }
    write_bytes(path, save(tensors, metadata={"fedspan_stream": json.dumps(structure)}))


def read(path: Path) -> Saved:
    """What stands in `path`.

    Raises
    ------
    ValueError
        When the file is no checkpoint of a stream, or damaged.
    """
    try:
        meta, tensors = read_tensors(path, "fedspan_stream")
        if meta["format"] != _FORMAT:
            raise FedspanError(f"format {meta['format']!r}")
        finished = tuple(_unpack_pass(x, tensors) for x in meta["finished"])
        current = None if meta["current"] is None else _unpack_pass(meta["current"], tensors)
        return Saved(meta["step"], meta["block"], finished, current)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedspanError(f"{path} is damaged or no checkpoint of a stream, format {_FORMAT} ({error})") from None


def digest_of_step(method: Method, state: ServerState) -> str:
    """The same for the same method, state, round and exchange. Options of the method show in what it asks."""
    log = state.patches
    patches = {} if log is None else log.total
    values: dict[str, Tensor] = {f"dense/{name}": value for name, value in state.dense.items()}
    for module, held in state.modules.items():
        values |= {f"module/{module}/{name}": value for name, value in held.items()}
    for module, patch in patches.items():
        values |= {f"patch/{module}/{name}": value for name, value in patch_tensors(patch).items()}
    about = [method.info.name, repr(state.template), state.round_num, state.exchange]
    return _digest(json.dumps(about), values)


def digest_of_questions(questions: Queries | None) -> str:
    """The same for the same questions, bit by bit; empty for a method that asks none."""
    if questions is None:
        return ""
    numbered = {(name, i): q for name, asked in questions.items() for i, q in enumerate(asked)}
    return _digest("", {f"{place} {q.kind} {q.vote}": q.x for place, q in numbered.items()})


def _digest(text: str, values: Mapping[str, Tensor]) -> str:
    total = blake2b(text.encode(), digest_size=16)
    for name, value in values.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _pack_pass(x: Pass, tensors: dict[str, Tensor]) -> dict[str, Any]:
    stack = [_pack(partial, tensors) for partial in x.stack]
    return {"asked": x.asked, "stack": stack, "num_clients": x.num_clients, "roll": x.roll}


def _unpack_pass(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Pass:
    stack = tuple(_unpack(partial, tensors) for partial in meta["stack"])
    return Pass(meta["asked"], stack, meta["num_clients"], meta["roll"])


def _pack(x: Partial, tensors: dict[str, Tensor]) -> dict[str, Any]:
    def keep(value: Tensor) -> str:
        key = f"{len(tensors):06d}"
        tensors[key] = value.contiguous().clone()  # the format refuses tensors that share memory
        return key

    return {
        "num_clients": x.num_clients,
        "weight": x.weight,
        "dense": {name: keep(value) for name, value in x.dense.items()},
        "sums": {module: {name: keep(value) for name, value in held.items()} for module, held in x.sums.items()},
    }


def _unpack(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Partial:
    return Partial(
        meta["num_clients"],
        meta["weight"],
        {name: tensors[key] for name, key in meta["dense"].items()},
        {module: {name: tensors[key] for name, key in held.items()} for module, held in meta["sums"].items()},
    )
