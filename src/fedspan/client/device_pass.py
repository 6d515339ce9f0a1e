"""A cohort's steps on a GPU: fixed shapes, recorded as CUDA graphs and replayed without Python in between.

A step of a small model is hundreds of kernels, each of which takes less time than Python needs to launch it. Here a
whole step (forward, backward, clipping, optimizer) is one launch: the first step of a shape runs as it is, the second
is recorded, and every later one is replayed over the same memory with other numbers in it. Lengths of rows, numbers
of answer tokens and of clients that still have steps are rounded up to a few sizes, so that few shapes occur; a group
of the same size in a later round finds its recordings again. Nothing is read back from the device before the last
step. Where a step cannot be recorded, all of them run as they are, and a warning says why.

The code is the same on a CPU, where nothing is recorded: there it serves to be tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedspan.client.passes import Member, Penalty, compute_gradients, keep_active, penalty_of
from fedspan.client.training import TrainingSettings, autocast, rate
from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel
from fedspan.models.counted_dropout import CountedDropout, step_seeds
from fedspan.models.losses import fixed_shape_batch, fixed_shape_losses
from fedspan.models.stacked import Stack, build_stack
from fedspan.support.errors import first_line

_HELD = 4
"""Passes of different kinds whose recordings are kept; the least recently used one goes."""

_ALIGN = 32
"""Numbers: 128 bytes, what a GPU reads at once."""

Shape = tuple[int, ...]
"""Clients, and then the sizes of all inputs: everything that a recording depends on."""


def rounded_up(size: int, finest: int = 8) -> int:
    """Return the next of the few sizes that occur: multiples of `finest`, further on four to a power of two."""
    step = max(finest, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step


@dataclass(slots=True)
class DevicePass:
    """The passes of all groups of one kind and size over one model."""

    model: FederatedModel
    settings: TrainingSettings
    stack: Stack
    optimizer: torch.optim.Optimizer
    rates: Tensor  # (1,) for all clients, or (C,)
    totals: Tensor  # (C,)
    seeds: Tensor | None  # (C, 2) int64; None where nothing drops
    penalty: Penalty | None
    records: bool
    """Steps are recorded."""
    inputs: dict[Shape, dict[str, Tensor]] = field(default_factory=dict)
    graphs: dict[Shape, Any] = field(default_factory=dict)
    stream: Any = None
    pool: Any = None

    @classmethod
    def create(
        cls,
        model: FederatedModel,
        broadcasts: Sequence[Broadcast],
        settings: TrainingSettings,
        *,
        equal_steps: bool,
        drops: bool,
    ) -> DevicePass:
        """Return a pass for clients like these.

        Parameters
        ----------
        equal_steps
            All clients of a group have the same number of steps, and so the same learning rates.
        drops
            The model drops something in training.
        """
        count, device = len(broadcasts), model.device
        stack = build_stack(model, broadcasts, align=_ALIGN)
        rates = torch.zeros(1 if equal_steps else count, device=device)
        rows = [stack.rows] if equal_steps else [[row] for row in stack.rows]
        groups = [{"params": own, "lr": lr} for own, lr in zip(rows, rates.unbind(), strict=True)]
        return cls(
            model=model,
            settings=settings,
            stack=stack,
            optimizer=_optimizer(groups, settings.local, device),
            rates=rates,
            totals=torch.zeros(count, device=device),
            seeds=torch.zeros(count, 2, dtype=torch.int64, device=device) if drops else None,
            penalty=penalty_of(broadcasts, device),
            # A patched layer may have new memory, or a hook of its own, in every round.
            records=device.type == "cuda" and not broadcasts[0].patch,
            stream=torch.cuda.Stream(device) if device.type == "cuda" else None,  # type: ignore[no-untyped-call]
            pool=torch.cuda.graph_pool_handle() if device.type == "cuda" else None,
        )

    def start(self, broadcasts: Sequence[Broadcast]) -> None:
        """Begin again from other starting points, with a new optimizer's state, in the same memory."""
        self.model.apply_patch(broadcasts[0].patch)
        for parameter in self.model.model.parameters():
            parameter.requires_grad_(False)
        self.stack.fill(broadcasts)
        penalty = penalty_of(broadcasts, self.model.device)
        if penalty is not None and self.penalty is not None:
            for own, new in zip(self.penalty, penalty, strict=True):
                own.copy_(new)
        state = [t for held in self.optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]
        for tensor in (self.totals, *state):
            tensor.zero_()

    def run(self, data: Encoded, members: Sequence[Member]) -> Tensor:
        """Train the members, those with most steps first; return the sums of their steps' losses, (C,)."""
        plan = _Plan.of(data, members, self.settings.local, self.model.device, len(self.rates), self.seeds is not None)
        with self.stack.inserted(), self.model.training(), self._on_own_stream():
            active = 0
            for step in range(len(plan.counts)):
                if plan.active[step] != active:
                    active = plan.active[step]
                    keep_active(self.stack, active)
                self.rates.copy_(plan.rates[step])
                if self.seeds is not None:
                    self.seeds.copy_(plan.seeds[step])
                self._do(self._place(plan.batch(step, active), active), active)
        return self.totals

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """Work on the stream that is recorded, in order with what was and will be launched elsewhere."""
        if self.stream is None:
            yield
            return
        before = torch.cuda.current_stream(self.model.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            yield
        before.wait_stream(self.stream)

    def _place(self, batch: dict[str, Tensor], active: int) -> Shape:
        """Copy a batch to where steps of its shape read it; return the shape."""
        shape = (active, *(size for value in batch.values() for size in value.shape))
        device = self.model.device
        if shape not in self.inputs:
            self.inputs[shape] = {name: torch.empty_like(value, device=device) for name, value in batch.items()}
        for name, own in self.inputs[shape].items():
            # From page-locked memory Python need not wait for the copy, which waits for the step before.
            value = batch[name] if self.stream is None else batch[name].pin_memory()
            own.copy_(value, non_blocking=True)
        return shape

    def _do(self, shape: Shape, active: int) -> None:
        """Do a step with the batch that was placed."""
        if not self.records or shape not in self.graphs:
            # The first of its shape as it is: libraries choose and compile their kernels, which cannot be recorded.
            self._step(self.inputs[shape], active)
            self.graphs[shape] = None
            return
        if self.graphs[shape] is None:
            self.graphs[shape] = self._recorded(shape, active)
        if self.graphs[shape] is None:
            self._step(self.inputs[shape], active)
        else:
            self.graphs[shape].replay()

    def _recorded(self, shape: Shape, active: int) -> Any:
        """Return the recording of a step, or None where that is impossible; either way the step is not done yet."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self._step(self.inputs[shape], active)
        except RuntimeError as error:
            self.records = False
            warnings.warn(
                f"training steps are launched one kernel at a time, which is slower: this model's cannot be recorded "
                f"as a CUDA graph ({first_line(error)})",
                stacklevel=2,
            )
            return None
        return graph

    def _step(self, inputs: dict[str, Tensor], active: int) -> None:
        dropout: AbstractContextManager[Any] = nullcontext()
        if self.seeds is not None:
            dropout = CountedDropout(self.seeds[:active])
        with dropout, autocast(self.model, self.settings.engine):
            losses = fixed_shape_losses(self.model, inputs)
        self.totals[:active] += losses.detach()
        compute_gradients(self.stack, losses, self.penalty, self.settings.local.clip_norm)
        self.optimizer.step()


def device_pass(
    model: FederatedModel, members: Sequence[Member], settings: TrainingSettings, drops: bool
) -> DevicePass:
    """Return a pass that starts from where these members do: a new one, or one whose recordings fit them."""
    broadcasts = [m.assignment.broadcast for m in members]
    equal_steps = len({m.assignment.steps for m in members}) == 1
    key = (_kind(broadcasts), equal_steps, drops, settings.local, settings.engine)
    held: dict[Any, DevicePass] = model.passes
    if broadcasts[0].patch:
        # A recording reads the memory of the untouched base: under a patch there is none, and none is to be found.
        return DevicePass.create(model, broadcasts, settings, equal_steps=equal_steps, drops=drops)
    found = held.pop(key, None)
    if found is None:
        found = DevicePass.create(model, broadcasts, settings, equal_steps=equal_steps, drops=drops)
    else:
        found.start(broadcasts)
    held[key] = found
    while len(held) > _HELD:
        del held[next(iter(held))]
    return found


def _kind(broadcasts: Sequence[Broadcast]) -> tuple[Any, ...]:
    """Return what must be equal for two groups to be trained in the same memory."""
    ranks = [max(b.adapter[name].rank for b in broadcasts) for name in broadcasts[0].adapter]
    recipe = broadcasts[0].recipe
    return (len(broadcasts), *ranks, recipe.train_a, recipe.train_b, recipe.tail_penalty is None)


def _optimizer(groups: list[dict[str, Any]], local: LocalConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of `plain_optimizer` with learning rates and step counts on the device."""
    if local.optimizer == "sgd":
        return torch.optim.SGD(groups, weight_decay=local.weight_decay, fused=True)
    on_device = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, weight_decay=local.weight_decay, fused=True, capturable=on_device)
    # It would warn that its steps are not recorded, of the first of each shape.
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


@dataclass(slots=True)
class _Plan:
    """The batches and rates of all steps of a group, known before the first of them."""

    data: Encoded
    lengths: Tensor  # (N,) tokens of every row
    rows: Tensor  # (S, C, b); a client with fewer rows or steps repeats one
    counts: Tensor  # (S, C) real rows
    active: list[int]
    """Clients in the pass, step by step: those with steps left, rounded up."""
    rates: Tensor  # (S, 1) or (S, C), on the device
    seeds: Tensor  # (S, C, 2), on the device

    @classmethod
    def of(
        cls,
        data: Encoded,
        members: Sequence[Member],
        local: LocalConfig,
        device: torch.device,
        num_rates: int,
        drops: bool,
    ) -> _Plan:
        num_steps, count = members[0].assignment.steps, len(members)
        width = max(len(m.schedule[0]) for m in members)
        rows = torch.stack([m.rows[:1] for m in members]).expand(num_steps, count, width).clone()
        counts = torch.zeros(num_steps, count, dtype=torch.int64)
        for k, m in enumerate(members):
            filled = [[*own, *[own[0]] * (width - len(own))] for own in m.schedule]
            rows[: len(filled), k] = m.rows[torch.tensor(filled)]
            counts[: len(filled), k] = torch.tensor([len(own) for own in m.schedule])
        left = (counts > 0).sum(dim=1).tolist()
        own_steps = [m.assignment.steps for m in members[:num_rates]]
        rates = [[rate(local, s, own) if s < own else 0.0 for own in own_steps] for s in range(num_steps)]
        seeds = [step_seeds(m.dropout_seed, num_steps) for m in members] if drops else []
        return cls(
            data,
            data.lengths,
            rows,
            counts,
            [min(count, rounded_up(number, 1)) for number in left],
            torch.tensor(rates, device=device),
            torch.tensor(seeds, dtype=torch.int64).transpose(0, 1).to(device) if drops else torch.empty(0),
        )

    def batch(self, step: int, active: int) -> dict[str, Tensor]:
        """Return one step's batch of the first clients, on the CPU."""
        rows = self.rows[step, :active].flatten()
        texts = self.data.texts
        longest = int(self.lengths[rows].max())
        length = min(rounded_up(longest), int(self.lengths.max()))
        pad = texts.pad if texts is not None else 0
        return fixed_shape_batch(self.data.batch(rows), self.counts[step, :active], length, pad, rounded_up)
