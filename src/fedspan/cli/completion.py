"""Shell completion of method names and settings. Heavy imports wait until a name is completed."""

from __future__ import annotations


def method_names(incomplete: str) -> list[str]:
    """Return the methods whose names begin so."""
    from fedspan.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def settings(incomplete: str) -> list[str]:
    """Return the settings whose keys begin so, ready for a value; after `method.name=`, the methods."""
    key, separator, value = incomplete.partition("=")
    if separator:
        return [f"{key}={name}" for name in method_names(value)] if key == "method.name" else []
    from fedspan.config import Config, valid_keys

    sections = set(Config.model_fields)
    keys = [key for key in valid_keys() if "." in key or key not in sections]
    keys += ["seed", "device", "threads", "method.name"]
    return [f"{key}=" for key in keys if key.startswith(incomplete)]


def method_options(incomplete: str) -> list[str]:
    """Return the options of methods whose names begin so, ready for a value."""
    from fedspan import methods

    names = {option.name for name in methods.METHODS for option in methods.options(name)}
    return [f"{name}=" for name in sorted(names) if name.startswith(incomplete)]
