"""Measurements of what a server step does to its clients' updates: the papers' statements as figures of every round.

`docs/diagnostics.md` lists the statement that each figure checks. Everything is relative; over the modules, errors are
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
from fedspan.diagnostics.changes import Change, ModuleRound, adapter_round, readouts_of, weights_round
from fedspan.federation.rounds import Observation
from fedspan.methods.messages import Tensors
from fedspan.support import parallel

MAX_PAIRS = 32
"""Most pairs of clients whose subspaces are compared; the pairs are neighbours in sorted order."""

ERRORS = ("distance_from_ideal", "distance_from_innovation", "gauge_sensitivity", "cross_terms")
"""Figures that are a norm relative to another norm."""
SHARES = ("row_space_escape", "first_a_escape")
"""Figures that are a share of an energy."""
MEANS = ("effective_rank", "stable_rank", "angle_clients_mean", "angle_consensus", "drift_mean")
"""Figures whose mean over the modules is taken, weighted by energy."""
MAXIMA = ("angle_clients_max", "drift_max")
"""Figures whose largest value over the modules is taken."""
BY_RANK = ("readout_loss", "truncation_loss")
"""Figures with a value for every rank, relative norms as in `ERRORS`."""
FIGURES = (*ERRORS, *SHARES, *MEANS, *MAXIMA, *BY_RANK)
"""All names of figures."""


@dataclass(slots=True)
class _Figures:
    """One module's figures, in the form in which they are combined with the other modules'."""

    energies: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> squared norms: of the error or the part, and of what it is relative to."""
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> value and weight."""
    maxima: dict[str, float] = field(default_factory=dict)
    """Name -> value."""
    bound: bool = False
    """The effective rank is a lower bound."""

    def value(self, name: str) -> float | None:
        """Return the module's own figure; none where it does not apply."""
        if name in self.means:
            return self.means[name][0]
        if name in self.maxima:
            return self.maxima[name]
        part, whole = self.energies.get(name, (0.0, 0.0))
        return _ratio(part, whole, name in SHARES)


def measure(observation: Observation, base: Tensors | None = None) -> dict[str, Any]:
    """Return the figures of one finished round, for its record.

    Parameters
    ----------
    observation
        What `rounds.conduct` hands to an observer.
    base
        The weights that the run started from, for methods that train weights; without them the figures about the whole
        change so far (ranks, drift) are None for such methods. Adapter methods need none.

    Returns
    -------
    dict
        ``{"diagnostics": figures}``: every name in `FIGURES`, a number, a mapping from rank to number, or None where
        the figure does not apply; ``worst``, the module that is worst in some of them; and
        ``effective_rank_is_bound`` where a matrix was too large for its whole spectrum.
    """
    adapter = observation.method.info.trains == "adapter"
    other = gauge.regauged(observation) if gauge.applies(observation) else None
    readouts = readouts_of(observation, other)

    def one(name: str) -> _Figures:
        module = adapter_round(observation, readouts, name) if adapter else weights_round(observation, base, name)
        return _module(observation, module, name)

    names = _names(observation)
    return {"diagnostics": _combined(dict(zip(names, parallel.ordered_map(one, names), strict=True)))}


def _names(observation: Observation) -> list[str]:
    """Return the modules to measure: the adapted ones, or else every trained matrix."""
    state = observation.before
    if observation.method.info.trains == "adapter":
        return list(state.template.modules)
    named = [name for name in state.template.modules if name in state.dense]
    return named or [name for name, value in state.dense.items() if value.ndim == 2]


def _module(observation: Observation, module: ModuleRound, name: str) -> _Figures:
    """Return all figures of one module."""
    figures, template = _Figures(), observation.before.template
    adapter = observation.method.info.trains == "adapter"
    key = (template.seed, observation.before.round_num, name)
    rank = template.rank if adapter else min(template.rank, spectra.SKETCH_RANK)
    mean, bases = _clients(module, rank, adapter, key)
    total, ideal = mean.matrix(), mean.plus(module.patch)
    if not observation.method.info.personalised:
        _errors(figures, module, total, ideal.matrix())
        _readouts(figures, module, ideal, key)
    _angles(figures, bases, spectra.leading(mean.left(), rank, *key, "mean"), _energy(total))
    _change(figures, module, rank, key)
    if adapter:
        _cross_terms(figures, module, total)
        _escapes(figures, module)
    return figures


def _clients(module: ModuleRound, rank: int, adapter: bool, key: Sequence[object]) -> tuple[Change, list[Tensor]]:
    """Return T, the weighted mean of the clients' changes, and an orthonormal basis of each client's column space."""
    if adapter:
        pairs = [x.low for x in module.trained()]
        bases = [subspace.column_basis(x) for x in pairs[: MAX_PAIRS + 1]]
        return Change(lowrank.stack(pairs, module.shares)), bases
    total, bases = torch.zeros_like(module.landed.matrix()), []
    for k, (x, share) in enumerate(zip(module.trained(), module.shares, strict=True)):
        part = x.matrix()
        total.add_(part, alpha=share)
        if k <= MAX_PAIRS:
            bases.append(spectra.leading(part, rank, *key, k))
    return Change(module.landed.low, total), bases


def _errors(figures: _Figures, module: ModuleRound, total: Tensor, ideal: Tensor) -> None:
    """Measure the distances from the averaged weights, and from the change before plus what was learnt.

    Parameters
    ----------
    total
        T (m, n), or in coordinates.
    ideal
        T and the patches that the clients had.
    """
    landed = module.landed.matrix()
    figures.energies["distance_from_ideal"] = _energy(landed - ideal), _energy(ideal)
    if module.first_rows is not None and module.before is not None:
        kept = module.before.matrix() + total - module.sent.matrix()
        figures.energies["distance_from_innovation"] = _energy(landed - kept), _energy(kept)
    if module.regauged is not None:
        figures.energies["gauge_sensitivity"] = _energy(module.regauged.matrix() - landed), _energy(landed)


def _readouts(figures: _Figures, module: ModuleRound, ideal: Change, key: Sequence[object]) -> None:
    """Measure, by rank, how far a client's next start is from the ideal, and how far the best adapter would be."""
    if not module.readouts:
        return
    known, whole = spectra.spectrum(ideal.left(), *key, "ideal"), ideal.matrix()
    for rank, x in module.readouts.items():
        figures.energies[f"readout_loss/{rank}"] = _energy(x.matrix() - whole), known.total
        tail = known.tail(rank)
        if tail is not None:
            figures.energies[f"truncation_loss/{rank}"] = tail, known.total


def _angles(figures: _Figures, bases: Sequence[Tensor], consensus: Tensor, weight: float) -> None:
    """Measure angles between neighbouring clients' column spaces, and from each one to the leading directions of T."""
    pairs = spectra.degrees(list(pairwise(bases)))
    if len(pairs):
        figures.means["angle_clients_mean"] = float(pairs.mean()), weight
        figures.maxima["angle_clients_max"] = float(pairs.max())
    to_consensus = spectra.degrees([(u, consensus) for u in bases])
    if len(to_consensus) and len(bases) > 1:
        figures.means["angle_consensus"] = float(to_consensus.mean()), weight


def _change(figures: _Figures, module: ModuleRound, rank: int, key: Sequence[object]) -> None:
    """Measure the ranks of the whole change of the base, and how far its leading directions turned this round."""
    if module.before is None or module.after is None:
        return
    before, after = module.before.left(), module.after.left()
    known = spectra.spectrum(after, *key, "after")
    effective, stable = spectra.effective_rank(known), spectra.stable_rank(known)
    if effective is not None and stable is not None:
        figures.means["effective_rank"], figures.means["stable_rank"] = (effective, known.total), (stable, known.total)
        figures.bound = not known.complete
    turned = spectra.degrees([(spectra.leading(before, rank, *key, 0), spectra.leading(after, rank, *key, 1))])
    if len(turned):
        figures.means["drift_mean"] = float(turned.mean()), known.total
        figures.maxima["drift_max"] = float(turned.max())


def _cross_terms(figures: _Figures, module: ModuleRound, total: Tensor) -> None:
    """Measure ‖B̄Ā − T‖ on these updates, B̄ = Σ p_k s_k B_k, Ā = Σ p_k A_k; needs clients of one rank."""
    pairs = [(x.low, share) for x, share in zip(module.trained(), module.shares, strict=True)]
    if len({x.rank for x, _ in pairs}) == 1:
        b, a = sum(x.b * p for x, p in pairs), sum(x.a * p for x, p in pairs)
        assert isinstance(b, Tensor)
        assert isinstance(a, Tensor)
        figures.energies["cross_terms"] = _energy(b @ a - total), _energy(total)


def _escapes(figures: _Figures, module: ModuleRound) -> None:
    """Measure the shares of the new change's energy outside the row spaces of the change before and of the first A."""
    if module.before is None or module.after is None:
        return
    after = module.after.matrix()
    if module.before.dense is None and module.before.low.rank:
        old = subspace.column_basis(module.before.low.transposed())
        if old.shape[1]:
            figures.energies["row_space_escape"] = _energy(after - (after @ old) @ old.mT), _energy(after)
    if module.first_rows is not None:
        first = torch.linalg.qr(module.first_rows.mT)[0]
        figures.energies["first_a_escape"] = _energy(after - (after @ first) @ first.mT), _energy(after)


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _ratio(part: float, whole: float, share: bool) -> float | None:
    """Return part / whole of two squared norms, or of their norms where it is no share; none for a zero whole."""
    if not whole > 0:
        return None
    return part / whole if share else (part / whole) ** 0.5


def _combined(modules: Mapping[str, _Figures]) -> dict[str, Any]:
    """Return the figures of the round, and the worst module of some of them."""
    combined: dict[str, Any] = {name: _added(modules, name) for name in (*ERRORS, *SHARES)}
    combined |= {name: _weighted_mean(modules, name) for name in MEANS}
    combined |= {name: _largest(modules, name) for name in MAXIMA}
    combined |= {name: _by_rank(modules, name) for name in BY_RANK}
    combined["worst"] = _worst(modules)
    if any(f.bound for f in modules.values()):
        combined["effective_rank_is_bound"] = True
    return combined


def _weighted_mean(modules: Mapping[str, _Figures], name: str) -> float | None:
    values = [f.means[name] for f in modules.values() if name in f.means]
    weight = sum(w for _, w in values)
    return sum(v * w for v, w in values) / weight if weight > 0 else None


def _largest(modules: Mapping[str, _Figures], name: str) -> float | None:
    return max((f.maxima[name] for f in modules.values() if name in f.maxima), default=None)


def _by_rank(modules: Mapping[str, _Figures], name: str) -> dict[str, float | None] | None:
    ranks = {int(key.partition("/")[2]) for f in modules.values() for key in f.energies if key.startswith(name)}
    return {str(rank): _added(modules, f"{name}/{rank}") for rank in sorted(ranks)} or None


def _added(modules: Mapping[str, _Figures], name: str) -> float | None:
    """Return the ratio of the summed energies."""
    pairs = [f.energies[name] for f in modules.values() if name in f.energies]
    return _ratio(sum(part for part, _ in pairs), sum(whole for _, whole in pairs), name in SHARES)


def _worst(modules: Mapping[str, _Figures]) -> dict[str, dict[str, Any]]:
    """Return, by figure, the module with the largest error, escape or drift, or with the smallest effective rank."""
    worst: dict[str, dict[str, Any]] = {}
    for name in (*ERRORS, *SHARES, "effective_rank", "drift_max"):
        values = {module: value for module, f in modules.items() if (value := f.value(name)) is not None}
        if values:
            module = (min if name == "effective_rank" else max)(values, key=lambda m: values[m])
            worst[name] = {"module": module, "value": values[module]}
    return worst
