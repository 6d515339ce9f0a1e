"""A server for a training loop of your own: adapters out, trained adapters in, round by round.

Every method that trains adapters is served. What differs between them is read from the method's exchanges and from
what it broadcasts, never from its name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedspan.merging import server_file
from fedspan.merging.answers import counts_of
from fedspan.merging.exchanges import Exchanges
from fedspan.merging.layout import layout_of
from fedspan.merging.local_work import collecting, parameters_of, training_only
from fedspan.methods import METHODS, create
from fedspan.methods.base import Method, ServerState
from fedspan.methods.messages import Diagnostics, Factors, Request, Template
from fedspan.support.errors import FedspanError
from fedspan.support.scalars import plain


@dataclass(frozen=True, slots=True)
class RoundReport:
    """The result of one `update` of a server."""

    method: str
    round_num: int
    """Rounds finished, this one included; gradients alone finish none."""
    num_clients: int
    weights: Mapping[str, float]
    """p_k = n_k / Σ n by client."""
    bytes_up: int
    """Size of what the clients handed over."""
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
       there is one (HetLoRA). Inside `training(model)` the other factors are frozen, and factors that the method
       confines to a subspace stay in it, which only Fed-SB needs.
    4. Hand `peft.get_peft_model_state_dict(model)` to `update`; copies of its tensors where one model trains several
       clients in turn.

    A method may ask for gradients of the base before a round is trained, as Fed-SB does before the first. While `asks`
    is "gradient", `update` takes what `gradient(model)` gives, and the round goes on with training:

        server = fedspan.Server("fed_sb", base=peft_model)
        for _ in range(rounds):
            if server.asks == "gradient":
                ...  # per client: load `adapter()`, and call backward inside `with server.gradient(model) as gradient:`
                server.update({"a": gradient_a, "b": gradient_b}, num_examples={"a": 300, "b": 120})
            ...  # per client: load `adapter()`, and train inside `with server.training(model):`
            report = server.update({"a": state_dict_a, "b": state_dict_b}, num_examples={"a": 300, "b": 120})

    Parameters
    ----------
    method
        The name of a method that trains adapters. Methods that train weights, and the controls, are refused.
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
        made = create(method, **options)
        reason = _why_not(made)
        if reason is not None:
            able = ", ".join(name for name, make in METHODS.items() if _why_not(make()) is None)
            raise FedspanError(f"{method} {reason}: expected one of {able}")
        layout, heads = layout_of(base, max_rank, seed, adapter_name)
        self._options = {key: plain(value) for key, value in options.items()}
        self._exchanges = Exchanges(made, layout, made.init(layout.template, heads))

    @property
    def state(self) -> ServerState:
        """The server's state between two updates."""
        return self._exchanges.state

    @property
    def asks(self) -> Literal["train", "gradient"]:
        """The content of the next `update`: "train", trained adapters; "gradient", gradients of the base's weights."""
        return self._exchanges.stage.ask

    @property
    def probe_batches(self) -> int:
        """Number of batches over which a gradient is to be the mean, where one is asked for (a method's option)."""
        return self._exchanges.broadcast(None, "the server").recipe.probe_batches

    @property
    def round_num(self) -> int:
        """Number of rounds finished."""
        return self.state.round_num

    @property
    def trains(self) -> tuple[str, ...]:
        """The factors that clients train in the coming round; the others stay as they were sent.

        "lora_A", "lora_B" or both (and PEFT's names for embeddings where some are adapted), to be looked for in the
        names of a model's parameters. RoLoRA takes turns; FFA-LoRA and FedSVD train B alone. None while a gradient is
        asked for.
        """
        if self.asks == "gradient":
            return ()
        recipe = self._exchanges.broadcast(None, "the server").recipe
        a, b = (self._exchanges.layout.factor_names(side) for side in "AB")
        return (a if recipe.train_a else ()) + (b if recipe.train_b else ())

    def adapter(self, rank: int | None = None, *, client_id: str | None = None) -> dict[str, Tensor]:
        """Return the state dict that a client of this rank starts from, heads included.

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
        layout, sent = self._exchanges.layout, self._exchanges.start(rank, client_id)
        size = layout.template.rank if rank is None else rank
        # A pruned component has both factors at zero, where it has no gradient: it stays given up.
        return layout.write({name: _padded(f, size) for name, f in sent.adapter.items()}, sent.dense)

    def patch(self, rank: int | None = None) -> dict[str, Tensor]:
        """Return what a client of this rank adds to its base for the round, by the weight's name in the PEFT model.

        It is the whole difference from the original weights, not from the last round's:

            original = {name: model.state_dict()[name].clone() for name in server.patch(8)}     # once
            model.load_state_dict({name: original[name] + x for name, x in server.patch(8).items()}, strict=False)

        Weights that are quantised, or an adapted embedding that is tied to the output layer, cannot be added to in
        this way. Empty for most methods, and for all of them before the first round.
        """
        sent = self._exchanges.broadcast(rank, "patch")
        return dict(self._exchanges.layout.base_weight(module, patch) for module, patch in sent.patch.items())

    def tail_penalty(self, rank: int | None = None, *, client_id: str | None = None) -> tuple[float, int] | None:
        """Return (λ, k) where the client adds λ·Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F over its modules to the loss (HetLoRA)."""
        return self._exchanges.start(rank, client_id).recipe.tail_penalty

    def gradient(self, model: Any) -> AbstractContextManager[dict[str, Tensor]]:
        """Return a context in which the adapted base weights of a PEFT model collect gradients, and nothing else does.

            with server.gradient(model) as gradient:
                for batch in batches[: server.probe_batches]:
                    (model(**batch).loss / server.probe_batches).backward()

        Afterwards `gradient` holds the mean gradient, by the weights' names among the model's parameters, as `update`
        takes it. Load `adapter()`, and add `patch()`, before. Inside, the model is in evaluation mode; afterwards its
        parameters, their gradients and its mode are as they were.

        Raises
        ------
        FedspanError
            For a model without these weights, a base that is not in floating point, or a missing backward pass.
        """
        layout = self._exchanges.layout
        return collecting(model, [layout.base_name(module) for module in layout.template.modules])

    def training(self, model: Any, *, client_id: str | None = None) -> AbstractContextManager[None]:
        """Return a context in which a PEFT model trains the factors of the coming round, as the method confines them.

        Factors outside `trains` are frozen. A factor X with a subspace is X₀ + basis·Z or X₀ + Z·basisᵀ, and its
        parameter holds Z, which starts at 0: the optimizer, clipping and weight decay act on Z. Load `adapter()` before
        entering, for it is X₀. Take the state dict after leaving, when the parameter holds X again.

        Raises
        ------
        FedspanError
            For a model without the base's modules and adapter, or while a gradient is asked for.
        """
        layout, label = self._exchanges.layout, self._exchanges.label
        if self.asks == "gradient":
            raise FedspanError(f"{label} asks for a gradient before training: expected `gradient(model)` and `update`")
        names = {f"{m}/{side}": layout.parameter_name(m, side) for m in layout.template.modules for side in "ab"}
        held = parameters_of(model, list(names.values()))
        rank = next(p.shape[0] for p in held.values())  # of an A
        sent = self._exchanges.start(rank, client_id)
        trains = {"a": sent.recipe.train_a, "b": sent.recipe.train_b}
        free = {name: trains[part[-1]] for part, name in names.items()}
        spaces = {names[part]: space for part, space in sent.subspaces.items() if part in names and free[names[part]]}
        return training_only(model, free, spaces)

    def update(
        self, state_dicts: Mapping[str, Mapping[str, Tensor]], *, num_examples: Mapping[str, float]
    ) -> RoundReport:
        """Finish a round with the adapters that these clients trained, or continue it with gradients where `asks` says.

        Parameters
        ----------
        state_dicts
            By client id, as `peft.get_peft_model_state_dict` gives them; the adapter's name may stand in the keys.
            Gradients: as `gradient` gives them. The clients that train need not be those that gave a gradient.
        num_examples
            By client id, how much each client counts.

        Raises
        ------
        FedspanError
            Naming the client, and what is wrong with its state dict or its number of examples. The server is then
            unchanged.
        """
        counts = counts_of(state_dicts, num_examples)
        self._exchanges, diagnostics = self._exchanges.answered(state_dicts, counts)
        total = math.fsum(counts.values())
        return RoundReport(
            self._exchanges.method.info.name,
            self.round_num,
            len(counts),
            {client_id: count / total for client_id, count in counts.items()},
            sum(t.nbytes for state_dict in state_dicts.values() for t in state_dict.values()),
            diagnostics,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the server between two updates to one safetensors file: whole, or not at all.

        Raises
        ------
        OSError
            When writing fails; a file that was there before survives.
        """
        server_file.write(Path(path), self._exchanges, self._options)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Server:
        """Read a server that `save` wrote; it continues as if it had never stopped.

        Raises
        ------
        FedspanError
            When the file is no saved server of this format, or damaged.
        """
        exchanges, options = server_file.read(Path(path))
        template = exchanges.layout.template
        server = cls(exchanges.method.info.name, base=template, adapter_name=exchanges.layout.adapter_name, **options)
        server._exchanges = exchanges
        return server


def _why_not(method: Method) -> str | None:
    """Return why the method cannot serve a plain LoRA training loop; none where it can."""
    if method.info.pooled or method.info.alone:
        return "is a control without a server"
    if method.info.trains != "adapter":
        return "averages weights, not adapters"
    if method.broadcast(method.init(Template({}, 1), {}), Request(None)).recipe.heads:
        return "trains several cores with scales of their own"
    return None


def _padded(f: Factors, rank: int) -> Factors:
    """Return the pair at that rank, its spare components zero."""
    spare = rank - f.rank
    if not spare:
        return f
    b, a = f.b.new_zeros((f.b.shape[0], spare)), f.a.new_zeros((spare, f.a.shape[1]))
    return Factors(torch.cat([f.b, b], dim=1), torch.cat([f.a, a], dim=0), f.scaling)
