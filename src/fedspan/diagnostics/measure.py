"""What a server step does to its clients' updates, measured: the papers' statements as figures of every round.

`docs/diagnostics.md` says which statement each figure checks. Everything is relative; over the modules, errors are
added as energies (root of summed squares), and means are weighted by energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedspan.algebra import lowrank, subspace
from fedspan.diagnostics import gauge, spectra
from fedspan.diagnostics.changes import Change, ModuleRound, adapter_round, answers, weights_round
from fedspan.federation.rounds import Observation
from fedspan.methods.messages import Tensors
from fedspan.support import parallel

MAX_PAIRS = 32
"""Pairs of clients whose subspaces are compared: neighbours in sorted order."""

ERRORS = ("distance_from_ideal", "distance_from_innovation", "gauge_sensitivity", "cross_terms")
SHARES = ("row_space_escape", "first_a_escape")
MEANS = ("effective_rank", "stable_rank", "angle_clients_mean", "angle_consensus", "drift_mean")
MAXIMA = ("angle_clients_max", "drift_max")
BY_RANK = ("readout_loss", "truncation_loss")
FIGURES = (*ERRORS, *SHARES, *MEANS, *MAXIMA, *BY_RANK)


@dataclass(slots=True)
class _Figures:
    """One module's figures, so that they can be put together with the other modules'."""

    energies: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Squared norms: of the error or the part, and of what it is relative to."""
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Value and weight."""
    maxima: dict[str, float] = field(default_factory=dict)
    bound: bool = False

    def value(self, name: str) -> float | None:
        """The module's own figure."""
        if name in self.means:
            return self.means[name][0]
        if name in self.maxima:
            return self.maxima[name]
        part, whole = self.energies.get(name, (0.0, 0.0))
        return _ratio(part, whole, name in SHARES)


def measure(observation: Observation, base: Tensors | None = None) -> dict[str, Any]:
    """The figures of one finished round, for its record.

    Parameters
    ----------
    observation
        What `rounds.run_round` hands to an observer.
    base
        The weights that the run started from, for methods that train weights; without them what is about the whole
        change so far (ranks, drift) is none for such methods. Adapter methods need none.

    Returns
    -------
    dict
        ``{"diagnostics": figures}``: every name in `FIGURES`, a number, a mapping from rank to number, or None where
        the figure does not apply; ``worst``, the module that is worst in some of them; and
        ``effective_rank_is_bound`` where a matrix was too large for its whole spectrum.
    """
    adapter = observation.method.info.trains == "adapter"
    other = gauge.regauged(observation) if gauge.applies(observation) else None
    told = answers(observation, other)

    def one(name: str) -> _Figures:
        found = adapter_round(observation, told, name) if adapter else weights_round(observation, base, name)
        return _module(observation, found, name)

    names = _names(observation)
    return {"diagnostics": _together(dict(zip(names, parallel.ordered_map(one, names), strict=True)))}


def _names(observation: Observation) -> list[str]:
    state = observation.before
    if observation.method.info.trains == "adapter":
        return list(state.template.modules)
    named = [name for name in state.template.modules if name in state.dense]
    return named or [name for name, value in state.dense.items() if value.ndim == 2]


def _module(observation: Observation, found: ModuleRound, name: str) -> _Figures:
    """All figures of one module."""
    figures, template = _Figures(), observation.before.template
    adapter = observation.method.info.trains == "adapter"
    key = (template.seed, observation.before.round_num, name)
    rank = template.rank if adapter else min(template.rank, spectra.SKETCH_RANK)
    mean, bases = _clients(found, rank, adapter, key)  # T, and each client's column space
    total, ideal = mean.matrix(), mean.plus(found.patch)
    if not observation.method.info.personalised:
        _errors(figures, found, total, ideal.matrix())
        _readouts(figures, found, ideal, key)
    _angles(figures, bases, spectra.leading(mean.left(), rank, *key, "mean"), _energy(total))
    _change(figures, found, rank, key)
    if adapter:
        _cross_terms(figures, found, total)
        _escapes(figures, found)
    return figures


def _clients(found: ModuleRound, rank: int, adapter: bool, key: Sequence[object]) -> tuple[Change, list[Tensor]]:
    if adapter:
        pairs = [x.low for x in found.trained()]
        bases = [subspace.column_basis(x) for x in pairs[: MAX_PAIRS + 1]]
        return Change(lowrank.stack(pairs, found.shares)), bases
    total, bases = torch.zeros_like(found.landed.matrix()), []
    for k, (x, share) in enumerate(zip(found.trained(), found.shares, strict=True)):
        part = x.matrix()
        total.add_(part, alpha=share)
        if k <= MAX_PAIRS:
            bases.append(spectra.leading(part, rank, *key, k))
    return Change(found.landed.low, total), bases


def _errors(figures: _Figures, found: ModuleRound, total: Tensor, ideal: Tensor) -> None:
    """Distances from what the averaged weights would be, and from what it would be if nothing were forgotten."""
    landed = found.landed.matrix()
    figures.energies["distance_from_ideal"] = _energy(landed - ideal), _energy(ideal)
    if found.first_rows is not None and found.before is not None:
        kept = found.before.matrix() + total - found.sent.matrix()
        figures.energies["distance_from_innovation"] = _energy(landed - kept), _energy(kept)
    if found.regauged is not None:
        figures.energies["gauge_sensitivity"] = _energy(found.regauged.matrix() - landed), _energy(landed)


def _readouts(figures: _Figures, found: ModuleRound, ideal: Change, key: Sequence[object]) -> None:
    """By rank: how far a client's start is from the ideal, and how far the best adapter of that rank would be."""
    if not found.readouts:
        return
    known, whole = spectra.spectrum(ideal.left(), *key, "ideal"), ideal.matrix()
    for rank, x in found.readouts.items():
        figures.energies[f"readout_loss/{rank}"] = _energy(x.matrix() - whole), known.total
        tail = known.tail(rank)
        if tail is not None:
            figures.energies[f"truncation_loss/{rank}"] = tail, known.total


def _angles(figures: _Figures, bases: Sequence[Tensor], consensus: Tensor, weight: float) -> None:
    """Between neighbouring clients' column spaces, and from each client's to the leading directions of T."""
    pairs = spectra.degrees(list(pairwise(bases)))
    if len(pairs):
        figures.means["angle_clients_mean"] = float(pairs.mean()), weight
        figures.maxima["angle_clients_max"] = float(pairs.max())
    to_consensus = spectra.degrees([(u, consensus) for u in bases])
    if len(to_consensus) and len(bases) > 1:
        figures.means["angle_consensus"] = float(to_consensus.mean()), weight


def _change(figures: _Figures, found: ModuleRound, rank: int, key: Sequence[object]) -> None:
    """Of the whole change of the base: how many directions it has, and how far the first ones turned this round."""
    if found.before is None or found.after is None:
        return
    before, after = found.before.left(), found.after.left()
    known = spectra.spectrum(after, *key, "after")
    effective, stable = spectra.effective_rank(known), spectra.stable_rank(known)
    if effective is not None and stable is not None:
        figures.means["effective_rank"], figures.means["stable_rank"] = (effective, known.total), (stable, known.total)
        figures.bound = not known.complete
    turned = spectra.degrees([(spectra.leading(before, rank, *key, 0), spectra.leading(after, rank, *key, 1))])
    if len(turned):
        figures.means["drift_mean"] = float(turned.mean()), known.total
        figures.maxima["drift_max"] = float(turned.max())


def _cross_terms(figures: _Figures, found: ModuleRound, total: Tensor) -> None:
    """‖B̄Ā − T‖ on these very updates, B̄ = Σ p_k s_k B_k, Ā = Σ p_k A_k."""
    pairs = [(x.low, share) for x, share in zip(found.trained(), found.shares, strict=True)]
    if len({x.rank for x, _ in pairs}) == 1:
        b, a = sum(x.b * p for x, p in pairs), sum(x.a * p for x, p in pairs)
        assert isinstance(b, Tensor)
        assert isinstance(a, Tensor)
        figures.energies["cross_terms"] = _energy(b @ a - total), _energy(total)


def _escapes(figures: _Figures, found: ModuleRound) -> None:
    """Shares of the new change's energy outside two row spaces: of the change before, and of the run's first A."""
    if found.before is None or found.after is None:
        return
    after = found.after.matrix()
    if found.before.dense is None and found.before.low.rank:
        old = subspace.column_basis(found.before.low.transposed())
        if old.shape[1]:
            figures.energies["row_space_escape"] = _energy(after - (after @ old) @ old.mT), _energy(after)
    if found.first_rows is not None:
        first = torch.linalg.qr(found.first_rows.mT)[0]
        figures.energies["first_a_escape"] = _energy(after - (after @ first) @ first.mT), _energy(after)


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _ratio(part: float, whole: float, share: bool) -> float | None:
    """Part of whole, both squared norms; none where there is nothing."""
    if not whole > 0:
        return None
    return part / whole if share else (part / whole) ** 0.5


def _together(modules: Mapping[str, _Figures]) -> dict[str, Any]:
    """The modules' figures as the round's, and the module that is worst."""
    out: dict[str, Any] = {}
    for name in (*ERRORS, *SHARES):
        out[name] = _added(modules, name)
    for name in MEANS:
        values = [f.means[name] for f in modules.values() if name in f.means]
        weight = sum(w for _, w in values)
        out[name] = sum(v * w for v, w in values) / weight if weight > 0 else None
    for name in MAXIMA:
        out[name] = max((f.maxima[name] for f in modules.values() if name in f.maxima), default=None)
    for name in BY_RANK:
        ranks = {int(key.partition("/")[2]) for f in modules.values() for key in f.energies if key.startswith(name)}
        out[name] = {str(rank): _added(modules, f"{name}/{rank}") for rank in sorted(ranks)} or None
    out["worst"] = _worst(modules)
    if any(f.bound for f in modules.values()):
        out["effective_rank_is_bound"] = True
    return out


def _added(modules: Mapping[str, _Figures], name: str) -> float | None:
    pairs = [f.energies[name] for f in modules.values() if name in f.energies]
    return _ratio(sum(part for part, _ in pairs), sum(whole for _, whole in pairs), name in SHARES)


def _worst(modules: Mapping[str, _Figures]) -> dict[str, dict[str, Any]]:
    """By figure: the module with the largest error, escape or drift, and the one with the smallest rank."""
    out: dict[str, dict[str, Any]] = {}
    for name in (*ERRORS, *SHARES, "effective_rank", "drift_max"):
        values = {module: value for module, f in modules.items() if (value := f.value(name)) is not None}
        if values:
            module = (min if name == "effective_rank" else max)(values, key=lambda m: values[m])
            out[name] = {"module": module, "value": values[module]}
    return out
