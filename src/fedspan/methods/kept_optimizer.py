"""A method whose clients keep the state of their local optimizer from one of their rounds to the next."""

from __future__ import annotations

from dataclasses import replace

from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, ClientState, Tensors, Update

_PREFIX = "optimizer:"
"""No module or weight has such a name, so that the method's own state cannot be mistaken for an optimizer's."""


def with_kept_optimizer(method: Method) -> Method:
    """Return the method with the local optimizer's state in what a client keeps, beside the method's own.

    It is thus treated as every state of a client is: stored on the site where there is one, in the checkpoint where
    clients are simulated, and set back with an answer that was not counted. A client that was away for some rounds
    continues from the state that it left. Nothing of it is ever sent.

    Source: the public code of FedFTG (2410.23111), whose clients' optimizers live through all aggregations.
    """

    def start(sent: Broadcast, kept: ClientState | None) -> Broadcast:
        own, optimizer = _parted(kept)
        return replace(method.start(sent, own), optimizer=optimizer)

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        own, before = _parted(kept)
        answer, own = method.encode(replace(update, optimizer={}), sent, own)
        # Over the old ones: a tensor that was not trained in this round keeps its moments.
        held = {**before, **update.optimizer}
        return answer, {**(own or {}), **{f"{_PREFIX}{name}": value for name, value in held.items()}}

    return replace(method, start=start, encode=encode)


def _parted(kept: ClientState | None) -> tuple[ClientState | None, Tensors]:
    """Return the method's own state, none where it has none, and the optimizer's."""
    held = kept or {}
    own = {name: value for name, value in held.items() if not name.startswith(_PREFIX)}
    optimizer = {name.removeprefix(_PREFIX): value for name, value in held.items() if name.startswith(_PREFIX)}
    return own or None, optimizer
