"""The small pretrained bases and the data of the embedded defaults, which ship inside the package."""

from pathlib import Path

from fedspan.support.errors import FedspanError

__all__ = ["base_path"]

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
