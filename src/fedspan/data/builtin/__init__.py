"""What ships inside the package: small pretrained bases and the generated data of the embedded defaults."""

from pathlib import Path

from fedspan.support.errors import FedspanError

_BASES = ("decoder", "vit")


def base_path(name: str) -> Path:
    """Folder of a shipped base model, loadable with ``from_pretrained``.

    Parameters
    ----------
    name
        ``"decoder"`` (text) or ``"vit"`` (images).

    Raises
    ------
    ValueError
        If `name` is no shipped base.
    """
    if name not in _BASES:
        raise FedspanError(f"unknown builtin base {name!r}: expected one of {', '.join(_BASES)}")
    return Path(__file__).resolve().parent / "bases" / name
