"""Client-level differential privacy around a method: what one client adds to a sum is bounded, and the sum is noised.

Shapes: B (m, r), A (r, n); K clients counted; q the probability with which a client is drawn, N clients in the
run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Factors, Request, Tensors, Update, Vector
from fedspan.privacy.frames import Frame, frames_of
from fedspan.privacy.gaussian import fingerprint, normal
from fedspan.support.errors import FedspanError

Key = tuple[str, str]
"""(module, part), or ("", name) of a dense weight."""
Flat = dict[Key, Tensor]
Charge = Callable[[int, str], None]
"""(round, digest of everything that one exchange's noise is keyed by) -> nothing; raises where it must not be made."""

_MARGIN = 1 - 2.0**-20
"""A clipped vector stays this much below C, so that no rounding on its way takes it above."""
_STATELESS = next(f.default for f in fields(Method) if f.name == "start")


def refusal(method: Method) -> str | None:
    """Return the reason why this method cannot be made private for its clients, or None."""
    info = method.info
    if info.pooled or info.alone:
        return "it is a control, not a federation"
    if not method.secure_sum:
        return "its server needs every client's own update, and noise is added to sums alone"
    if info.personalised or method.start is not _STATELESS:
        return "its clients keep something of their own between rounds, for which nothing is proven here"
    if not info.gauge_invariant:
        return "how large its update is depends on the gauge in which the factors happen to be written"
    return None


def with_client_dp(
    method: Method,
    clip: float,
    noise_multiplier: float,
    expected: float,
    secret: Callable[[], int] | None = None,
    charge: Charge | None = None,
) -> Method:
    """Add client-level differential privacy to a method. With v_k what client k adds to an exchange's sum,

        site     v_k ← v_k · min(1, C / ‖v_k‖);
        server   Σ_k v_k + N(0, (z C)² I),  divided by q N.

    v_k is the *change* that the client makes, over all modules and dense weights together: its answer minus that of an
    unchanged client, which everyone can compute. In exchanges that send no trained weights (sketches, gradients,
    cores), v_k is the answer itself.

    *Gauge.* Where one factor is trained beside a fixed one that all clients share, v_k is the change of the product
    s·B·A in an orthonormal basis of the fixed factor (see `fedspan.privacy.frames`): ‖v_k‖ is ‖s·ΔB·A‖_F, whatever the
    gauge, and the noise is isotropic in the space of products. Noise on B's own entries would not hide a client: with
    ‖s·ΔB·A‖_F bounded, ΔB itself is not.

    *Weights.* Every client counts 1, and the sum is divided by the expected number of clients, qN, not by the number
    that took part: that number would reveal whether a client is in the run. So a round in which no client is drawn is
    a round like any other, its step the noise alone; drawing again would make the coins dependent.

    *Noise* is drawn by `fedspan.privacy.gaussian` from the secret, the method, z, C, qN, the round, the exchange and
    the sum itself: a resumed run that arrives at the same sum draws the same noise, and one that arrives at another sum
    draws other noise. Two different sums are thus never released under the same noise, whose difference would have
    none, nor one sum under two multiples of it. What the noise is keyed by is what the ledger counts.

    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (1710.06963); Geyer et al.
    2017 (1712.07557); for one trained factor Sun et al. 2024 (2403.12313).
    Differences: norms and noise in the space of products; equal weights; noise that depends on the sum it hides.

    The result is the same with secure sums beneath, which add the vectors without reading them.

    Parameters
    ----------
    clip
        C, in units of ‖ΔW‖_F (of the vector itself, for sketches and gradients).
    noise_multiplier
        z; 0: clipping alone, without privacy.
    expected
        q N.
    secret
        Returns the server's secret, called when there is noise to draw; None at a site, which draws none.
    charge
        Counts a release before its noise is drawn; None where nothing is published: at a site, or for an experiment
        with the method by itself.

    Raises
    ------
    FedspanError
        For a method that cannot be made private this way; for a value out of range.
    """
    reason = refusal(method)
    if reason is not None:
        raise FedspanError(f"client-level privacy: {method.info.name}: {reason}")
    rule = _ClientDP(method, clip, noise_multiplier, expected, secret, charge)
    info = replace(method.info, title=f"{method.info.title} + client-level DP", exact=False)
    return replace(method, info=info, encode=rule.encode, finish=rule.finish, vector=None, finish_by_queries=None)


@dataclass(frozen=True, slots=True)
class _ClientDP:
    """The method's `encode` and `finish` with clipping before the one and noise before the other."""

    method: Method
    clip: float
    noise_multiplier: float
    expected: float
    secret: Callable[[], int] | None
    charge: Charge | None

    def __post_init__(self) -> None:
        for name, least in (("clip", True), ("noise_multiplier", False), ("expected", True)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (least and value == 0):
                raise FedspanError(f"{name} = {value}: expected {'above' if least else 'at least'} 0")

    def encode(self, update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        """Return the clipped change, which is all that leaves the site, in float32 or wider."""
        answer, keep = self.method.encode(update, sent, kept)
        # What a client keeps would carry its data into later rounds, past the clipping; `refusal` excludes this.
        if keep is not None:
            raise ValueError(f"client-level privacy: {self.method.info.name} keeps something on its clients")
        space = self._space(sent, answer, asked=not _trained(update))
        change = space.coordinates(_flat(answer))
        # One norm over all tensors together: C is to bound the sensitivity of the whole vector. With a bound of C for
        # each of n tensors it would be C·√n.
        norm = math.sqrt(sum(float(x.square().sum()) for x in change.values()))
        scale = 1.0 if norm <= self.clip * _MARGIN else self.clip * _MARGIN / norm
        return _unflat({key: (x * scale).to(space.dtypes[key]) for key, x in change.items()}, answer), None

    def finish(self, state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        """Take the server's step on the noised mean."""
        # A weight other than 1 would multiply what was clipped: the sum would change by more than C with one client.
        if partial.collected or abs(partial.weight - partial.num_clients) > 1e-6 * partial.num_clients:
            raise FedspanError(
                f"client-level privacy: a sum of weight {partial.weight} over {partial.num_clients} clients: expected "
                f"every client to count 1 (federation.weighting = 'equal')"
            )
        sent = self.method.broadcast(state, Request(None))
        unchanged, asked = self._unchanged(state, sent)
        answer, _ = self.method.encode(unchanged, sent, None)
        # In the server's full shapes, even where only clients of smaller rank took part: the noise must not show it.
        space = self._space(sent, answer, asked)
        total = _padded(_summed(partial), space.shapes)
        noise = self._noise(state, total)
        # The divisor is fixed beforehand, so the sensitivity of the mean is exactly C/(q N). The number of clients that
        # took part changes by one with a client, and would itself need noise.
        mean = {key: (total[key] + noise[key]) / self.expected for key in total}
        step_norm = math.sqrt(sum(float(x.square().sum()) for x in mean.values()))
        count = sum(map(Tensor.numel, mean.values()))
        values = space.answer(mean)
        inner = Partial(
            # Not the number that took part: nothing after the noise may depend on that.
            num_clients=max(1, round(self.expected)),
            weight=1.0,
            dense={name: x for (module, name), x in values.items() if not module},
            sums=_nested(values),
        )
        after, diagnostics = self.method.finish(state, inner)
        # Computed from the noised sum and public settings alone, so they cost no privacy.
        expected_noise = self.noise_multiplier * self.clip * math.sqrt(count) / self.expected
        return after, {**diagnostics, "dp_step_norm": step_norm, "dp_noise_norm": expected_noise}

    def _noise(self, state: ServerState, total: Flat) -> Flat:
        names = sorted(total)
        # Keyed by the sum, not by the round alone: a run resumed from before this round may see another sum (a client
        # failed this time), and the difference of two sums under the same noise would be published without any.
        sum_digest = fingerprint((json.dumps(key), total[key]) for key in names)
        settings = [self.method.info.name, self.noise_multiplier, self.clip, self.expected]
        about = json.dumps([*settings, state.round_num, state.exchange, sum_digest])
        release = hashlib.sha256(about.encode()).hexdigest()
        if self.charge is not None:
            # Before there is anything to publish: a crash after this counts a release too many, never one too few.
            self.charge(state.round_num, release)
        deviation = self.noise_multiplier * self.clip
        if deviation == 0:
            return {key: torch.zeros_like(x) for key, x in total.items()}
        if self.secret is None:
            raise ValueError("client-level privacy: the server has no secret to draw noise from")
        secret = self.secret()
        drawn = {name: normal(secret, "client", release, *name, shape=total[name].shape) for name in names}
        return {name: deviation * x for name, x in drawn.items()}

    def _space(self, sent: Broadcast, answer: Update, asked: bool) -> _Space:
        """Return the vector space of the answers to `sent`.

        Parameters
        ----------
        asked
            The answer is about the client's data or model (a gradient, a sketch), and not the weights it trained.
        """
        shapes = {key: tuple(x.shape) for key, x in _flat(answer).items()}
        dtypes = {key: torch.promote_types(x.dtype, torch.float32) for key, x in _flat(answer).items()}
        dense = {("", name): sent.dense[name].double() for name in answer.dense if name in sent.dense}
        if asked or self.method.exchanges[-1].ask != "train":
            return _Space(shapes, dtypes, dense, {})
        # Through `encode`, like a real answer, so that a client that changes nothing is 0 whatever the method sends.
        start = Update("unchanged", 1.0, dict(sent.adapter), dict(sent.dense))
        reference = {key: x.double() for key, x in _flat(self.method.encode(start, sent, None)[0]).items()}
        return _Space(shapes, dtypes, reference | dense, frames_of(self.method, sent))

    def _unchanged(self, state: ServerState, sent: Broadcast) -> tuple[Update, bool]:
        """Return an update without change in the largest shapes possible, and whether an answer to it is `asked`."""
        template, exchanges = state.template, self.method.exchanges
        # An exchange that asks "again" is about the result of the last exchange before it that asked for a new one.
        root = state.exchange
        while exchanges[root].ask == "again":
            root -= 1
        if exchanges[root].ask == "gradient":
            nothing = {name: Vector({"gradient": torch.zeros(shape)}) for name, shape in template.modules.items()}
            return Update("unchanged", 1.0, nothing, {}), True
        modules = dict(sent.adapter)
        if exchanges[state.exchange].ask == "again" and self.method.info.trains == "adapter":
            r = template.rank
            modules = {
                name: Factors(torch.zeros(m, r), torch.zeros(r, n), template.scaling(r))
                for name, (m, n) in template.modules.items()
            }
        return Update("unchanged", 1.0, modules, dict(sent.dense)), exchanges[state.exchange].ask == "again"


@dataclass(frozen=True, slots=True)
class _Space:
    """The vector space of one exchange's answers, and its zero."""

    shapes: Mapping[Key, tuple[int, ...]]
    dtypes: Mapping[Key, torch.dtype]
    zero: Mapping[Key, Tensor]
    """The answer of an unchanged client; 0 for the keys that are missing."""
    frames: Mapping[str, Frame]
    """For the modules whose product has another norm than the tensor that is sent."""

    def coordinates(self, answer: Flat) -> Flat:
        """Return the change, in float64: orthonormal coordinates of the products where there is a frame."""
        changes: Flat = {}
        for key, x in answer.items():
            change = x.double() - self.zero[key] if key in self.zero else x.double()
            changes[key] = self.frames[key[0]].to_coordinates(change) if key[0] in self.frames else change
        return changes

    def answer(self, coordinates: Flat) -> Flat:
        """Return the answer with these coordinates."""
        tensors: Flat = {}
        for key, x in coordinates.items():
            change = self.frames[key[0]].to_change(x) if key[0] in self.frames else x
            tensors[key] = (self.zero[key] + change if key in self.zero else change).to(self.dtypes[key])
        return tensors


def _trained(update: Update) -> bool:
    """Return whether an update is trained weights: factors or dense weights, where a gradient is a vector."""
    return len(update.scalings()) == len(update.modules)


def _flat(answer: Update) -> Flat:
    pairs = answer.scalings()
    if pairs:
        raise ValueError(f"client-level privacy: {next(iter(pairs))} is sent as a factor pair: expected a vector")
    return answer.named_tensors()


def _unflat(values: Flat, like: Update) -> Update:
    """Return an update of these tensors alone: number of examples, moments and rates stay at the site."""
    modules = {name: Vector(held) for name, held in _nested(values).items()}
    dense = {name: x for (module, name), x in values.items() if not module}
    return Update(like.client_id, 1.0, modules, dense)


def _nested(values: Flat) -> dict[str, Tensors]:
    nested: dict[str, dict[str, Tensor]] = {}
    for (module, part), x in values.items():
        if module:
            nested.setdefault(module, {})[part] = x
    return dict(nested)


def _summed(partial: Partial) -> Flat:
    dense: Flat = {("", name): x.double() for name, x in partial.dense.items()}
    return dense | {(module, part): x.double() for module, held in partial.sums.items() for part, x in held.items()}


def _padded(total: Flat, shapes: Mapping[Key, tuple[int, ...]]) -> Flat:
    """Return the sum in its full shapes, whichever clients took part, and zeros where none did."""
    if not total.keys() <= shapes.keys() or (total and total.keys() != shapes.keys()):
        raise FedspanError(f"a sum that names {sorted(total.keys() ^ shapes.keys())[0]}: expected what was asked for")
    padded: Flat = {}
    for key, shape in shapes.items():
        whole = torch.zeros(shape, dtype=torch.float64)
        if key in total:
            part = total[key]
            if part.ndim != len(shape) or any(x > y for x, y in zip(part.shape, shape, strict=True)):
                raise FedspanError(f"a sum of {key} in shape {tuple(part.shape)}: expected at most {shape}")
            whole[tuple(slice(size) for size in part.shape)] = part
        padded[key] = whole
    return padded
