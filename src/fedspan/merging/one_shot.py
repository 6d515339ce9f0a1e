"""One-shot merging: a method's server rule applied once to PEFT adapter folders from anywhere.

Shapes: B (m, r), A (r, n) per module; p_k = w_k / Σ w; T = Σ p_k s_k B_k A_k, the true average, is what
averaging the fine-tuned models' weights would give.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedspan.adapters.compatibility import Missing, check_compatible
from fedspan.adapters.lora_config import CARRIED
from fedspan.adapters.peft_folder import check_free, load, save
from fedspan.adapters.state_dict import Adapter
from fedspan.merging.alignment import check_missing, filled, of_base
from fedspan.merging.labels import Entries, as_file, common_labels
from fedspan.merging.merge_report import MergeReport, Tally
from fedspan.merging.parts import common_config, delta_of, frozen_weights, largest_rank, mean_delta, whole_weights
from fedspan.merging.task_rules import TASK_RULES, TaskRule, combine_tasks, create_rule
from fedspan.methods import METHODS, create
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Factors, Request, Template, Update
from fedspan.methods.readout import received
from fedspan.support import parallel
from fedspan.support.errors import FedspanError
from fedspan.support.scalars import whole

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LEAST, _MOST = 1e-15, 1e15  # of a weight; float32 must hold its product with an entry


def merge(
    folders: Sequence[str | os.PathLike[str]],
    method: Method | TaskRule | str,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    missing: Missing = "refuse",
    dtype: str | None = None,
    full: bool = False,
) -> MergeReport:
    """Merge PEFT LoRA folders by the server rule of `method` and write the result as one PEFT folder.

    Parameters
    ----------
    method
        A method, or the name of one whose options are left at their defaults; or one of `TASK_RULES` (TIES, DARE,
        magnitude pruning, by PEFT's functions).
    weights
        One positive weight per folder, such as its number of examples; none: equal.
    rank
        The largest rank that may be written; none: the rank that holds the whole result.
    out
        A new or empty folder; it is written whole or not at all.
    base
        The base's name or folder, for adapters that have several names for it; none: the name that all of them have.
    missing
        `refuse` adapters of which some lack a module or a whole weight; `zero`: an adapter without a module leaves it
        as it is in the base, and whole weights are averaged over the adapters that have them.
    dtype
        Type of the written floats, `float32`, `bfloat16` or `float16`; none: as they come out, and for a whole model
        as the base's files have it.
    full
        Write the base with the result in its weights, as transformers saves a model, in place of an adapter.

    Raises
    ------
    FedspanError
        See `combine`, `fedspan.adapters.peft_folder.load` and `fedspan.merging.full_model.write_model`; or `out` is not
        empty; or the folders hold other label names.
    """
    if isinstance(folders, str | os.PathLike):
        raise FedspanError(f"folders = {os.fspath(folders)!r}: expected a list of folders")
    rule = named_rule(method) if isinstance(method, str) else method
    target, kind = Path(out), _dtype(dtype)
    check_free(target)
    check_missing(missing)
    _check_arguments(len(folders), rule, weights, rank)
    names = [str(folder) for folder in folders]
    labels = common_labels([Path(folder) for folder in folders])
    adapters = of_base([load(Path(folder)) for folder in folders], None if base is None else os.fspath(base))
    if missing == "zero":
        adapters = filled(adapters, weights or [1.0] * len(adapters))
    if isinstance(rule, TaskRule):
        result, report = combine_tasks(adapters, rule, weights=weights, rank=rank, labels=names)
    else:
        result, report = combine(adapters, rule, weights=weights, rank=rank, names=names)
    _write(target, result, kind, full, labels)
    return report.written_as(kind, full)


def named_rule(name: str, **options: Any) -> Method | TaskRule:
    """Return the method, or the rule of `TASK_RULES`, of this name and these options.

    Raises
    ------
    FedspanError
        For an unknown name or option.
    """
    return create_rule(name, **options) if name in TASK_RULES else create(name, **options)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise FedspanError(f"dtype = {name!r}: expected one of {', '.join(_DTYPES)}")
    return None if name is None else _DTYPES[name]


def _write(target: Path, result: Adapter, dtype: torch.dtype | None, full: bool, labels: Entries | None) -> None:
    """Write the result as an adapter, or its base with it as a model."""
    if full:
        from fedspan.merging.full_model import write_model

        write_model(target, result, dtype, labels)
        return
    config = result.config
    save(
        target,
        result.factors,
        base_model=config["base_model_name_or_path"],
        task_type=config["task_type"],
        dense=result.dense,
        modules_to_save=result.modules_to_save,
        fan_in_fan_out=config["fan_in_fan_out"],
        embeddings=result.embeddings,
        frozen=result.frozen,
        carried={key: config[key] for key in CARRIED if key in config},
        dtype=dtype,
        stacks=result.stacks,
        target_parameters=config.get("target_parameters") or (),
        labels=None if labels is None else as_file(labels),
    )


def combine(
    adapters: Sequence[Adapter],
    method: Method,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Adapter, MergeReport]:
    """Merge adapters that are in memory.

    Every adapter counts as the update of one client in a first round. The model that a client would receive next,
    adapter plus patch on its base, is joined into one pair per module by the QR core, and cut to `rank`
    by its SVD: the best approximation of that rank (Eckart and Young 1936), however the method serves
    smaller clients.

    Each scaling is folded into its B first, so the method sees a common scaling of 1. Methods that work
    on products cannot tell. FedIT averages B without its scaling; with one scaling s in a module, s·B̄Ā =
    (Σ p_k s B_k)·Ā, so folding changes nothing there either, and modules may differ from each other. With
    several scalings in one module its result would depend on which factor holds them, and it is refused.
    FedEx-LoRA's means and residual add up to T however the factors are split, so there folding is always
    right.

    Methods that freeze A are allowed where all adapters have the same A, bit for bit (a smaller one being
    the first rows of the larger): then that A is used.

    Parameters
    ----------
    names
        The adapters' names in messages; none: their numbers.

    Raises
    ------
    FedspanError
        For a method that cannot merge in one shot, or not these adapters, naming those that can; for weights
        or a rank out of range; for adapters of different bases, modules, shapes or heads, naming the adapter.
    """
    _check_arguments(len(adapters), method, weights, rank)
    labels = [f"adapter {i}" for i in range(len(adapters))] if names is None else list(names)
    check_compatible(labels, adapters)
    template, state = _start(labels, adapters, method)
    sent = method.broadcast(state, Request(rank=None))
    counts = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    updates = [method.encode(update, sent, None)[0] for update in _updates(adapters, counts)]
    with parallel.threads(os.cpu_count() or 1):
        state, diagnostics = aggregate(method, state, updates)
    answer = method.broadcast(state, Request(rank=None))
    shares = [count / math.fsum(counts) for count in counts]
    tally = Tally(rank, largest_rank(adapters))
    factors = {
        name: tally.fit(name, received(answer, name), mean_delta(adapters, shares, name)) for name in template.modules
    }
    dense = whole_weights(labels, adapters, answer.dense)
    first = adapters[0]
    config, frozen = common_config(adapters), frozen_weights(adapters)
    result = Adapter(factors, dense, config, first.embeddings, frozen, first.stacks)
    return result, tally.report(method.info.name, shares, len(dense), diagnostics)


def _why_not(method: Method) -> str | None:
    """Return why the method cannot merge adapters once; none where it can."""
    if method.info.pooled:
        return "pools the data and aggregates nothing"
    if method.info.personalised:
        return "leaves each client a model of its own"
    if method.info.trains != "adapter":
        return "averages weights, not adapters"
    if len(method.exchanges) != 1:
        return f"needs {len(method.exchanges)} exchanges with its clients"
    if method.broadcast(method.init(Template({}, 1), {}), Request(rank=None)).recipe.confined:
        return "trains cores between bases of its own, which no adapter from elsewhere has"
    return None


def _freezes_a(method: Method) -> bool:
    state = method.init(Template({"probe": (1, 1)}, 1), {})
    return not method.broadcast(state, Request(rank=None)).recipe.train_a


def _able(hetero_rank: bool = False) -> str:
    """Return the names of the methods that can merge any adapters, or any of mixed ranks."""
    methods = {name: factory() for name, factory in METHODS.items()}
    return ", ".join(
        name
        for name, method in methods.items()
        if _why_not(method) is None and not _freezes_a(method) and (method.info.hetero_rank or not hetero_rank)
    )


def _check_arguments(number: int, method: Method | TaskRule, weights: Sequence[float] | None, rank: int | None) -> None:
    if not isinstance(method, TaskRule) and (reason := _why_not(method)) is not None:
        raise FedspanError(f"{method.info.name} {reason}: expected a method that can merge: {_able()}")
    if number == 0:
        raise FedspanError("no adapter to merge: expected at least one folder")
    if rank is not None:
        whole("rank", rank, 1)
    if weights is not None:
        _check_weights(number, weights)


def _check_weights(number: int, weights: Sequence[float]) -> None:
    if len(weights) != number:
        raise FedspanError(f"{len(weights)} weights for {number} adapters: expected one each")
    for weight in weights:
        if not _LEAST <= weight <= _MOST:
            raise FedspanError(f"weight {weight}: expected a finite number above 0, between {_LEAST:g} and {_MOST:g}")


def _start(labels: Sequence[str], adapters: Sequence[Adapter], method: Method) -> tuple[Template, ServerState]:
    """Return the template, with a common scaling of 1, and the state before the round."""
    info, frozen_a = method.info, _freezes_a(method)
    shapes = {name: f.delta().shape for name, f in adapters[0].factors.items()}
    ranks = {name: [adapter.factors[name].rank for adapter in adapters] for name in shapes}
    if not info.hetero_rank:
        _check_alike(labels, adapters, method, ranks)
    size = max(max(r) for r in ranks.values())
    if info.exact and info.hetero_rank and not frozen_a:
        size = max(size, _union_rank(shapes, ranks))
    template = Template(shapes, size, alpha=float(size))
    state = method.init(template, adapters[0].dense)
    return template, _with_common_a(adapters, method, state) if frozen_a else state


def _union_rank(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, list[int]]) -> int:
    """Return a server rank that is exact: all that the clients' column spaces span together.

    The rank of T does not suffice: it is at most n where n < m, and a projector of that rank would lose some.
    """
    return max(min(max(m, n), sum(ranks[name])) for name, (m, n) in shapes.items())


def _check_alike(
    labels: Sequence[str], adapters: Sequence[Adapter], method: Method, ranks: Mapping[str, list[int]]
) -> None:
    """Refuse mixed ranks, or mixed scalings in a module, where the method's result would depend on them."""
    _check_one(labels, method.info.name, "rank", ranks)
    if not method.info.exact:
        scalings = {name: [adapter.factors[name].scaling for adapter in adapters] for name in ranks}
        _check_one(labels, method.info.name, "scaling", scalings)


def _check_one(labels: Sequence[str], name: str, what: str, values: Mapping[str, Sequence[float]]) -> None:
    for module, given in values.items():
        for label, value in zip(labels, given, strict=True):
            if not math.isclose(value, given[0], rel_tol=1e-9):
                found = f"{module} has {given[0]:g} in {labels[0]} and {value:g} in {label}"
                able = _able(hetero_rank=True)
                raise FedspanError(f"{name} needs one {what} per module; {found}: expected one of {able}")


def _with_common_a(adapters: Sequence[Adapter], method: Method, state: ServerState) -> ServerState:
    """Return the state with the A that all adapters share, in place of a drawn one."""
    size = state.template.rank
    modules = dict(state.modules)
    differ = []
    for name, kept in state.modules.items():
        all_a = [delta_of(adapter.factors[name]).a for adapter in adapters]
        largest = max(all_a, key=len)
        if not all(torch.equal(a, largest[: len(a)]) for a in all_a):
            differ.append(name)
        modules[name] = {
            **kept,
            "a": torch.cat([largest, largest.new_zeros((size - len(largest), largest.shape[1]))]),
        }
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise FedspanError(
            f"{method.info.name} averages B for one frozen A, but lora_A is not the same in all adapters for "
            f"{', '.join(differ[:3])}{more}: expected a method that can merge them: {_able(hetero_rank=True)}"
        )
    return replace(state, modules=modules)


def _updates(adapters: Sequence[Adapter], counts: Sequence[float]) -> list[Update]:
    # The padded index is the client's id, so that clients are folded in the order of the folders.
    return [_update(f"{i:06d}", x, count) for i, (x, count) in enumerate(zip(adapters, counts, strict=True))]


def _update(client_id: str, adapter: Adapter, count: float) -> Update:
    """Return the adapter as a client's update: scaling 1, and one rank for all its modules, as in a federation."""
    rank = max(f.rank for f in adapter.factors.values())
    modules = {}
    for name, f in adapter.factors.items():
        x = delta_of(f)
        b = torch.cat([x.b, x.b.new_zeros((x.shape[0], rank - x.rank))], dim=1)
        a = torch.cat([x.a, x.a.new_zeros((rank - x.rank, x.shape[1]))], dim=0)
        modules[name] = Factors(b, a, 1.0)
    dense = {name: tensor for name, tensor in adapter.dense.items() if tensor.is_floating_point()}
    return Update(client_id, count, modules, dense)
