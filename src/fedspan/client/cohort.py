"""Many clients' local work in one batched pass over the base that they share.

At the sizes that are simulated on one machine a training step is hundreds of small kernels whose launch costs more
than their arithmetic. Here C clients share each launch: the frozen base sees all their rows as one batch, the
adapters are batched products (`models.stacked`), and clipping and the optimizer run on one (C, P) block. Every client
keeps its own batches, dropout, learning rate, step count, clipping and rank, so the results are those of `train` up
to the rounding of differently shaped products.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedspan.client.training import Assignment, LocalResult, autocast, batches, plain_optimizer, rate, work_on
from fedspan.config import Config, LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Recipe, Tensors, Update
from fedspan.methods.patches import patch_tensors
from fedspan.models import FederatedModel
from fedspan.models.losses import client_losses
from fedspan.models.stacked import Stack, head_layers, stacked
from fedspan.models.streams import ClientDropout, NotRowwise, Rows, drops
from fedspan.support.seeding import generator

WIDEST = 2**17
"""Tokens of one client's step times the model's hidden size. Above it a pass of its own is as fast; below it as many
clients share a pass as together reach it, for then their activations still lie in the cache (measured on a CPU)."""
_MOST = 16
_SHARES = 4
"""Groups that the clients of a round are cut into where they are many, so that as many processes can share it."""


def applies(model: FederatedModel, data: Encoded, recipe: Recipe, config: Config) -> str | None:
    """Why clients cannot be trained together, or none.

    Tried on two rows of the data, because whether a layer keeps the batch's rows apart is nowhere written.
    """
    if model.trains != "adapter":
        return "every client trains base weights of its own"
    if config.privacy.dp == "example":
        return "every example's gradient is clipped by itself (privacy.dp)"
    if recipe.galore is not None:
        return "GaLore works on one client's weights"
    if recipe.confined:
        return "what a client trains is confined to a subspace"
    if recipe.proximal:
        return "a proximal term holds every client to where it started"
    if config.engine.compile:
        return "engine.compile compiles one client's passes"
    try:
        head_layers(model)
    except ValueError as error:
        return str(error)
    for name, layer in model.model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            return f"{name} mixes the rows of a batch"
        if "DropPath" in type(layer).__name__ and vars(layer).get("drop_prob"):
            return f"{name} drops whole paths at random"
    rows = data.rows[[0, -1]].tolist() if len(data) > 1 else [0, 0]
    probe = Assignment("probe", _as_it_stands(model, recipe), data.rows[rows].numpy(), 1, 1.0)
    try:
        local = config.local.model_copy(update={"batch_size": 1})
        _train_together(model, data, [probe, probe], config.model_copy(update={"local": local}), 0)
    except NotRowwise as error:
        return str(error)
    return None


def _as_it_stands(model: FederatedModel, recipe: Recipe) -> Broadcast:
    return Broadcast(model.adapter(), model.dense(), recipe)


def plan(model: FederatedModel, data: Encoded, assignments: Sequence[Assignment], config: Config) -> list[list[int]]:
    """Which assignments are worked on together: positions in `assignments`, the costliest group first.

    Depends on the work and the settings alone, never on how many processes share it. Clients of about as many steps
    and about as long rows go together, so that little is padded.
    """
    positions = _positions(model, data)
    tokens = [_tokens(data, a, config.local) * positions for a in assignments]
    cost = [a.steps * size for a, size in zip(assignments, tokens, strict=True)]
    most = {"sequential": 0, "cohort": max(tokens), "auto": WIDEST // _hidden(model)}[config.engine.name]
    # A gradient of the base is one client's own pass.
    most_of = [0 if a.broadcast.recipe.gradient else most for a in assignments]
    small = [i for i in range(len(assignments)) if tokens[i] <= most_of[i]]
    groups = [[i] for i in range(len(assignments)) if tokens[i] > most_of[i]]
    if small:
        size = _cohort_size(model, [assignments[i] for i in small], [tokens[i] for i in small], config)
        groups += _alike(assignments, tokens, small, size)
    return sorted(groups, key=lambda group: (-sum(cost[i] for i in group), group[0]))


def _alike(
    assignments: Sequence[Assignment], tokens: Sequence[int], chosen: Sequence[int], size: int
) -> list[list[int]]:
    """The chosen ones in groups of at most `size` that can share a pass."""
    groups: list[list[int]] = []
    for i in sorted(chosen, key=lambda i: (-assignments[i].steps, -tokens[i], i)):
        first = assignments[groups[-1][0]] if groups else None
        if first is None or len(groups[-1]) == size or not _together(first.broadcast, assignments[i].broadcast):
            groups.append([])
        groups[-1].append(i)
    return groups


def work(
    model: FederatedModel, data: Encoded, group: Sequence[Assignment], config: Config, round_num: int
) -> list[LocalResult]:
    """The local work of one group of `plan`, in its order."""
    asked = group[0].broadcast.recipe
    if (len(group) > 1 or config.engine.name == "cohort") and not asked.gradient:
        return _train_together(model, data, group, config, round_num)
    return [work_on(model, a, data, config, round_num) for a in group]


def _tokens(data: Encoded, assignment: Assignment, config: LocalConfig) -> int:
    """Tokens of the client's largest batch, padding counted; images of an image batch."""
    longest = int(data.subset(assignment.rows).lengths.max())
    return min(config.batch_size, len(assignment.rows)) * longest


def _positions(model: FederatedModel, data: Encoded) -> int:
    """What one row of an image batch is to the model: a sequence of so many patches."""
    if data.pixels is None:
        return 1
    height, width = data.pixels.shape[-2:]
    patch = getattr(model.model.config, "patch_size", 16)
    side = patch if isinstance(patch, int) else max(patch)
    return max(1, (height // side) * (width // side))


def _hidden(model: FederatedModel) -> int:
    """The width at which most of the model works."""
    return min((n for _, n in model.modules().values()), default=1)


def _together(x: Broadcast, y: Broadcast) -> bool:
    """Whether two clients can share a pass: the same parts trained, the same patch on the base."""
    same_parts = (x.recipe.train_a, x.recipe.train_b) == (y.recipe.train_a, y.recipe.train_b)
    penalised = (x.recipe.tail_penalty is None) == (y.recipe.tail_penalty is None)
    return same_parts and penalised and _same_patch(x, y)


def _same_patch(x: Broadcast, y: Broadcast) -> bool:
    if x.patch is y.patch or x.patch.keys() != y.patch.keys():
        return x.patch is y.patch
    return all(_same_tensors(patch_tensors(x.patch[name]), patch_tensors(y.patch[name])) for name in x.patch)


def _same_tensors(x: Tensors, y: Tensors) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def _cohort_size(
    model: FederatedModel, assignments: Sequence[Assignment], tokens: Sequence[int], config: Config
) -> int:
    if config.engine.cohort_size != "auto":
        return config.engine.cohort_size
    per_client = max(_bytes(model, a.broadcast, size) for a, size in zip(assignments, tokens, strict=True))
    fits = max(1, int(config.engine.memory * 2**30 / per_client))
    if model.device.type != "cpu":
        return fits
    count = len(assignments)
    shared = max(2, -(-count // _SHARES), min(4, -(-count // 2)))
    cached = max(2, WIDEST // (max(tokens) * _hidden(model)))
    return min(fits, shared, cached, _MOST)


def _bytes(model: FederatedModel, broadcast: Broadcast, tokens: int) -> int:
    """What one client adds to a pass: its numbers four times (gradients, Adam's moments), its activations."""
    numbers = sum(f.a.numel() + f.b.numel() for f in broadcast.adapter.values())
    numbers += sum(t.numel() for t in broadcast.dense.values())
    # Each linear layer keeps its input, and what follows keeps about as much again as its output.
    activations = tokens * sum(m * 2 + n for m, n in model.modules().values())
    return 4 * (4 * numbers + activations)


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """One client of a pass."""

    assignment: Assignment
    rows: Tensor
    schedule: Sequence[Sequence[int]]
    """Positions in `rows`, step by step."""
    dropout: torch.Generator


def _member(model: FederatedModel, a: Assignment, local: LocalConfig, key: tuple[object, ...]) -> _Member:
    schedule = list(batches(len(a.rows), local.batch_size, a.steps, generator(*key, a.client_id, "batches")))
    dropout = torch.Generator(model.device).manual_seed(generator(*key, a.client_id, "dropout").initial_seed())
    return _Member(a, torch.as_tensor(a.rows), schedule, dropout)


def _train_together(
    model: FederatedModel, data: Encoded, group: Sequence[Assignment], config: Config, round_num: int
) -> list[LocalResult]:
    # Those with most steps first: whoever has finished leaves the pass at its end.
    order = sorted(range(len(group)), key=lambda i: (-group[i].steps, i))
    members = [_member(model, group[i], config.local, (config.seed, round_num)) for i in order]
    steps = [m.assignment.steps for m in members]
    totals = torch.zeros(len(members), device=model.device)
    # Asked before the layers are replaced: the adapters' own dropout is one of them.
    mode = ClientDropout([m.dropout for m in members]) if drops(model.model) else None
    with stacked(model, [m.assignment.broadcast for m in members]) as stack, model.training():
        optimizer = _optimizer(stack, steps, config.local)
        active = 0
        for step in range(steps[0]):
            left = sum(own > step for own in steps)
            if left != active:
                active = left
                stack.activate(active)
                for row in stack.rows[active:]:
                    row.grad = None  # or momentum would carry it further
            batch, real, parts = _batch(data, members[:active], step)
            if mode is not None:
                mode.batch = parts
            with mode or nullcontext(), autocast(model, config):
                moved = {name: value.to(model.device) for name, value in batch.items()}
                losses = client_losses(model, moved, active, real)
            totals[:active] += losses.detach()
            _gradients(stack, losses, config.local)
            for settings in optimizer.param_groups:
                settings["lr"] = rate(config.local, step, settings["steps"])
            optimizer.step()
        means = (totals.cpu() / torch.tensor(steps)).tolist()
        results = {i: _result(stack, k, group[i], means[k], config.local) for k, i in enumerate(order)}
    return [results[i] for i in range(len(group))]


def _batch(data: Encoded, members: Sequence[_Member], step: int) -> tuple[dict[str, Tensor], Tensor | None, Rows]:
    """One batch of the clients' rows, client by client and the same number for each; which of them are real."""
    chosen = [m.rows[torch.as_tensor(m.schedule[step])] for m in members]
    width = max(map(len, chosen))
    counts = [len(rows) for rows in chosen]
    # A client with fewer rows repeats one of its own, which then counts for nothing.
    filled = torch.cat([torch.cat([rows, rows[:1].expand(width - len(rows))]) for rows in chosen])
    batch = data.batch(filled)
    real = None
    if min(counts) < width:
        real = (torch.arange(width) < torch.tensor(counts)[:, None]).flatten().to(batch["labels"].device)
    lengths, longest = None, 0
    if "attention_mask" in batch:
        own = data.lengths[filled].view(-1, width)
        lengths, longest = own.max(dim=1).values.tolist(), batch["attention_mask"].shape[1]
    return batch, real, Rows(counts, lengths, width, longest)


def _gradients(stack: Stack, losses: Tensor, local: LocalConfig) -> None:
    """Every client's own gradients, clipped by its own norm."""
    active = len(losses)
    total = losses.sum()
    penalties = [b.recipe.tail_penalty for b in stack.broadcasts[:active]]
    if penalties[0] is not None:
        strengths, tails = zip(*(p for p in penalties if p is not None), strict=True)
        total = total + (stack.tail_penalties(tails) * total.new_tensor(strengths)).sum()
    assert stack.trained.grads is not None
    grads = stack.trained.grads[:active]  # (C, P)
    grads.zero_()
    torch.autograd.backward(total)
    stack.gather_gradients()
    if local.clip_norm is not None:
        norms = torch.linalg.vector_norm(grads, dim=1)
        grads.mul_((local.clip_norm / (norms + 1e-6)).clamp_(max=1.0)[:, None])


def _optimizer(stack: Stack, steps: Sequence[int], local: LocalConfig) -> torch.optim.Optimizer:
    """One long parameter per client; clients of as many steps share a learning rate schedule."""
    groups = [
        {"params": [row for row, own in zip(stack.rows, steps, strict=True) if own == count], "steps": count}
        for count in sorted(set(steps), reverse=True)
    ]
    return plain_optimizer(groups, local)


def _result(stack: Stack, k: int, a: Assignment, loss: float, config: LocalConfig) -> LocalResult:
    rates = sum(rate(config, step, a.steps) for step in range(a.steps))
    update = Update(a.client_id, a.weight, stack.adapter(k), stack.dense(k), rate_sum=rates)
    return LocalResult(update, loss, a.steps, _optimizer_bytes(a.broadcast, config))


def _optimizer_bytes(sent: Broadcast, config: LocalConfig) -> int:
    """Of the client's own numbers: those that pad it to the widest of its pass are not its own."""
    recipe = sent.recipe
    numbers = sum(t.numel() for t in sent.dense.values())
    for f in sent.adapter.values():
        numbers += recipe.train_a * f.a.numel() + recipe.train_b * f.b.numel()
    return 0 if config.optimizer == "sgd" else 2 * 4 * numbers
