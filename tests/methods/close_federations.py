"""Federations whose clients' factors are close to common ones, for rules that start from the mean of the factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from federations import Array, Dense, Federation, array, build, received, served, weighted_sum
from hypothesis import settings
from hypothesis import strategies as st

from fedspan.methods import fedit
from fedspan.methods.base import Method
from fedspan.methods.messages import Factors

laws = settings(deadline=None, max_examples=15, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
SAME: dict[str, Any] = {"shapes": ((12, 10), (9, 14)), "ranks": (3, 3, 3), "counts": (5, 1, 30)}


def close(seed: int, spread: float, method: Method, **options: Any) -> Federation:
    """Clients whose factors differ from common ones by `spread`, as after some local steps."""
    fed = build(method, seed, **{**SAME, **options})
    common = build(method, seed + 1, **{**SAME, **options}).updates[0]
    updates = []
    for update in fed.updates:
        modules = {}
        for name in update.modules:
            f, base = update.factors(name), common.factors(name)
            modules[name] = Factors(base.b + spread * f.b, base.a + spread * f.a, f.scaling)
        updates.append(replace(update, modules=modules))
    return replace(fed, updates=tuple(updates))


def mean(fed: Federation, name: str, part: str) -> Array:
    return weighted_sum(fed, lambda u: array(getattr(u.factors(name), part)))


def fedit_of(fed: Federation) -> Dense:
    plain = replace(fed, method=fedit(), state=fedit().init(fed.template, fed.state.dense))
    return received(plain, served(plain)[0])
