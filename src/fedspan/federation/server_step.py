"""The server's step of an exchange, guarded: either its result is a model, or there is none."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedspan.algebra.finite import is_finite
from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Diagnostics, Update
from fedspan.methods.patches import patch_tensors
from fedspan.support.errors import FedspanError, one_line

_NUMERICAL: tuple[type[Exception], ...] = (vars(torch.linalg)["LinAlgError"], ArithmeticError)
"""The errors of a decomposition that does not converge, of a singular system, and of numbers beyond all floats."""


class StepFailed(FedspanError):
    """The updates give no model; the state is as before."""


def take_step(method: Method, state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
    """Return what `method.finish` does.

    Every update was checked as it came, so that this does not fail on a single one; were it to do so all the same, the
    federation must not be left with a model that is not finite.

    Raises
    ------
    StepFailed
        When the step cannot be computed, or its result is not finite. It names the clients whose updates fail alone,
        where they are known one by one.
    """
    taken = _attempt(method, state, partial)
    if not isinstance(taken, str):
        return taken
    culprits = [u.client_id for u in partial.collected if isinstance(_attempt(method, state, _alone(partial, u)), str)]
    named = f"; so it is with the update of {', '.join(culprits)} alone" if culprits else ""
    raise StepFailed(f"the server's step {taken}{named}")


def _attempt(method: Method, state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics] | str:
    """Return the step, or what is wrong with it."""
    try:
        after, diagnostics = method.finish(state, partial)
    except _NUMERICAL as error:
        return f"cannot be computed from the updates ({one_line(error, 200)})"
    for name, value in _changed(state, after):
        if value.is_floating_point() and not is_finite(value):
            return f"gives NaN or infinity in {name}"
    return after, diagnostics


def _changed(before: ServerState, after: ServerState) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state, with names for people, that are not the ones of the state before."""
    known = {id(x) for x in (*before.dense.values(), *before.extra.values())}
    named = [*after.dense.items(), *after.extra.items()]
    named += [(f"{name}/{part}", x) for name, held in after.modules.items() for part, x in held.items()]
    if after.patches is not None and after.patches is not before.patches:
        # The total is the sum of the increments: where the newest is finite and the others were, it is too.
        newest = after.patches.increments[-1] if after.patches.increments else after.patches.total
        named += [(name, x) for name, patch in newest.items() for x in patch_tensors(patch).values()]
    yield from ((name, x) for name, x in named if id(x) not in known)


def _alone(partial: Partial, update: Update) -> Partial:
    """Return the fold of one of the collected updates, with its share of the dense weights' sum."""
    dense = {name: x * (update.num_examples / partial.weight) for name, x in partial.dense.items()}
    return Partial(1, update.num_examples, dense, collected=(update,))
