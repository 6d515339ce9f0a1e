"""A cohort's steps on a GPU: fixed shapes, recorded as CUDA graphs and replayed without Python in between.

A step of a small model is hundreds of kernels, each of which takes less time than Python needs to launch it. Here a
whole step (forward, backward, clipping, optimizer) is one launch: the first step of a shape runs as it is, the second
is recorded, and every later one is replayed over the same memory with other numbers in it. Few shapes occur
(`client.step_plan`), and a group of the same size in a later round finds its recordings again. Nothing is read back
from the device before the last step. Where a step cannot be recorded, all of them run as they are, and a warning says
why.

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

from fedspan.client.batching import autocast
from fedspan.client.passes import Member, Penalty, compute_gradients, keep_active, penalty_of
from fedspan.client.sizes import hidden
from fedspan.client.step_plan import NUMBERS, StepPlan
from fedspan.client.training import TrainingSettings, shared_part
from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel
from fedspan.models.counted_dropout import CountedDropout
from fedspan.models.losses import fixed_shape_losses
from fedspan.models.stacked import Stack, build_stack
from fedspan.support.errors import first_line

_HELD = 4
"""Passes of different kinds whose recordings are kept; the least recently used one goes."""

_ALIGN = 32
"""Numbers: 128 bytes, what a GPU reads at once."""

Shape = tuple[int, ...]
"""Clients, and then the sizes of all inputs: everything that a recording depends on."""


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
    inputs: dict[Shape, list[dict[str, Tensor]]] = field(default_factory=dict)
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
        equal_rates: bool,
        drops: bool,
    ) -> DevicePass:
        """Return a pass for clients like these.

        Parameters
        ----------
        equal_rates
            All clients of a group have the same number of steps and the same learning rates.
        drops
            The model drops something in training.
        """
        count, device = len(broadcasts), model.device
        stack = build_stack(model, broadcasts, align=_ALIGN)
        rates = torch.zeros(1 if equal_rates else count, device=device)
        rows = [stack.rows] if equal_rates else [[row] for row in stack.rows]
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
        plan = StepPlan.of(data, members, hidden=hidden(self.model))
        rates = plan.rates(len(self.rates)).to(self.model.device)
        seeds = None if self.seeds is None else plan.seeds().to(self.model.device)
        with self.stack.inserted(), self.model.training(), self._on_own_stream():
            active = 0
            for step in range(len(plan.counts)):
                if plan.active[step] != active:
                    active = plan.active[step]
                    keep_active(self.stack, active)
                self.rates.copy_(rates[step])
                if self.seeds is not None and seeds is not None:
                    self.seeds.copy_(seeds[step])
                self._do(self._place(plan.batches(step), active), active)
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

    def _place(self, batches: list[dict[str, Tensor]], active: int) -> Shape:
        """Copy a step's batches to where steps of their shapes read them; return the shape."""
        shape = (active, *(size for batch in batches for value in batch.values() for size in value.shape))
        device = self.model.device
        if shape not in self.inputs:
            self.inputs[shape] = [
                {name: torch.empty_like(value, device=device) for name, value in batch.items()} for batch in batches
            ]
        for batch, held in zip(batches, self.inputs[shape], strict=True):
            for name, own in held.items():
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

    def _step(self, batches: list[dict[str, Tensor]], active: int) -> None:
        parts = self._losses(batches, active)
        compute_gradients(self.stack, parts, self.penalty, self.settings.local.clip_norm, active)
        self.optimizer.step()

    def _losses(self, batches: list[dict[str, Tensor]], active: int) -> Iterator[Tensor]:
        """Yield the parts of the clients' losses, batch by batch."""
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != NUMBERS}
            dropout: AbstractContextManager[Any] = nullcontext()
            if self.seeds is not None:
                dropout = CountedDropout(self.seeds[:active], batch[NUMBERS])
            with dropout, autocast(self.model, self.settings.engine):
                losses = fixed_shape_losses(self.model, inputs)
            self.totals[:active] += losses.detach()
            yield losses


def device_pass(
    model: FederatedModel, members: Sequence[Member], settings: TrainingSettings, drops: bool
) -> DevicePass:
    """Return a pass that starts from where these members do: a new one, or one whose recordings fit them."""
    broadcasts = [m.assignment.broadcast for m in members]
    equal_rates = len({m.rates for m in members}) == 1
    key = (_kind(broadcasts), equal_rates, drops, shared_part(settings.local), settings.engine)
    held: dict[Any, DevicePass] = model.passes
    if broadcasts[0].patch:
        # A recording reads the memory of the untouched base: under a patch there is none, and none is to be found.
        return DevicePass.create(model, broadcasts, settings, equal_rates=equal_rates, drops=drops)
    found = held.pop(key, None)
    if found is None:
        found = DevicePass.create(model, broadcasts, settings, equal_rates=equal_rates, drops=drops)
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
