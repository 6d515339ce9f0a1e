"""One base model in memory, through which clients pass one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedspan.adapters import peft_folder
from fedspan.methods.messages import Broadcast, Factors, Recipe, Template
from fedspan.methods.patches import Patch, patch_dense
from fedspan.models.layers import base_layer, beside, factors_of, is_conv1d, read_adapter, set_adapter, shape_of
from fedspan.models.loading import Kind, quiet, resolve
from fedspan.support.errors import FedspanError

Trains = Literal["adapter", "targets", "all"]
_TASK_TYPES: Mapping[str, str | None] = {"instruction": "CAUSAL_LM", "classification": "SEQ_CLS", "image": None}


@dataclass(slots=True)
class FederatedModel:
    """One base model in memory, through which clients pass one after the other.

    Whatever is loaded is copied, and whatever is handed out is a copy: no client's tensor is another's, and the
    server's state is never trained in place.
    """

    name: str
    kind: Kind
    trains: Trains
    model: nn.Module
    layers: Mapping[str, Any]
    """Adapted modules by their name inside the base: PEFT LoRA layers, or the plain layers."""
    dense_parameters: Mapping[str, nn.Parameter]
    """Heads and, for full-weight methods, the weights that are trained."""
    projected: frozenset[str]
    """Names in `dense_parameters` that are weights of target modules (GaLore projects these)."""
    heads: tuple[str, ...]
    """Modules that are trained whole: the head, and what else of the model its files did not hold (a pooler)."""
    device: torch.device
    _originals: dict[str, Tensor] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)
    _patch: Mapping[str, Patch] = field(default_factory=dict)
    _compiled: Any = None

    def modules(self) -> dict[str, tuple[int, int]]:
        """Module name -> (m, n)."""
        return {name: shape_of(base_layer(layer)) for name, layer in self.layers.items()}

    def template(self, rank: int, alpha: float, rslora: bool, seed: int, num_clients: int = 0) -> Template:
        """What is fixed for a run over this model."""
        modules = self.modules()
        if self.trains != "adapter":
            rows_columns = {name: self.dense_parameters[name].shape for name in sorted(self.projected)}
            modules = {name: (rows, columns) for name, (rows, columns) in rows_columns.items()}
        return Template(modules, rank, alpha, rslora, seed, num_clients)

    def target_weights(self) -> dict[str, nn.Parameter]:
        """The weights that a gradient is asked of: the base layers' by module, or the trained ones by their name.

        Raises
        ------
        ValueError
            For a base that is not held in floating point.
        """
        if self.trains != "adapter":
            return {name: self.dense_parameters[name] for name in sorted(self.projected)}
        weights = {name: base_layer(layer).weight for name, layer in self.layers.items()}
        for name, weight in weights.items():
            if not weight.is_floating_point():
                raise FedspanError(f"{name} is held as {weight.dtype}: expected a floating-point base for its gradient")
        return weights

    @contextmanager
    def differentiable(self, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """These weights and nothing else gather gradients; afterwards there are none."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        self.model.eval()
        try:
            yield
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
                weight.grad = None

    def oriented(self, name: str, weight: nn.Parameter) -> Tensor:
        """A copy of the gradient of a module's weight, in float32 on the CPU and of the template's shape."""
        assert weight.grad is not None
        grad = weight.grad.detach().float().cpu()
        turned = self.trains == "adapter" and is_conv1d(base_layer(self.layers[name]))
        return (grad.T if turned else grad).contiguous()

    def digest(self) -> str:
        """SHA-256 over the untouched base, names, types, shapes and bits, to be taken before anything is loaded.

        Two sites that tell the same digest hold the same base to the bit.
        """
        found = hashlib.sha256()
        held = {name: t for name, t in self.model.state_dict().items() if ".lora_" not in name}
        for name in sorted(held):
            tensor = held[name].detach().cpu().contiguous()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        return found.hexdigest()

    def check(self, recipe: Recipe) -> None:
        """Raise a ValueError for a recipe that does not fit this model's layers."""
        if recipe.galore is None:
            return
        for name in sorted(self.projected):
            m, n = self.dense_parameters[name].shape
            if recipe.galore.rank > min(m, n):
                raise FedspanError(
                    f"method.galore_rank = {recipe.galore.rank}: {name} is {m}×{n}, expected at most {min(m, n)}"
                )

    def load(self, broadcast: Broadcast) -> None:
        """Put a client's starting point into the model: patch on the base, adapter, dense weights.

        Raises
        ------
        ValueError
            When a module or weight is missing, unknown or of another shape: what the client before left would stay.
        """
        self.check_fits(broadcast)
        self.apply_patch(broadcast.patch)
        for name, factors in broadcast.adapter.items():
            set_adapter(self.layers[name], factors, self.device)
        with torch.no_grad():
            for name, value in broadcast.dense.items():
                self.dense_parameters[name].copy_(value)

    def check_fits(self, broadcast: Broadcast) -> None:
        """Raise a ValueError when a module or weight is missing, unknown or of another shape."""
        expected: dict[str, tuple[int, ...]] = {name: p.shape for name, p in self.dense_parameters.items()}
        given: dict[str, tuple[int, ...]] = {name: value.shape for name, value in broadcast.dense.items()}
        if self.trains == "adapter":
            expected |= self.modules()
        given |= {name: (f.b.shape[0], f.a.shape[1]) for name, f in broadcast.adapter.items()}
        odd = sorted(expected.keys() ^ given.keys())
        if odd:
            raise FedspanError(f"a broadcast {'with an unknown' if odd[0] in given else 'without'} {odd[0]}")
        for name, shape in given.items():
            if shape != expected[name]:
                raise FedspanError(f"a broadcast with {name} of shape {tuple(shape)}: expected {tuple(expected[name])}")

    def trainable(self, recipe: Recipe) -> dict[str, nn.Parameter]:
        """The parameters that this recipe trains, by name; everything else is frozen."""
        chosen: dict[str, nn.Parameter] = {}
        if self.trains == "adapter":
            for name, layer in self.layers.items():
                a, b = factors_of(layer)
                chosen |= {f"{name}/a": a} if recipe.train_a else {}
                chosen |= {f"{name}/b": b} if recipe.train_b else {}
        chosen |= dict(self.dense_parameters)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return chosen

    def adapter(self) -> dict[str, Factors]:
        """Copies of the adapter as it stands."""
        if self.trains != "adapter":
            return {}
        return {name: read_adapter(layer) for name, layer in self.layers.items()}

    def dense(self) -> dict[str, Tensor]:
        """Copies of the dense weights as they stand, in float32 on the CPU."""
        return {name: p.detach().float().cpu().clone() for name, p in self.dense_parameters.items()}

    @contextmanager
    def training(self, compiled: bool = False) -> Iterator[None]:
        """The model as it is trained, dropout on; afterwards as it is used.

        Parameters
        ----------
        compiled
            Compile the passes through the body: once for every rank that comes by, half a minute each.
        """
        body: Any = getattr(self.model, "base_model", self.model)
        if compiled:
            self._compiled = self._compiled or torch.compile(body.forward, dynamic=True)
            body.forward = self._compiled
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()
            if compiled:
                del body.forward  # the class's own is behind it

    def tail_penalty(self, tail: int) -> Tensor:
        """Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F over the modules."""
        pairs = [factors_of(layer) for layer in self.layers.values()]
        return torch.stack([b[:, tail:].norm() * a[tail:].norm() for a, b in pairs]).sum()

    def save_weights(self, path: Path, processor: Any) -> None:
        """The whole model and its processor, as transformers saves them."""
        with quiet():
            self.model.save_pretrained(str(path))  # type: ignore[operator]
            processor.save_pretrained(str(path))

    def save_adapter(self, path: Path, factors: Mapping[str, Factors], dense: Mapping[str, Tensor]) -> None:
        """A PEFT adapter folder for the untouched base, heads included as `modules_to_save`."""
        conv = [name for name, layer in self.layers.items() if is_conv1d(base_layer(layer))]
        peft_folder.save(
            path,
            factors,
            base_model=resolve(self.name),
            task_type=_TASK_TYPES[self.kind],
            dense=dense,
            modules_to_save=self.heads,
            fan_in_fan_out=bool(conv),
        )

    def apply_patch(self, patch: Mapping[str, Patch]) -> None:
        """The untouched base plus `patch`, whatever was added to it before."""
        if patch is self._patch:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        with torch.no_grad():
            for name in self._patch.keys() | patch.keys():
                self._patch_layer(name, patch.get(name))
        self._patch = patch

    def _patch_layer(self, name: str, patch: Patch | None) -> None:
        layer = base_layer(self.layers[name])
        weight = layer.weight
        if patch is not None and weight.dtype != torch.float32:
            # A patch smaller than the base's rounding would vanish in it: it stays beside it in float32.
            self._hooks.append(layer.register_forward_hook(beside(patch, self.device)))
            return
        # Always from the original, so that errors do not add up over the rounds; and never into it, because other
        # processes may be reading the same memory.
        original = self._originals.setdefault(name, weight.data)
        if patch is None:
            weight.data = original
            return
        delta = patch_dense(patch).to(self.device)
        weight.data = original + (delta.T if is_conv1d(layer) else delta)
