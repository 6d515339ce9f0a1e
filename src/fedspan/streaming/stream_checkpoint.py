"""The checkpoint of a stream, one safetensors file that is replaced atomically.

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

_FORMAT = 3
_KINDS = {torch.float32: "float32", torch.float64: "float64"}
_DTYPES = {name: kind for kind, name in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class PassSums:
    """The sums of one pass over the source, finished or not."""

    queries_digest: str
    """`digest_of_queries` of what the pass asks."""
    stack: tuple[Partial, ...] = ()
    """The sums so far of every node between the root and the source that is being read; one when finished."""
    num_clients: int = 0
    """Updates folded."""
    clients_digest: str = ""
    """`ClientSequence.digest` of their clients."""


@dataclass(frozen=True, slots=True)
class StreamCheckpoint:
    """The state of a stream between two blocks."""

    step: str
    """`digest_of_step` of what is being aggregated, into what."""
    block: int
    """Updates multiplied together; sums of other blocks would differ by rounding."""
    finished: tuple[PassSums, ...] = ()
    current: PassSums | None = None


def write(path: Path, checkpoint: StreamCheckpoint) -> None:
    """Replace `path` by this checkpoint; on any failure the previous file survives."""
    tensors: dict[str, Tensor] = {}
    structure = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "block": checkpoint.block,
        "finished": [_pack_pass(x, tensors) for x in checkpoint.finished],
        "current": None if checkpoint.current is None else _pack_pass(checkpoint.current, tensors),
    }
    write_bytes(path, save(tensors, metadata={"fedspan_stream": json.dumps(structure)}))


def read(path: Path) -> StreamCheckpoint:
    """Read the checkpoint in `path`.

    Raises
    ------
    FedspanError
        When the file is damaged or not the checkpoint of a stream.
    """
    try:
        meta, tensors = read_tensors(path, "fedspan_stream")
        if meta["format"] != _FORMAT:
            raise FedspanError(f"format {meta['format']!r}")
        finished = tuple(_unpack_pass(x, tensors) for x in meta["finished"])
        current = None if meta["current"] is None else _unpack_pass(meta["current"], tensors)
        return StreamCheckpoint(meta["step"], meta["block"], finished, current)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedspanError(f"{path} is damaged or no checkpoint of a stream, format {_FORMAT} ({error})") from None


def digest_of_step(method: Method, state: ServerState) -> str:
    """Return a digest of the method, state, round and exchange. The method's options show in what it asks."""
    log = state.patches
    patches = {} if log is None else log.total
    values: dict[str, Tensor] = {f"dense/{name}": value for name, value in state.dense.items()}
    for module, held in state.modules.items():
        values |= {f"module/{module}/{name}": value for name, value in held.items()}
    for module, patch in patches.items():
        values |= {f"patch/{module}/{name}": value for name, value in patch_tensors(patch).items()}
    about = [method.info.name, repr(state.template), state.round_num, state.exchange]
    return _digest(json.dumps(about), values)


def digest_of_queries(queries: Queries | None) -> str:
    """Return a digest of what a pass asks, bit by bit; empty for a method that asks nothing."""
    if queries is None:
        return ""
    numbered = {(name, i): q for name, asked in queries.items() for i, q in enumerate(asked)}
    return _digest("", {f"{place} {q.kind} {q.vote}": q.x for place, q in numbered.items()})


def _digest(text: str, values: Mapping[str, Tensor]) -> str:
    total = blake2b(text.encode(), digest_size=16)
    for name, value in values.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _pack_pass(x: PassSums, tensors: dict[str, Tensor]) -> dict[str, Any]:
    stack = [_pack(partial, tensors) for partial in x.stack]
    return {"asked": x.queries_digest, "stack": stack, "num_clients": x.num_clients, "roll": x.clients_digest}


def _unpack_pass(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PassSums:
    stack = tuple(_unpack(partial, tensors) for partial in meta["stack"])
    return PassSums(meta["asked"], stack, meta["num_clients"], meta["roll"])


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
        "products": {
            module: {name: keep(value) for name, value in held.items()} for module, held in x.product_sums.items()
        },
        "kinds": [[*place, _KINDS[kind]] for place, kind in x.kinds.items()],
    }


def _unpack(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Partial:
    return Partial(
        meta["num_clients"],
        meta["weight"],
        {name: tensors[key] for name, key in meta["dense"].items()},
        {module: {name: tensors[key] for name, key in held.items()} for module, held in meta["sums"].items()},
        product_sums={
            module: {name: tensors[key] for name, key in held.items()} for module, held in meta["products"].items()
        },
        kinds={(module, part): _DTYPES[kind] for module, part, kind in meta["kinds"]},
    )
