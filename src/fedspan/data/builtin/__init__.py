"""The small pretrained bases and the data of the embedded defaults, which ship inside the package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fedspan.data.builtin.digits import CLASS_NAMES
from fedspan.support.errors import FedspanError

__all__ = ["CLASSES", "KINDS", "USUAL_METRICS", "base_path"]

KINDS: Mapping[str, Literal["instruction", "image"]] = {"builtin:tasks": "instruction", "builtin:digits": "image"}
"""Embedded task -> the kind of its rows."""
CLASSES: Mapping[str, tuple[str, ...]] = {"builtin:digits": CLASS_NAMES}
"""Embedded task -> the names of its classes."""
USUAL_METRICS: Mapping[str, tuple[str, ...]] = {
    "builtin:tasks": ("exact_match", "rouge_l"),
    "builtin:digits": ("accuracy",),
}
"""Embedded task -> its metrics where the settings name none."""
_BASES = ("decoder", "vit")


def base_path(name: str) -> Path:
    """Return the folder of a shipped base model, loadable with ``from_pretrained``.

    Parameters
    ----------
    name
        ``"decoder"`` (text) or ``"vit"`` (images).

    Raises
    ------
    FedspanError
        If no base of this name is shipped.
    """
    if name not in _BASES:
        raise FedspanError(f"unknown builtin base {name!r}: expected one of {', '.join(_BASES)}")
    return Path(__file__).resolve().parent / "bases" / name
