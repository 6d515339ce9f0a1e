"""The sums over one block of updates in a pass: the method's own, or the results of its queries.

Shapes: B (m, r), A (r, n), as in `fedspan.algebra.lowrank`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.finite import is_finite
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import ProductSums
from fedspan.methods.folds import SUM, Partial, Place
from fedspan.methods.messages import Factors, Tensors, Update
from fedspan.methods.products import add_products, product_of
from fedspan.methods.queries import Contribution, ContributionOf, Queries, partial_sums
from fedspan.support.errors import FedspanError


def sum_of(updates: Sequence[Update], dense: bool) -> Partial:
    """Return Σ n_k · payload_k over the block and, with `dense`, Σ n_k x_k."""
    total = Partial()
    for update in updates:
        # Every access may read a file again, so each tensor is read here, once.
        read = replace(update, modules=dict(update.modules), dense=dict(update.dense) if dense else {})
        values = read.named_tensors()
        for (module, part), value in values.items():
            if not is_finite(value):
                where = f"{part} of {module}" if module else part
                raise FedspanError(f"{where} of {update.client_id} holds NaN or infinity")
        total = SUM.add_in_place(total, read)
    return total


def products_of(
    products: ProductSums, updates: Sequence[Update], shapes: Mapping[str, tuple[int, int]], dense: bool
) -> Partial:
    """Return Σ n_k s_k B_k A_k over the block, with the sums of the factors where the method asks for them."""
    held: dict[str, Tensors] = {}
    sums: dict[str, dict[str, Tensor]] = {}
    kinds: dict[Place, torch.dtype] = {}
    for name, shape in shapes.items():
        for update in updates:
            # Every access may read a file again, so the factors are read here, once.
            x = products.term(replace(update, modules={name: _checked(update, name, shape)}), name)
            term = product_of(x, update.num_examples)
            held[name] = add_products(held[name], term) if name in held else term
            if products.factors:
                _add_factors(sums.setdefault(name, {}), x, update.num_examples)
                kinds |= {(name, part): lowrank.promote(x.b).dtype for part in "ab"}
    heads = sum_of([replace(update, modules={}) for update in updates], dense)
    return replace(heads, sums=sums, product_sums=held, kinds={**heads.kinds, **kinds}, joined=None)


def _add_factors(total: dict[str, Tensor], x: LowRank, count: float) -> None:
    for part, value in (("b", x.b), ("a", x.a)):
        term = value.double() * count
        if part in total and total[part].shape != term.shape:
            raise FedspanError(f"factors of ranks {total[part].shape} and {tuple(term.shape)}: expected one rank")
        total[part] = total[part] + term if part in total else term


def results_of(
    queries: Queries,
    updates: Sequence[Update],
    contribution_of: ContributionOf,
    shapes: Mapping[str, tuple[int, int]],
    dense: bool,
) -> Partial:
    """Return the sums that the queries ask for, Σ n_k (…) by number of the query; with `dense`, Σ n_k x_k too.

    Parameters
    ----------
    shapes
        (m, n) of every module.
    """

    def checked_contribution(update: Update, name: str) -> Contribution:
        # Every access may read a file again, so the factors are read here, once.
        return contribution_of(replace(update, modules={name: _checked(update, name, shapes[name])}), name)

    results = partial_sums(queries, updates, checked_contribution)
    # Contiguous, as a checkpoint restores them: products of another memory layout differ in the last bits.
    sums = {name: {str(i): x.contiguous() for i, x in enumerate(values)} for name, values in results.items()}
    heads = sum_of([replace(update, modules={}) for update in updates], dense)
    return replace(heads, sums=sums, joined=None)


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
