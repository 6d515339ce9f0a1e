"""All methods, by name. To add one, write a file beside these and a line in `METHODS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError, validate_call

from fedspan.methods.base import Method
from fedspan.methods.controls import centralised, local
from fedspan.methods.fed_plora import fed_plora
from fedspan.methods.fed_sb import fed_sb
from fedspan.methods.fedadamw import fedadamw
from fedspan.methods.fedask import fedask
from fedspan.methods.fedgalore import fedgalore
from fedspan.methods.fedit import fedit
from fedspan.methods.fedmomentum import fedmomentum
from fedspan.methods.fedprox import fedprox
from fedspan.methods.fedrot_lora import fedrot_lora
from fedspan.methods.fedsa_lora import fedsa_lora
from fedspan.methods.fedsvd import fedsvd
from fedspan.methods.ffa_lora import ffa_lora
from fedspan.methods.flora import fedex_lora, flora
from fedspan.methods.flora_na import flora_na
from fedspan.methods.florist import florist
from fedspan.methods.full_weights import fedavg, fedftg
from fedspan.methods.glora import flexlora, glora
from fedspan.methods.glora_plus import glora_plus
from fedspan.methods.glora_sums import glora_sums
from fedspan.methods.hetlora import hetlora
from fedspan.methods.lora_fair import lora_fair, lora_fair_ridge
from fedspan.methods.option_docs import MethodOption, options_of
from fedspan.methods.raflora import raflora
from fedspan.methods.ravan import ravan
from fedspan.methods.rolora import rolora
from fedspan.methods.scaffold import scaffold
from fedspan.methods.server_optimizers import fedadagrad, fedadam, fedavgm, fedyogi
from fedspan.methods.shared_galore import shared_galore
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

__all__ = ["METHODS", "MethodOption", "create", "options"]

METHODS: Mapping[str, Callable[..., Method]] = {
    "glora": glora,
    "glora_plus": glora_plus,
    "glora_sums": glora_sums,
    "flexlora": flexlora,
    "fedask": fedask,
    "raflora": raflora,
    "flora": flora,
    "florist": florist,
    "fedex_lora": fedex_lora,
    "fedmomentum": fedmomentum,
    "fedsvd": fedsvd,
    "fed_sb": fed_sb,
    "ravan": ravan,
    "ffa_lora": ffa_lora,
    "rolora": rolora,
    "hetlora": hetlora,
    "fed_plora": fed_plora,
    "lora_fair": lora_fair,
    "lora_fair_ridge": lora_fair_ridge,
    "flora_na": flora_na,
    "fedrot_lora": fedrot_lora,
    "fedit": fedit,
    "fedsa_lora": fedsa_lora,
    "fedftg": fedftg,
    "shared_galore": shared_galore,
    "fedgalore": fedgalore,
    "fedadamw": fedadamw,
    "fedavg": fedavg,
    "fedprox": fedprox,
    "scaffold": scaffold,
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "local": local,
    "centralised": centralised,
}
"""Name -> factory: rules on products first, then averages of factors, then of weights, then the controls."""


def create(name: str, **options: Any) -> Method:
    """Make the method of that name: ``create("glora", server_rank=32)``, or ``create(**config.method)``.

    The string "none" stands for `None`, because TOML and the command line have no null.

    Raises
    ------
    FedspanError
        For an unknown name, an unknown option (naming the nearest valid one), or a value out of range.
    """
    factory = _factory(name)
    known = inspect.signature(factory).parameters
    for key in options:
        if key not in known:
            valid = nearest(key, known) if known else f"; {name} has no options"
            raise FedspanError(f"unknown key 'method.{key}' for {name}{valid}")
    try:
        return validate_call(factory)(**{key: None if value == "none" else value for key, value in options.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"][:1])
        message = problem["msg"].removeprefix("Value error, ")
        prefix = "" if message.startswith("method.") else f"method.{key} = {problem['input']!r}: "
        raise FedspanError(prefix + message) from None


def options(name: str) -> list[MethodOption]:
    """Return the options of a method in the order of its signature, with types, defaults and meanings.

    Raises
    ------
    FedspanError
        When there is no method of that name.
    """
    _factory(name)
    return options_of(name, METHODS)


def _factory(name: str) -> Callable[..., Method]:
    if not isinstance(name, str) or name not in METHODS:
        raise FedspanError(f"unknown method {name!r}{nearest(str(name), METHODS)}")
    return METHODS[name]
