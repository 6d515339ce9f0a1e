"""What a block of updates adds to a pass: the method's own sum, or the answers to its questions.

Shapes: B (m, r), A (r, n), as in `fedspan.algebra.lowrank`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedspan.methods.folds import SUM, Partial
from fedspan.methods.messages import Factors, Update
from fedspan.methods.queries import Contribution, ContributionOf, Queries, partial_sums
from fedspan.streaming.spool import is_finite
from fedspan.support.errors import FedspanError


def sum_of(updates: Sequence[Update], dense: bool) -> Partial:
    """Σ n_k · payload_k over the block and, with `dense`, Σ n_k x_k."""
    total = Partial()
    for update in updates:
        # Read once what may lie in a file.
        read = replace(update, modules=dict(update.modules), dense=dict(update.dense) if dense else {})
        values = _values(read)
        for (module, part), value in values.items():
            if not is_finite(value):
                where = f"{part} of {module}" if module else part
                raise FedspanError(f"{where} of {update.client_id} holds NaN or infinity")
        total = _added(total, read, values)
    return total


_Place = tuple[str, str]
"""(module, part of its payload), or an empty module and the name of a dense weight."""


def _added(total: Partial, update: Update, values: Mapping[_Place, Tensor]) -> Partial:
    """`SUM.add`, into the total's own tensors where nothing is to be padded: six times faster for large weights."""
    own = _own_tensors(total)
    fits = own.keys() == values.keys() and all(
        x.shape == own[place].shape and torch.promote_types(x.dtype, own[place].dtype) == own[place].dtype
        for place, x in values.items()
    )
    if not fits or total.num_clients == 0:
        return SUM.add(total, update)  # new tensors, which belong to the total; or a word on why they do not fit
    for place, x in values.items():
        own[place].add_(x, alpha=update.num_examples)
    return replace(total, num_clients=total.num_clients + 1, weight=total.weight + update.num_examples)


def _values(update: Update) -> dict[_Place, Tensor]:
    return update.named_tensors()


def _own_tensors(total: Partial) -> dict[_Place, Tensor]:
    values = {("", name): value for name, value in total.dense.items()}
    for module, parts in total.sums.items():
        values |= {(module, part): value for part, value in parts.items()}
    return values


def answers_of(
    questions: Queries,
    updates: Sequence[Update],
    contribution_of: ContributionOf,
    shapes: Mapping[str, tuple[int, int]],
    dense: bool,
) -> Partial:
    """The sums that the questions ask for, Σ n_k (…) by number of the question; with `dense`, Σ n_k x_k too.

    Parameters
    ----------
    shapes
        (m, n) of every module.
    """

    def checked_contribution(update: Update, name: str) -> Contribution:
        # Read once what may lie in a file.
        return contribution_of(replace(update, modules={name: _checked(update, name, shapes[name])}), name)

    answers = partial_sums(questions, updates, checked_contribution)
    # Contiguous, as a checkpoint gives them back: products of another layout differ in the last bits.
    sums = {name: {str(i): x.contiguous() for i, x in enumerate(values)} for name, values in answers.items()}
    heads = sum_of([replace(update, modules={}) for update in updates], dense).dense
    return Partial(len(updates), sum(float(update.num_examples) for update in updates), heads, sums)


def _checked(update: Update, name: str, shape: tuple[int, int]) -> Factors:
    if name not in update.modules:
        raise FedspanError(f"the update of {update.client_id} has no module {name}")
    factors = update.factors(name)
    for side, value in (("b", factors.b), ("a", factors.a)):
        if not is_finite(value):
            raise FedspanError(f"{side} of {name} of {update.client_id} holds NaN or infinity")
    if (factors.b.shape[0], factors.a.shape[1]) != shape:
        shapes = f"{tuple(factors.b.shape)} and {tuple(factors.a.shape)}"
        raise FedspanError(f"{update.client_id} holds {name} in shapes {shapes}: expected a product of shape {shape}")
    return factors
