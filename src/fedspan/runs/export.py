"""The result of a run as folders that other libraries read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from fedspan.adapters.peft_folder import LABELS_NAME
from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Broadcast, Factors, Request
from fedspan.methods.readout import received
from fedspan.runs.base_record import labels_file
from fedspan.runs.context import RunContext
from fedspan.runs.loop import MethodRun
from fedspan.runs.results import put
from fedspan.support.files import write_bytes


def export(context: RunContext, run: MethodRun) -> Path | None:
    """Write the result: one PEFT adapter folder, one for every client of a personalised method, or a whole model.

    The labels lie in the run folder and beside every adapter, as entries of a configuration of transformers.

    Returns
    -------
    Path or None
        The adapter folder; none where there is not exactly one.
    """
    info, labels = run.method.info, labels_file(context)
    if labels is not None:
        write_bytes(context.out / LABELS_NAME, labels)
    if info.personalised:
        _export_personal(context, run, labels)
        return None
    return _export_one(context, run, labels)


def export_best(context: RunContext, run: MethodRun) -> None:
    """Write the model of the last finished round as `adapter-best` (or `model-best`) in place of an earlier one.

    Of a personalised method these are the clients' adapters, in `adapters-best`.
    """
    labels = labels_file(context)
    if run.method.info.personalised:
        _export_personal(context, run, labels, "-best")
    else:
        _export_one(context, run, labels, "-best")


def _export_one(context: RunContext, run: MethodRun, labels: bytes | None, suffix: str = "") -> Path | None:
    broadcast = run.method.broadcast(run.saved.state, Request(None))
    if run.method.info.trains != "adapter":
        context.model.load(broadcast)
        put(context.out / f"model{suffix}", lambda folder: context.model.save_weights(folder, context.processor))
        return None
    path = context.out / f"adapter{suffix}"
    merged = merged_adapter(broadcast)
    put(path, lambda folder: _save(context, folder, merged, broadcast.dense, labels))
    return path


def _export_personal(context: RunContext, run: MethodRun, labels: bytes | None, suffix: str = "") -> None:
    """Write every client's own adapter, for the untouched base."""
    info = run.method.info
    # Clients that train alone have nothing of a federation to export, and those of real sites keep their own.
    if info.trains != "adapter" or info.alone or context.coordinator is not None:
        return
    for client in context.clients:
        sent = run.method.broadcast(run.saved.state, Request(client.rank))
        own = run.method.start(sent, run.saved.client_states.get(client.client_id))
        write = partial(_save, context, factors=merged_adapter(own), dense=own.dense, labels=labels)
        put(context.out / f"adapters{suffix}" / client.client_id, write)


def _save(
    context: RunContext,
    folder: Path,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    labels: bytes | None,
) -> None:
    context.model.save_adapter(folder, factors, dense)
    if labels is not None:
        write_bytes(folder / LABELS_NAME, labels)


def merged_adapter(broadcast: Broadcast) -> dict[str, Factors]:
    """Return adapter and patch as one adapter with scaling 1: exactly what a client runs, for the untouched base."""
    merged: dict[str, Factors] = {}
    for name, factors in broadcast.adapter.items():
        total = factors.delta()
        if name in broadcast.patch:
            f = lowrank.svd(received(broadcast, name))
            keep = max(1, lowrank.numerical_rank(f.s))
            total = LowRank(f.u[:, :keep] * f.s[:keep], f.vh[:keep])
        merged[name] = Factors(total.b, total.a, 1.0)
    return merged
