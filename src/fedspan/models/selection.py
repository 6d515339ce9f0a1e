"""The layers that get adapters and the modules that are trained whole, as the settings name them, with PEFT's rules.

Differences from PEFT: a name, pattern or layer number that matches nothing is refused, not passed over.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import regex
from torch import nn

from fedspan.adapters.state_dict import is_saved
from fedspan.config.values import PATTERN_SIGNS
from fedspan.models.layers import is_conv1d, shape_of
from fedspan.support.errors import FedspanError

ALL_LINEAR = "all-linear"
Wanted = str | tuple[str, ...]
"""A regular expression that matches a whole name, or name endings."""
_SECONDS = 2.0
"""Time that one pattern may take over all names of a model: those who write it need not be those whose machine it runs
on, and some patterns take longer than the age of the universe."""
_LONGEST = 1000
"""Characters of a pattern."""
_MOST_REPEATS = 10_000
"""Product of all the numbers of repetitions in a pattern: compiling it writes nested repetitions out."""
_NO_ADAPTER: Mapping[str, frozenset[str]] = {
    kind: frozenset({"out_proj", "conv1d"}) for kind in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
}
"""Layers that PEFT refuses to adapt, by the model's type: their fused kernels read the weight alone."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The settings that choose layers, as PEFT's configuration names them."""

    target_modules: Wanted = (ALL_LINEAR,)
    exclude_modules: Wanted = ()
    layers: tuple[int, ...] | None = None
    """PEFT's `layers_to_transform`."""
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    """Parameters that hold several experts in one tensor."""

    @property
    def all_linear(self) -> bool:
        """True where the choice is left to the package."""
        return self.target_modules in ((ALL_LINEAR,), ALL_LINEAR)


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers that get adapters, and those that `all-linear` left out."""

    layers: Mapping[str, nn.Module]
    """In the model's order."""
    left_out: Mapping[str, str]
    """Layer -> the reason."""


def select(
    base: nn.Module, selection: Selection, beside: Collection[str], min_rank: int, unadaptable: Mapping[str, str]
) -> Targets:
    """Return the linear layers that the settings choose.

    Parameters
    ----------
    beside
        Modules that are trained whole, and have no adapters inside.
    min_rank
        The rank that a layer must be able to hold; 0: any will do.
    unadaptable
        Layers on which an adapter would have no effect -> the reason.

    Raises
    ------
    FedspanError
        When a name, a pattern or a layer's number matches nothing, or a layer that is named cannot be adapted.
    """
    linear = linear_layers(base, beside)
    if selection.target_parameters and selection.target_modules == ():
        return Targets({}, {})
    if not linear:
        raise FedspanError("adapter.target_modules: this model has no linear layer beside its head")
    chosen = list(linear) if selection.all_linear else _matching("target_modules", selection.target_modules, linear)
    if selection.exclude_modules:
        excluded = set(_matching("exclude_modules", selection.exclude_modules, linear))
        chosen = [name for name in chosen if name not in excluded]
    if selection.layers is not None:
        chosen = _in_layers(chosen, selection.layers, linear)
    reasons = {
        name: why for name in chosen if (why := _reason(base, name, linear[name], beside, min_rank, unadaptable))
    }
    if reasons and not selection.all_linear:
        name, why = next(iter(reasons.items()))
        m, n = shape_of(linear[name])
        if why == _too_small(m, n, min_rank):
            raise _above_all({name: linear[name]}, min_rank)
        raise FedspanError(f"adapter.target_modules: {name} {why}; expected other layers, or adapter.exclude_modules")
    kept = {name: linear[name] for name in chosen if name not in reasons}
    if not kept and chosen and all("too small" in why for why in reasons.values()):
        raise _above_all({name: linear[name] for name in chosen}, min_rank)
    if not kept:
        left = f" ({_listed(reasons)})" if reasons else ""
        raise FedspanError(f"adapter.target_modules: no layer is left to adapt{left}")
    return Targets(kept, reasons)


def linear_layers(base: nn.Module, beside: Collection[str]) -> dict[str, nn.Module]:
    """Return every linear layer except the output layer and those inside the modules `beside`."""
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None  # type: ignore[operator]
    return {
        name: layer
        for name, layer in base.named_modules()
        if (isinstance(layer, nn.Linear) or is_conv1d(layer)) and layer is not output and not within(name, beside)
    }


def within(name: str, modules: Iterable[str]) -> bool:
    """Return whether it is one of the modules, or inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def saved_modules(base: nn.Module, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that are trained whole besides the heads: those whose names end in one of `wanted`.

    A weight that a module shares is trained in all of them, so the module that the base lists it under is one too.

    Raises
    ------
    FedspanError
        When a name matches no module with floating-point weights of its own.
    """
    names = {n: m for n, m in base.named_modules() if n and any(p.is_floating_point() for p in m.parameters())}
    chosen: list[str] = []
    for end in wanted:
        found = [name for name in names if ends_in(name, end)]
        if not found:
            raise FedspanError(f"adapter.modules_to_save: {end!r} matches no module with weights{_known(names)}")
        chosen += found
    outer = [name for name in dict.fromkeys(chosen) if not within(name.rpartition(".")[0], chosen)]
    listed = {id(p): name.rpartition(".")[0] for name, p in base.named_parameters()}
    owners = {listed[id(p)] for name in outer for p in names[name].parameters()}
    outer += [owner for owner in owners if not within(owner, outer)]
    return tuple(name for name in names if name in outer)


def left_out_line(left_out: Mapping[str, str]) -> str:
    """Return one line on the layers that `all-linear` left out."""
    return f"all-linear leaves out {len(left_out)} of the linear layers: {_listed(left_out)}"


def unused_line(unused: Iterable[str]) -> str:
    """Return one line on target modules that an example of the data does not reach."""
    names = without_numbers(unused)
    return f"an example of this data does not reach {names}: adapter.exclude_modules leaves such layers out"


def without_numbers(names: Iterable[str]) -> str:
    """Return names in one line, those of repeated blocks once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))


def _listed(reasons: Mapping[str, str]) -> str:
    """Return the layers grouped by reason."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(why, []).append(name)
    return "; ".join(f"{without_numbers(names)} ({why})" for why, names in groups.items())


def _reason(
    base: nn.Module,
    name: str,
    layer: nn.Module,
    beside: Collection[str],
    min_rank: int,
    unadaptable: Mapping[str, str],
) -> str | None:
    """Return why the layer cannot be adapted, or None."""
    if name in unadaptable:
        return unadaptable[name]
    if is_saved(f"{name}.weight", tuple(beside)):
        return "has a name that PEFT takes for that of a module that is trained whole"
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if min_rank and name.rpartition(".")[2] in _NO_ADAPTER.get(str(kind), ()):
        return "is read as a weight by the model's fused kernels, and PEFT adapts none such"
    m, n = shape_of(layer)
    if min_rank > min(m, n):
        return _too_small(m, n, min_rank)
    return None


def _above_all(layers: Mapping[str, nn.Module], rank: int) -> FedspanError:
    """Return the error of a rank that none of these layers can hold, naming the largest."""
    name = max(layers, key=lambda one: min(shape_of(layers[one])))
    m, n = shape_of(layers[name])
    return FedspanError(f"rank {rank} is above what {name} ({m}×{n}) can hold: expected at most {min(m, n)}")


def _too_small(m: int, n: int, rank: int) -> str:
    return f"is {m}×{n}, too small for rank {rank}"


def _matching(setting: str, wanted: Wanted, linear: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers that a pattern or a list of name endings matches.

    Raises
    ------
    FedspanError
        When the pattern is none, takes too long or matches nothing, or a name ending matches nothing.
    """
    if isinstance(wanted, str):
        found = _full_matches(setting, wanted, linear)
        if not found:
            raise FedspanError(f"adapter.{setting}: {wanted!r} matches no linear layer as a whole{_known(linear)}")
        return found
    if not wanted:
        raise FedspanError(f"adapter.{setting} is empty: expected name endings, or {ALL_LINEAR}")
    for end in wanted:
        if not any(ends_in(name, end) for name in linear):
            hint = "; a regular expression is a string, not in a list" if is_pattern(end) else ""
            raise FedspanError(f"adapter.{setting}: {end!r} matches no linear layer{_known(linear)}{hint}")
    return [name for name in linear if any(ends_in(name, end) for end in wanted)]


def is_pattern(text: str) -> bool:
    """Return whether a string is a regular expression and no name: it has a sign that names do not have."""
    return any(sign in text for sign in PATTERN_SIGNS)


def _full_matches(setting: str, pattern: str, names: Iterable[str]) -> list[str]:
    if len(pattern) > _LONGEST:
        raise FedspanError(f"adapter.{setting}: the pattern has {len(pattern)} characters, expected up to {_LONGEST}")
    counts = [int(number) for number in re.findall(r"[{,](\d+)(?=[,}])", pattern)]
    if math.prod(max(1, count) for count in counts) > _MOST_REPEATS:
        raise FedspanError(f"adapter.{setting}: {pattern!r} repeats too much; expected at most {_MOST_REPEATS} in all")
    try:
        re.compile(pattern)  # PEFT's own: a pattern that only the other library knows is refused
        compiled = regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise FedspanError(f"adapter.{setting}: {pattern!r} is no regular expression ({error})") from None
    found, left = [], _SECONDS
    for name in names:
        began = time.monotonic()
        try:
            if compiled.fullmatch(name, timeout=left):
                found.append(name)
        except TimeoutError:
            left = 0.0
        left -= time.monotonic() - began
        if left <= 0:
            raise FedspanError(
                f"adapter.{setting}: {pattern!r} takes over {_SECONDS:g} s to match; expected a simpler one"
            )
    return found


def _in_layers(chosen: Sequence[str], layers: Sequence[int], linear: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers inside the numbered blocks, by the first number in their names (as PEFT's)."""
    known = sorted({number for name in linear if (number := _number(name)) is not None})
    missing = sorted(set(layers) - set(known))
    if missing:
        have = f"has {known[0]} to {known[-1]}" if known else "has no numbered layers"
        raise FedspanError(f"adapter.layers: {missing[0]} is no layer of this model, which {have}")
    return [name for name in chosen if _number(name) in layers]


def _number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _known(names: Iterable[str]) -> str:
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    return f"; this model has {', '.join(endings)}"


def ends_in(name: str, end: str) -> bool:
    """Return whether the name is `end`, or ends in it behind a dot."""
    return name == end or name.endswith("." + end)
