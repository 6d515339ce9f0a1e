"""One pass over a real row before anything is trained, to learn how a base uses its layers.

It shows that the base can be computed at all, which linear layers are called and which are only read as weights, and
whether padding changes a row's results.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.data.rows import Kind
from fedspan.models.padding import padding_changes, prompt_padding_changes
from fedspan.support.errors import FedspanError, first_line

_READ = "is read as a weight by the model, so that an adapter beside it has no effect"


@dataclass(frozen=True, slots=True)
class Trial:
    """The way in which a base computes a row."""

    read_as_weights: Mapping[str, str] = field(default_factory=dict)
    """Layers whose weight the model reads without ever calling them -> what that means."""
    unused: frozenset[str] = frozenset()
    """Layers that are neither called nor read."""
    padding_matters: bool = False
    """Padding behind a row changes its results."""
    prompt_padding_matters: bool = False
    """Padding before a prompt changes what is generated after it."""


@dataclass(slots=True)
class _Use:
    """The use of one layer in a pass."""

    called: bool = False
    read: bool = False
    inside: int = 0
    """Calls of the layer that are under way, which read its own weight."""


def try_row(
    name: str, kind: Kind, base: nn.Module, layers: Mapping[str, nn.Module], row: Mapping[str, Tensor], pad: int
) -> Trial:
    """Compute a row and see how the base does it.

    Parameters
    ----------
    name
        The base's, for the message.
    row
        A batch of one row, as the model's `forward` takes it, on its device; labels are left out.
    pad
        The padding token of text.

    Raises
    ------
    FedspanError
        When the model cannot compute the row.
    """
    inputs: dict[str, Any] = {key: value for key, value in row.items() if key != "labels"}
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = False
    try:
        with torch.no_grad(), _watched(layers) as uses:
            base(**inputs)
        text, continued = "input_ids" in inputs, kind == "instruction" and "decoder_input_ids" not in inputs
        behind = text and padding_changes(base, inputs, pad, masked=not continued)
        before = text and continued and prompt_padding_changes(base, inputs, pad)
    except Exception as error:  # whatever a model's own code raises
        raise FedspanError(
            f"model.name = {name!r}: it cannot compute an example of this data ({first_line(error)}); "
            f"expected a base for data of this kind and size"
        ) from None
    read = {key: _READ for key, use in uses.items() if use.read and not use.called}
    unused = frozenset(key for key, use in uses.items() if not use.read and not use.called)
    return Trial(read, unused, behind, before)


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, _Use]]:
    """Note for each layer whether it is called, and whether its weight is read from outside it."""
    uses = {name: _Use() for name in layers}
    own = {name: type(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.__class__ = _watching(own[name], uses[name])
        yield uses
    finally:
        for name, layer in layers.items():
            layer.__class__ = own[name]


def _watching(kind: type[nn.Module], use: _Use) -> type[nn.Module]:
    """Return a class that behaves as `kind` and notes its use; parameters are read through `__getattr__`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        use.called = True
        use.inside += 1
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            use.inside -= 1

    def __getattr__(self: Any, name: str) -> Any:
        use.read |= name == "weight" and not use.inside
        return kind.__getattr__(self, name)

    return type(kind.__name__, (kind,), {"forward": forward, "__getattr__": __getattr__})
