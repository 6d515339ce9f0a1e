"""Broadcasts and results as messages between processes: a payload that clients share is sent to each process once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedspan.client.training import Assignment, LocalResult, Terms
from fedspan.config import LocalConfig
from fedspan.methods.messages import Broadcast, Update
from fedspan.wire import packing

_Put = Callable[[packing.TensorList, Any], dict[str, Any]]
_Get = Callable[[Any, Sequence[Tensor]], Any]
_PARTS: Mapping[str, tuple[_Put, _Get]] = {
    "adapter": (packing.put_factors, packing.get_factors),
    "dense": (packing.put_dense, packing.get_dense),
    "patch": (packing.put_patch, packing.get_patch),
    "correction": (packing.put_dense, packing.get_dense),
    "subspaces": (packing.put_subspaces, packing.get_subspaces),
    "moments": (packing.put_dense, packing.get_dense),
    "optimizer": (packing.put_dense, packing.get_dense),
}
"""The parts of a broadcast that are sent to a process, with the functions that pack and unpack them. `news` is not
among them: it serves to count the bytes of a round, which is done in the process that leads the run."""


class SharedPayloads:
    """The sender's side: numbers the parts of broadcasts, and sends each part once to each process.

    Clients of one round share most of what they receive (a patch, the heads, an adapter for each rank). Parts are
    compared by identity, which costs nothing; equal parts that are not one object are sent twice.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[int, object]] = {}
        """Number and part by the part's `id`. The part is kept so that no other object can be given its `id`."""
        self._next = 0

    def expect(self, broadcasts: Sequence[Broadcast]) -> None:
        """Number the parts of all broadcasts of the work that begins now, and drop those of earlier work."""
        before, self._numbers = self._numbers, {}
        for broadcast in broadcasts:
            for part in (getattr(broadcast, name) for name in _PARTS):
                if id(part) not in self._numbers:
                    self._numbers[id(part)] = before.get(id(part), (self._next, part))
                    self._next += 1

    def forget(self, held: set[int]) -> list[int]:
        """Return the parts that a process holds and will not need again, and take them from `held`."""
        gone = held - {number for number, _ in self._numbers.values()}
        held -= gone
        return sorted(gone)

    def broadcast(self, packed: packing.TensorList, held: set[int], b: Broadcast) -> dict[str, Any]:
        """Return a broadcast's description, with the parts that this process does not hold yet.

        Parameters
        ----------
        held
            Numbers of the parts that the process holds; those that are sent now are added.
        """
        header: dict[str, Any] = {"recipe": packing.put_recipe(b.recipe), "seeded": sorted(b.seeded)}
        for name, (put, _) in _PARTS.items():
            part = getattr(b, name)
            number, _ = self._numbers[id(part)]
            new = number not in held
            held.add(number)
            header[name] = [number, put(packed, part) if new else None]
        return header

    def assignment(self, packed: packing.TensorList, held: set[int], a: Assignment) -> dict[str, Any]:
        """Return an assignment's description."""
        return {
            "client_id": a.client_id,
            "broadcast": self.broadcast(packed, held, a.broadcast),
            "rows": packed.put(torch.as_tensor(a.rows)),
            "steps": a.steps,
            "weight": a.weight,
            "secret": a.secret,
            "terms": None if a.terms is None else [a.terms.seed, a.terms.local.model_dump(), a.terms.round_num],
        }


class PayloadCache:
    """The receiver's side: the parts of broadcasts that a process has received and still holds."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def forget(self, numbers: Sequence[int]) -> None:
        """Drop parts that will not be named again."""
        for number in numbers:
            del self._held[number]

    def broadcast(self, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> Broadcast:
        """Return the broadcast that a header describes.

        A part that was sent before is the same object as then: the model recognises an unchanged patch by identity.
        """
        parts: dict[str, Any] = {}
        for name, (_, get) in _PARTS.items():
            number, new = header[name]
            if new is not None:
                self._held[number] = get(new, tensors)
            parts[name] = self._held[number]
        return Broadcast(**parts, recipe=packing.get_recipe(header["recipe"]), seeded=frozenset(header["seeded"]))

    def assignment(self, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> Assignment:
        """Return the assignment that a header describes."""
        sent, rows = self.broadcast(header["broadcast"], tensors), tensors[header["rows"]].numpy()
        given = (header["client_id"], sent, rows, header["steps"], header["weight"], header["secret"])
        if header["terms"] is None:
            return Assignment(*given)
        seed, local, round_num = header["terms"]
        return Assignment(*given, Terms(seed, LocalConfig(**local), round_num))


def put_result(packed: packing.TensorList, result: LocalResult) -> dict[str, Any]:
    """Return the description of a client's result."""
    update = result.update
    return {
        "client_id": update.client_id,
        "num_examples": update.num_examples,
        "modules": packing.put_payloads(packed, update.modules),
        "dense": packing.put_dense(packed, update.dense),
        "moments": packing.put_dense(packed, update.moments),
        "rate_sum": update.rate_sum,
        "optimizer": packing.put_dense(packed, update.optimizer),
        "train_loss": result.train_loss,
        "steps": result.steps,
        "optimizer_bytes": result.optimizer_bytes,
    }


def get_result(header: Mapping[str, Any], tensors: Sequence[Tensor]) -> LocalResult:
    """Return the result that a header describes."""
    update = Update(
        header["client_id"],
        header["num_examples"],
        packing.get_payloads(header["modules"], tensors),
        packing.get_dense(header["dense"], tensors),
        packing.get_dense(header["moments"], tensors),
        header["rate_sum"],
        packing.get_dense(header["optimizer"], tensors),
    )
    return LocalResult(update, header["train_loss"], header["steps"], header["optimizer_bytes"])
