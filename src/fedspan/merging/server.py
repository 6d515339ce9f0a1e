"""A server for a training loop of your own: adapters out, trained adapters in, round by round."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedspan.adapters.state_dict import Adapter
from fedspan.merging.layout import Layout, layout_of
from fedspan.methods import METHODS, create
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Factors, Request, Template, Update
from fedspan.methods.state_file import pack_state, pack_tensors, separate, unpack_state, unpack_tensors
from fedspan.support import parallel
from fedspan.support.errors import FedspanError
from fedspan.support.files import read_tensors, write_bytes
from fedspan.support.scalars import plain, whole

_FORMAT = 1
_KEY = "fedspan_server"


@dataclass(frozen=True, slots=True)
class RoundReport:
    """The result of one round of a server."""

    method: str
    round_num: int
    """Rounds finished, this one included."""
    num_clients: int
    weights: Mapping[str, float]
    """p_k = n_k / Σ n by client."""
    bytes_up: int
    """Size of the clients' state dicts."""
    diagnostics: Diagnostics
    """The method's own diagnostics."""


class Server:
    """The server's side of an adapter method, for a training loop of your own.

        server = fedspan.Server("glora", base=peft_model)
        for _ in range(rounds):
            adapter = server.adapter(rank=8)  # for peft.set_peft_model_state_dict; then train
            report = server.update({"a": state_dict_a, "b": state_dict_b}, num_examples={"a": 300, "b": 120})

    A client of rank r has a LoRA adapter with `r` and the base's `lora_alpha` and `use_rslora`. A round on a client:

    1. Load `adapter(r)`. Methods that keep something per client (FedSA-LoRA's B, HetLoRA's pruned rank) keep it in
       this object, under the client's id: pass `client_id` too.
    2. Add `patch(r)` to the base's original weights. It is empty except for FLoRA, FedEx-LoRA, GLoRA+, and GLoRA
       with `start` "state" or "split".
    3. Train the factors in `trains`, and whole weights in `modules_to_save`; add `tail_penalty(r)` to the loss where
       there is one (HetLoRA).
    4. Hand `peft.get_peft_model_state_dict(model)` to `update`.

    Parameters
    ----------
    method
        An adapter method's name. Methods that train weights, the controls, and Fed-SB are refused; Fed-SB needs a
        gradient before the first round, and training confined to a subspace, which plain LoRA training is not.
    base
        A PEFT model, a PEFT adapter folder, a `Template`, or (m, n) by module. Shapes, LoRA settings and the heads'
        values are read from it, not the factors: the first round starts from LoRA's own start, ΔW = 0. A template
        has no heads; shapes alone count as `lora_alpha` 16.
    max_rank
        The largest rank of a client; none: the base's `r`.
    seed
        Of everything that the method draws; none: the template's, or 0.
    adapter_name
        The adapter's name in the clients' models.
    **options
        The method's own options, as `fedspan methods NAME` lists them.

    Raises
    ------
    FedspanError
        For a method, an option or a base that cannot be used.
    """

    def __init__(
        self,
        method: str,
        *,
        base: Any,
        max_rank: int | None = None,
        seed: int | None = None,
        adapter_name: str = "default",
        **options: Any,
    ) -> None:
        if not isinstance(method, str):
            raise FedspanError(f"method = a {type(method).__name__}: expected a name, with its options beside it")
        self._method = create(method, **options)
        reason = _why_not(self._method)
        if reason is not None:
            able = ", ".join(name for name, make in METHODS.items() if _why_not(make()) is None)
            raise FedspanError(f"{method} {reason}: expected one of {able}")
        self._options = {key: plain(value) for key, value in options.items()}
        self._layout, heads = layout_of(base, max_rank, seed, adapter_name)
        self._state = self._method.init(self._layout.template, heads)
        self._client_states: dict[str, ClientState] = {}

    @property
    def state(self) -> ServerState:
        """The server's state between two rounds."""
        return self._state

    @property
    def round_num(self) -> int:
        """Number of rounds finished."""
        return self._state.round_num

    @property
    def trains(self) -> tuple[str, ...]:
        """The factors that clients train in the coming round; the others stay as they were sent.

        "lora_A", "lora_B" or both (and PEFT's names for embeddings where some are adapted), to be looked for in the
        names of a model's parameters. RoLoRA takes turns; FFA-LoRA and FedSVD train B alone.
        """
        recipe = self._broadcast(self._state, self._layout.template.rank, "the server").recipe
        a, b = (self._layout.factor_names(side) for side in "AB")
        return (a if recipe.train_a else ()) + (b if recipe.train_b else ())

    def adapter(self, rank: int | None = None, *, client_id: str | None = None) -> dict[str, Tensor]:
        """Return the state dict that a client of this rank starts the round from, heads included.

        Parameters
        ----------
        rank
            The client's `r`; none: the largest.
        client_id
            Needed where the method keeps something per client; none: a client that has not taken part yet.

        Raises
        ------
        FedspanError
            When the method does not serve that rank.
        """
        rank = self._layout.template.rank if rank is None else rank
        sent = self._start(self._state, rank, client_id)
        # A pruned component has both factors at zero, where it has no gradient: it stays given up.
        return self._layout.write({name: _padded(f, rank) for name, f in sent.adapter.items()}, sent.dense)

    def patch(self, rank: int | None = None) -> dict[str, Tensor]:
        """Return what a client of this rank adds to its base for the round, by the weight's name in the PEFT model.

        It is the whole difference from the original weights, not from the last round's:

            original = {name: model.state_dict()[name].clone() for name in server.patch(8)}     # once
            model.load_state_dict({name: original[name] + x for name, x in server.patch(8).items()}, strict=False)

        Weights that are quantised, or an adapted embedding that is tied to the output layer, cannot be added to in
        this way. Empty for most methods, and for all of them before the first round.
        """
        rank = self._layout.template.rank if rank is None else rank
        sent = self._broadcast(self._state, rank, "patch")
        return dict(self._layout.base_weight(module, patch) for module, patch in sent.patch.items())

    def tail_penalty(self, rank: int | None = None, *, client_id: str | None = None) -> tuple[float, int] | None:
        """Return (λ, k) where the client adds λ·Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F over its modules to the loss (HetLoRA)."""
        rank = self._layout.template.rank if rank is None else rank
        return self._start(self._state, rank, client_id).recipe.tail_penalty

    def update(
        self, state_dicts: Mapping[str, Mapping[str, Tensor]], *, num_examples: Mapping[str, float]
    ) -> RoundReport:
        """Finish a round with the adapters that these clients trained.

        Parameters
        ----------
        state_dicts
            By client id, as `peft.get_peft_model_state_dict` gives them; the adapter's name may stand in the keys.
        num_examples
            By client id, how much each client counts.

        Raises
        ------
        FedspanError
            Naming the client, and what is wrong with its state dict or its number of examples. The server is then
            unchanged.
        """
        counts = _counts(state_dicts, num_examples)
        given = {client_id: self._layout.read(f"client {client_id}", state_dicts[client_id]) for client_id in counts}
        try:
            state, kept, diagnostics = self._round(given, counts)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of a product that overflowed
            raise FedspanError(self._overflow()) from None
        self._state, self._client_states = state, kept
        total = math.fsum(counts.values())
        return RoundReport(
            self._method.info.name,
            state.round_num,
            len(counts),
            {client_id: count / total for client_id, count in counts.items()},
            sum(t.nbytes for state_dict in state_dicts.values() for t in state_dict.values()),
            diagnostics,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the server between two rounds to one safetensors file: whole, or not at all.

        Raises
        ------
        OSError
            When writing fails; a file that was there before survives.
        """
        tensors: dict[str, Tensor] = {}
        layout = self._layout
        structure = {
            "format": _FORMAT,
            "method": self._method.info.name,
            "options": self._options,
            "adapter_name": layout.adapter_name,
            "heads": {name: list(shape) for name, shape in layout.heads.items()},
            "modules_to_save": list(layout.modules_to_save),
            "embeddings": sorted(layout.embeddings),
            "fan_in_fan_out": layout.fan_in_fan_out,
            "state": pack_state(self._state, tensors),
            "client_states": {
                client: pack_tensors(kept, f"client/{client}", tensors) for client, kept in self._client_states.items()
            },
        }
        write_bytes(Path(path), to_bytes(separate(tensors), metadata={_KEY: json.dumps(structure)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Server:
        """Read a server that `save` wrote; it continues as if it had never stopped.

        Raises
        ------
        FedspanError
            When the file is no saved server of this format, or damaged.
        """
        try:
            meta, tensors = read_tensors(Path(path), _KEY)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise FedspanError(f"{path} is damaged ({error}): expected a saved server") from None
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise FedspanError(f"{path} is no saved server of format {_FORMAT}")
        try:
            state = unpack_state(meta["state"], tensors)
            server = cls(meta["method"], base=state.template, adapter_name=meta["adapter_name"], **meta["options"])
            server._layout = Layout(
                state.template,
                meta["adapter_name"],
                {name: tuple(shape) for name, shape in meta["heads"].items()},
                tuple(meta["modules_to_save"]),
                frozenset(meta["embeddings"]),
                meta["fan_in_fan_out"],
            )
            server._client_states = {
                client: unpack_tensors(keys, tensors) for client, keys in meta["client_states"].items()
            }
        except FedspanError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FedspanError(f"{path} is damaged (incomplete: {error}): expected a saved server") from None
        server._state = state
        return server

    def _round(
        self, given: Mapping[str, tuple[Adapter, int]], counts: Mapping[str, float]
    ) -> tuple[ServerState, dict[str, ClientState], Diagnostics]:
        """Run the round's exchanges, both sides of them, on (adapter, rank) by client."""
        state, kept = self._state, dict(self._client_states)
        trained: dict[str, Update] = {}
        diagnostics: dict[str, Any] = {}
        for number, exchange in enumerate(self._method.exchanges):
            if not exchange.due(state.round_num):
                continue
            state = replace(state, exchange=number)
            starts = self._starts(state, {client_id: rank for client_id, (_, rank) in given.items()})
            if exchange.ask == "train":
                trained = {c: self._trained(c, adapter, starts[c], counts[c]) for c, (adapter, _) in given.items()}
            replies = [self._encoded(update, starts[client_id], kept) for client_id, update in trained.items()]
            with parallel.threads(os.cpu_count() or 1):
                state, measured = aggregate(self._method, state, replies)
            diagnostics |= measured
        if not _is_finite(state):
            raise FedspanError(self._overflow())
        return state, kept, diagnostics

    def _overflow(self) -> str:
        name = self._method.info.name
        return f"round {self.round_num + 1} of {name} overflowed: expected smaller values in the state dicts"

    def _broadcast(self, state: ServerState, rank: int, where: str) -> Broadcast:
        """Return what a client of this rank is sent."""
        info, largest = self._method.info, self._layout.template.rank
        rank = whole(f"{where}: rank", rank, 1)
        if not info.hetero_rank and rank != largest:
            raise FedspanError(f"{where}: rank = {rank}: {info.name} expected rank {largest} for every client")
        sent = self._method.broadcast(state, Request(rank))
        # Methods that keep factors have no more directions than these to give.
        if any(f.rank != rank for f in sent.adapter.values()):
            raise FedspanError(f"{where}: rank = {rank}: {info.name} expected at most {largest}, the server's max_rank")
        return sent

    def _starts(self, state: ServerState, ranks: Mapping[str, int]) -> dict[str, Broadcast]:
        """Return what each client starts from; clients of one rank are sent the same, worked out once."""
        one_of = {rank: client_id for client_id, rank in ranks.items()}
        sent = {rank: self._broadcast(state, rank, f"client {client_id}") for rank, client_id in one_of.items()}
        return {c: self._method.start(sent[rank], self._client_states.get(c)) for c, rank in ranks.items()}

    def _start(self, state: ServerState, rank: int, client_id: str | None) -> Broadcast:
        """Return what a client starts from, with what is kept for it."""
        where = "adapter" if client_id is None else f"client {_client_id(client_id)}"
        kept = None if client_id is None else self._client_states.get(client_id)
        return self._method.start(self._broadcast(state, rank, where), kept)

    def _trained(self, client_id: str, adapter: Adapter, sent: Broadcast, count: float) -> Update:
        """Return a client's adapter as the update that it is, checked against what the client was sent."""
        modules = {}
        for name, start in sent.adapter.items():
            f, where = adapter.factors[name], f"client {client_id}: {name}"
            if f.b[:, start.rank :].any():
                raise FedspanError(f"{where}: lora_B has components beyond {start.rank}, which were pruned: expected 0")
            f = Factors(f.b[:, : start.rank], f.a[: start.rank], f.scaling)
            for side, free, now, then in (
                ("lora_A", sent.recipe.train_a, f.a, start.a),
                ("lora_B", sent.recipe.train_b, f.b, start.b),
            ):
                if not free and not _same_in_some_precision(now, then):
                    raise FedspanError(
                        f"{where}: {side} was changed, but round {self.round_num + 1} of {self._method.info.name} "
                        f"trains {' and '.join(self.trains)} alone: expected it as it was sent"
                    )
            modules[name] = f
        return Update(client_id, count, modules, adapter.dense)

    def _encoded(self, trained: Update, start: Broadcast, kept: dict[str, ClientState]) -> Update:
        """Return what the method makes of a client's update, and put what it keeps for the client in `kept`."""
        client_id = trained.client_id
        update, after = self._method.encode(trained, start, self._client_states.get(client_id))
        if after is not None:
            kept[client_id] = after
        # Trained tensors are finite, but a norm or a product of them need not be.
        for (module, part), tensor in update.named_tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise FedspanError(f"client {client_id}: {part} of {module} overflowed: expected finite values")
        return update


def _why_not(method: Method) -> str | None:
    """Return why the method cannot serve a plain LoRA training loop; none where it can."""
    if method.info.pooled or method.info.alone:
        return "is a control without a server"
    if method.info.trains != "adapter":
        return "averages weights, not adapters"
    if any(exchange.ask == "gradient" for exchange in method.exchanges):
        return "needs a gradient before the first round, and training confined to a subspace"
    if method.broadcast(method.init(Template({}, 1), {}), Request(None)).recipe.heads:
        return "trains several cores with scales of their own"
    return None


def _counts(state_dicts: Mapping[str, Any], num_examples: Mapping[str, float]) -> dict[str, float]:
    """Return client id -> number of examples, in the order of the ids."""
    for name, given in (("state_dicts", state_dicts), ("num_examples", num_examples)):
        if not isinstance(given, Mapping):
            raise FedspanError(f"{name} is a {type(given).__name__}: expected a mapping from client ids")
        for client_id in given:
            _client_id(client_id)
    if missing := sorted(state_dicts.keys() - num_examples.keys()):
        raise FedspanError(f"client {missing[0]} has no num_examples: expected a number for each client")
    if unknown := sorted(num_examples.keys() - state_dicts.keys()):
        raise FedspanError(f"num_examples names client {unknown[0]}, which sent no state dict")
    counts = {client_id: _count(client_id, num_examples[client_id]) for client_id in sorted(state_dicts)}
    if not math.isfinite(sum(counts.values())):
        raise FedspanError("num_examples add up to infinity: expected numbers with a finite sum")
    return counts


def _count(client_id: str, given: object) -> float:
    try:
        count = plain(given)
        if not isinstance(count, bool) and isinstance(count, int | float) and math.isfinite(count) and count > 0:
            return float(count)
    except OverflowError:  # a whole number beyond all floats
        pass
    raise FedspanError(f"client {client_id}: num_examples = {given!r}: expected a finite number above 0")


def _client_id(given: object) -> str:
    """Return the id of a client; a saved server could not tell 1 from "1"."""
    if not isinstance(given, str):
        raise FedspanError(f"client id {given!r}: expected a string")
    return given


def _is_finite(state: ServerState) -> bool:
    tensors: dict[str, Tensor] = {}
    pack_state(state, tensors)
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _padded(f: Factors, rank: int) -> Factors:
    """Return the pair at that rank, its spare components zero."""
    spare = rank - f.rank
    if not spare:
        return f
    b, a = f.b.new_zeros((f.b.shape[0], spare)), f.a.new_zeros((spare, f.a.shape[1]))
    return Factors(torch.cat([f.b, b], dim=1), torch.cat([f.a, a], dim=0), f.scaling)


def _same_in_some_precision(x: Tensor, sent: Tensor) -> bool:
    """Return whether x is what was sent, perhaps rounded by a model in half precision."""
    kinds = (x.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(x, sent.to(kind).to(x.dtype)) for kind in kinds)
