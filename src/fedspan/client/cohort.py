"""Many clients' local work in one batched pass over the base that they share.

At the sizes that are simulated on one machine a training step is hundreds of small kernels whose launch costs more
than their arithmetic. Here C clients share each launch: the frozen base sees all their rows as one batch, the
adapters are batched products (`models.stacked`), and clipping and the optimizer run on one (C, P) block. Every client
keeps its own batches, dropout, learning rate, step count, clipping and rank, so the results are those of `train` up
to the rounding of differently shaped products.

They are not the same bits: a product over the rows of several clients may add in another order than over the rows of
one. Which clients share a pass must therefore be part of what determines a run, and it is (`client.grouping`). All
random draws, in contrast, are bit for bit those of `train`: batches and dropout have one stream per client.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedspan.client.batching import autocast
from fedspan.client.device_pass import device_pass
from fedspan.client.learning_rates import has_groups
from fedspan.client.passes import Member, compute_gradients, keep_active, member, penalty_of
from fedspan.client.precision import products
from fedspan.client.training import Assignment, LocalResult, TrainingSettings, plain_optimizer, work_on
from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Recipe, Update
from fedspan.models import FederatedModel, rowwise
from fedspan.models.blocks import BLOCK_ERRORS
from fedspan.models.losses import client_losses
from fedspan.models.stacked import Stack, stacked
from fedspan.models.streams import BatchLayout, ClientDropout, NotRowwise, drops, drops_layers
from fedspan.support.errors import FedspanError, first_line


def applies(model: FederatedModel, data: Encoded, recipe: Recipe, settings: TrainingSettings) -> str | None:
    """Return why clients cannot be trained together, or None where they can."""
    return (
        _reason_in_settings(model, recipe, settings)
        or _reason_in_layers(model)
        or rowwise.reason_against(model, data, 2, 2)
        or _reason_in_a_trial(model, data, recipe, settings)
    )


def engine_of_one(model: FederatedModel, data: Encoded, recipe: Recipe, settings: TrainingSettings) -> str:
    """Return the engine for a client that works alone by this recipe: `cohort` or `sequential`.

    On a GPU a pass of one client is several times as fast, since its steps are recorded.

    Raises
    ------
    FedspanError
        When `engine.name = "cohort"` and the model or the recipe does not allow it.
    """
    name = settings.engine.name
    if recipe.gradient or name == "sequential" or (name == "auto" and model.device.type == "cpu"):
        return "sequential"
    reason = applies(model, data, recipe, settings)
    if reason is not None and name == "cohort":
        raise refusal(reason)
    return "cohort" if reason is None else "sequential"


def refusal(reason: str) -> FedspanError:
    """Return the error for a cohort that was asked for and is not possible."""
    return FedspanError(f"engine.name = 'cohort': {reason}; expected auto or sequential")


def _reason_in_settings(model: FederatedModel, recipe: Recipe, settings: TrainingSettings) -> str | None:
    reasons = (
        (bool(model.places), "the base's layers lie on several devices (engine.device_map)"),
        (model.trains != "adapter", "every client trains base weights of its own"),
        (settings.privacy.dp == "example", "every example's gradient is clipped by itself (privacy.dp)"),
        (recipe.galore is not None, "GaLore works on one client's weights"),
        (recipe.confined, "each client trains within a subspace"),
        (bool(recipe.proximal), "a proximal term pulls every client towards where it started"),
        (recipe.corrected, "each client's gradients are corrected by what it keeps"),
        (settings.local.keep_optimizer, "each client goes on with an optimizer of its own (local.keep_optimizer)"),
        (has_groups(settings.local), "some parameters have learning rates of their own"),
        (model.padding_matters, "padding changes the model's results, so that each length needs a pass of its own"),
        (settings.engine.compile, "engine.compile compiles the passes of one client"),
        (settings.engine.checkpointing, "engine.checkpointing saves memory in the passes of one client"),
        (settings.local.accumulate > 1, "local.accumulate cuts each client's batches into parts"),
    )
    return next((reason for given, reason in reasons if given), None)


def _reason_in_layers(model: FederatedModel) -> str | None:
    encoder_decoder = getattr(model.model.config, "is_encoder_decoder", False)
    if encoder_decoder and model.kind == "instruction" and drops(model.model):  # a classifier reads one text twice
        # A client's masks have the shapes of its own prompts and answers, which one layout has no two lengths for.
        return "its dropout is in an encoder and a decoder, at two lengths"
    if drops_layers(model.model):
        return "the base leaves out whole layers at random (layerdrop)"
    for name, layer in model.model.named_modules():
        # Its draws do not go through F.dropout, so that they cannot be taken from each client's own stream.
        if "DropPath" in type(layer).__name__ and vars(layer).get("drop_prob"):
            return f"{name} drops whole paths at random"
    return None


def _reason_in_a_trial(model: FederatedModel, data: Encoded, recipe: Recipe, settings: TrainingSettings) -> str | None:
    """Train two clients on a row each, with dropout, whose draws have shapes of their own."""
    rows = data.rows[[0, -1]].tolist() if len(data) > 1 else [0, 0]
    sent = Broadcast(model.adapter(), model.dense(), recipe)
    probe = Assignment("probe", sent, data.rows[rows].numpy(), 1, 1.0)
    one_row = replace(settings, local=settings.local.model_copy(update={"batch_size": 1}))
    try:
        _train_together(model, data, [probe, probe], one_row, 0)
    except NotRowwise as error:
        return str(error)
    except BLOCK_ERRORS as error:
        return f"two clients cannot be trained in one pass ({first_line(error)})"
    return None


def work(
    model: FederatedModel, data: Encoded, group: Sequence[Assignment], settings: TrainingSettings, round_num: int
) -> list[LocalResult]:
    """Do the local work of one group of `grouping.plan`, in its order."""
    # On a GPU one client alone gains too: the steps of a pass are recorded, those of `train` are not.
    shared = {"cohort": True, "auto": len(group) > 1 or model.device.type == "cuda", "sequential": len(group) > 1}
    recipe = group[0].broadcast.recipe
    with products(model, settings.engine, recipe):
        if shared[settings.engine.name] and not recipe.gradient:
            return _train_together(model, data, group, settings, round_num)
        return [work_on(model, a, data, settings, round_num) for a in group]


def _train_together(
    model: FederatedModel, data: Encoded, group: Sequence[Assignment], settings: TrainingSettings, round_num: int
) -> list[LocalResult]:
    # Optimizer and clipping of the clients' own run, which need not be that of the base that they share.
    settings = replace(settings, local=group[0].under(settings, round_num)[0].local)
    # Most steps first: the clients that are still at work are then always the leading rows of the stack, which is a
    # view, and those that have finished are cut off at its end.
    order = sorted(range(len(group)), key=lambda i: (-group[i].steps, i))
    members = [member(group[i], settings, round_num) for i in order]
    stack, totals = (_on_device if model.device.type == "cuda" else _on_cpu)(model, data, members, settings)
    steps = torch.tensor([m.assignment.steps for m in members])
    means = (totals.cpu() / steps).tolist()
    with stack.fetched():
        results = {i: _result(stack, k, members[k], means[k]) for k, i in enumerate(order)}
    return [results[i] for i in range(len(group))]


def _on_device(
    model: FederatedModel, data: Encoded, members: Sequence[Member], settings: TrainingSettings
) -> tuple[Stack, Tensor]:
    """Train with fixed shapes, recorded where that is possible; return the stack and the sums of the losses, (C,)."""
    try:
        whole = device_pass(model, members, settings, drops(model.model))
        return whole.stack, whole.run(data, members)
    except BaseException:
        model.passes.clear()  # which may be in the middle of a step
        raise


def _on_cpu(
    model: FederatedModel, data: Encoded, members: Sequence[Member], settings: TrainingSettings
) -> tuple[Stack, Tensor]:
    """Train with the shapes that the batches have; return the stack and the sums of the losses, (C,)."""
    # Decided before the layers are replaced: the adapters' own dropout is one of them.
    dropout = None
    if drops(model.model):
        dropout = ClientDropout([torch.Generator(model.device).manual_seed(m.dropout_seed) for m in members])
    with stacked(model, [m.assignment.broadcast for m in members]) as stack, model.training():
        return stack, _run_steps(model, data, members, stack, dropout, settings)


def _run_steps(
    model: FederatedModel,
    data: Encoded,
    members: Sequence[Member],
    stack: Stack,
    dropout: ClientDropout | None,
    settings: TrainingSettings,
) -> Tensor:
    """Train every member for its own number of steps; return the sums of their losses, (C,)."""
    steps = [m.assignment.steps for m in members]
    totals = torch.zeros(len(members), device=model.device)  # there, since reading a loss would wait for every step
    optimizer = _optimizer(stack, members, settings.local)
    penalty = penalty_of(stack.broadcasts, model.device)
    active = 0
    for step in range(steps[0]):
        left = sum(own > step for own in steps)
        if left != active:
            active = left
            keep_active(stack, active)
        batch, real, layout = _batch(data, members[:active], step)
        if dropout is not None:
            dropout.layout = layout
        with dropout or nullcontext(), autocast(model, settings.engine):
            moved = {name: value.to(model.device) for name, value in batch.items()}
            losses = client_losses(model, moved, active, real)
        totals[:active] += losses.detach()
        compute_gradients(stack, [losses], penalty, settings.local.clip_norm, active)
        # Set here and not by a scheduler: each group of clients is at its own place in a schedule of its own length.
        for options in optimizer.param_groups:
            options["lr"] = options["member"].rate(step)
        optimizer.step()
    return totals


def _batch(data: Encoded, members: Sequence[Member], step: int) -> tuple[dict[str, Tensor], Tensor | None, BatchLayout]:
    """Return one batch of the clients' rows, client by client and the same number for each; and which are real.

    Every layer divides its batch by the number of clients, so that a client with a smaller batch (one whose pass over
    its data ends, or who has few examples) repeats a row, which the loss then leaves out.
    """
    chosen = [m.rows[torch.as_tensor(m.schedule[step])] for m in members]
    width = max(map(len, chosen))
    counts = [len(rows) for rows in chosen]
    filled = torch.cat([torch.cat([rows, rows[:1].expand(width - len(rows))]) for rows in chosen])
    batch = data.batch(filled)
    real = None
    if min(counts) < width:
        real = (torch.arange(width) < torch.tensor(counts)[:, None]).flatten().to(batch["labels"].device)
    lengths, longest = None, 0
    if "attention_mask" in batch:
        own = data.lengths[filled].view(-1, width)
        lengths, longest = own.max(dim=1).values.tolist(), batch["attention_mask"].shape[1]
    return batch, real, BatchLayout(counts, lengths, width, longest)


def _optimizer(stack: Stack, members: Sequence[Member], local: LocalConfig) -> torch.optim.Optimizer:
    """Return an optimizer of one long parameter per client; clients of equal rates share a learning-rate schedule."""
    alike: dict[tuple[int, float, float, float], dict[str, Any]] = {}
    for row, own in zip(stack.rows, members, strict=True):
        alike.setdefault(own.rates, {"params": [], "member": own})["params"].append(row)
    return plain_optimizer(list(alike.values()), local)


def _result(stack: Stack, k: int, own: Member, loss: float) -> LocalResult:
    a = own.assignment
    rates = sum(own.rate(step) for step in range(a.steps))
    update = Update(a.client_id, a.weight, stack.adapter(k), stack.dense(k), rate_sum=rates)
    return LocalResult(update, loss, a.steps, _optimizer_bytes(a.broadcast, own.local))


def _optimizer_bytes(sent: Broadcast, config: LocalConfig) -> int:
    """Return the size of the optimizer's state of the client's own numbers, without those that pad its rank."""
    recipe = sent.recipe
    numbers = sum(t.numel() for t in sent.dense.values())
    for f in sent.adapter.values():
        numbers += recipe.train_a * f.a.numel() + recipe.train_b * f.b.numel()
    return 0 if config.optimizer == "sgd" else 2 * 4 * numbers
