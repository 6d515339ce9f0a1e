"""The base model in memory, with the places that a client's adapter, patch and dense weights are loaded into."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedspan.adapters import peft_folder
from fedspan.data.rows import Kind
from fedspan.methods.messages import Broadcast, Factors, Recipe, Template
from fedspan.methods.patches import Patch, patch_dense
from fedspan.models.adapter_sums import with_start
from fedspan.models.experts import Expert, ExpertParameter, gradient_of, renamed, stacks_of
from fedspan.models.layers import base_layer, beside, factors_of, is_conv1d, read_adapter, set_adapter, shape_of
from fedspan.models.loading import library_logs_silenced, resolve
from fedspan.models.placement import Places, checkpoint_in_place
from fedspan.support.errors import FedspanError

Trains = Literal["adapter", "targets", "all"]
BatchNorm = nn.modules.batchnorm._BatchNorm
_TASK_TYPES: Mapping[str, str | None] = {"instruction": "CAUSAL_LM", "classification": "SEQ_CLS", "image": None}


@dataclass(slots=True)
class FederatedModel:
    """One base model in memory, which all clients of a process share.

    Tensors are copied when they are loaded and when they are returned: no two clients share a tensor, and the server's
    state is never trained in place.
    """

    name: str
    """The folder, hub id or `builtin:` name that it was loaded from."""
    kind: Kind
    """The kind of data that it is for."""
    trains: Trains
    """The parts that are trained beside the heads: adapters, the weights of the target modules, or all weights."""
    model: nn.Module
    """The transformer itself, with PEFT's layers in it where adapters are trained."""
    layers: Mapping[str, Any]
    """The target modules by their names inside the base: PEFT LoRA layers, or the plain layers."""
    dense_parameters: Mapping[str, nn.Parameter]
    """Heads and, for full-weight methods, the weights that are trained."""
    projected: frozenset[str]
    """Names in `dense_parameters` that are weights of target modules (GaLore projects these)."""
    heads: tuple[str, ...]
    """Modules that are trained whole: the head, and others that the model's files lack (a pooler)."""
    device: torch.device
    """The device that batches go to."""
    places: Places = field(default_factory=dict)
    """The devices of the base's parts, where it lies on several; each layer's adapter lies beside it."""
    replaced_head: bool = False
    """A head in the base's files was left for a new one."""
    notes: tuple[str, ...] = ()
    """Lines on the base's layers that a user should know before the first round."""
    padding_matters: bool = False
    """Padding behind a row changes its results, so that only rows of equal length are computed together."""
    prompt_padding_matters: bool = False
    """Padding before a prompt changes what follows, so that only prompts of equal length are continued together."""
    passes: dict[Any, Any] = field(default_factory=dict)
    """Passes of many clients that were recorded over this model's memory, by what they were recorded for."""
    start: Mapping[str, Factors] = field(default_factory=dict)
    """The adapter that the run starts from; the base's weights hold it already."""
    products: torch.dtype = torch.float32
    """The type that the frozen layers of a float32 base multiply in now (`models.coarse_products`)."""
    rounded: list[tuple[Any, Tensor]] = field(default_factory=list)
    """The frozen layers with their weights in another type, once that was asked for."""
    prefix: Any = None
    """The `FrozenPrefix` of the lowest layers, where their output is computed once for each example."""
    packed: Any = None
    """The `PackedRows` of the blocks, where they can compute the rows of a batch end to end, without padding."""
    experts: tuple[ExpertParameter, ...] = ()
    """The parameters whose experts are target modules."""
    _originals: dict[str, Tensor] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)
    _patch: Mapping[str, Patch] = field(default_factory=dict)
    _patched_for: torch.dtype = torch.float32
    _compiled: Any = None

    @property
    def device_types(self) -> list[str]:
        """The types of the devices that its layers lie on: `cpu`, `cuda`, …"""
        return sorted({device.type for device in (self.device, *self.places.values())})

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return the shape (m, n) of each target module by its name."""
        return {name: shape_of(base_layer(layer)) for name, layer in self.layers.items()}

    def template(
        self, rank: int, alpha: float, rslora: bool, seed: int, num_clients: int = 0, *, adaptive: bool = True
    ) -> Template:
        """Return the template of a run over this model: shapes, server rank, scaling, seed."""
        modules = self.modules()
        if self.trains != "adapter":
            rows_columns = {name: self.dense_parameters[name].shape for name in sorted(self.projected)}
            modules = {name: (rows, columns) for name, (rows, columns) in rows_columns.items()}
        return Template(modules, rank, alpha, rslora, seed, num_clients, adaptive)

    def target_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights whose gradient a server can ask for: of the base layers by module, or the trained by name.

        Raises
        ------
        FedspanError
            For a base that is not in floating point.
        """
        if self.trains != "adapter":
            return {name: self.dense_parameters[name] for name in sorted(self.projected)}
        weights = {
            name: layer.whole if isinstance(layer, Expert) else base_layer(layer).weight
            for name, layer in self.layers.items()
        }
        for name, weight in weights.items():
            if not weight.is_floating_point():
                raise FedspanError(f"{name} is held as {weight.dtype}: expected a floating-point base for its gradient")
        return weights

    @contextmanager
    def differentiable(self, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Let these weights and nothing else collect gradients; afterwards there are none."""
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
        """Return a copy of the gradient of a module's weight, in float32 on the CPU and of the template's shape.

        It is zero for a layer that the data does not reach.
        """
        layer = self.layers.get(name)
        if isinstance(layer, Expert):
            return gradient_of(layer).detach().float().cpu().contiguous()
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        grad = grad.detach().float().cpu()
        transposed = self.trains == "adapter" and is_conv1d(base_layer(self.layers[name]))
        return (grad.T if transposed else grad).contiguous()

    def digest(self) -> str:
        """Return the SHA-256 of the untouched base (names, types, shapes and bits), before anything is loaded into it.

        Two sites with the same digest have bit-identical base weights.
        """
        digest = hashlib.sha256()
        held = {name: t for name, t in self.model.state_dict().items() if ".lora_" not in name}
        for name in sorted(held):
            tensor = held[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        return digest.hexdigest()

    def check(self, recipe: Recipe) -> None:
        """Check that a recipe fits this model's layers.

        Raises
        ------
        FedspanError
            When GaLore's rank is larger than a layer.
        """
        if recipe.galore is None:
            return
        for name in sorted(self.projected):
            m, n = self.dense_parameters[name].shape
            if recipe.galore.rank > min(m, n):
                raise FedspanError(
                    f"method.galore_rank = {recipe.galore.rank}: {name} is {m}×{n}, expected at most {min(m, n)}"
                )

    def load(self, broadcast: Broadcast) -> None:
        """Load a client's starting point: patch on the base, adapter, dense weights.

        Raises
        ------
        FedspanError
            When a module or weight is missing, unknown or of another shape: that of the client before would stay.
        """
        self.check_fits(broadcast)
        self.apply_patch(broadcast.patch)
        for name, factors in broadcast.adapter.items():
            set_adapter(self.layers[name], factors)
        with torch.no_grad():
            for name, value in broadcast.dense.items():
                self.dense_parameters[name].copy_(value)

    def check_fits(self, broadcast: Broadcast) -> None:
        """Check that a broadcast holds every module and weight of this model in its shape, and no others.

        Raises
        ------
        FedspanError
            Naming the first that is missing, unknown or of another shape.
        """
        expected: dict[str, tuple[int, ...]] = {name: p.shape for name, p in self.dense_parameters.items()}
        given: dict[str, tuple[int, ...]] = {name: value.shape for name, value in broadcast.dense.items()}
        if self.trains == "adapter":
            expected |= self.modules()
        given |= {name: (f.b.shape[0], f.a.shape[1]) for name, f in broadcast.adapter.items()}
        odd = sorted(expected.keys() ^ given.keys())
        if odd:
            raise FedspanError(f"the broadcast {'has an unknown' if odd[0] in given else 'lacks'} {odd[0]}")
        for name, shape in given.items():
            if shape != expected[name]:
                raise FedspanError(
                    f"the broadcast has {name} of shape {tuple(shape)}: expected {tuple(expected[name])}"
                )

    def trainable(self, recipe: Recipe) -> dict[str, nn.Parameter]:
        """Return the parameters that this recipe trains, by name, and freeze everything else."""
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
        """Return a copy of the adapter as it is now."""
        if self.trains != "adapter":
            return {}
        return {name: read_adapter(layer) for name, layer in self.layers.items()}

    def dense(self) -> dict[str, Tensor]:
        """Return copies of the dense weights as they are now, in float32 on the CPU."""
        return {name: p.detach().float().cpu().clone() for name, p in self.dense_parameters.items()}

    @contextmanager
    def training(self, compiled: bool = False, checkpointing: bool = False) -> Iterator[None]:
        """Set the model to training mode, with dropout on; afterwards it is in evaluation mode.

        Batch normalisation stays in evaluation mode: its statistics are the base's, in training as in every result
        that is saved, and each row is normalised as it would be alone.

        Parameters
        ----------
        compiled
            Compile the passes through the body: once for each rank that occurs, half a minute each.
        checkpointing
            Keep each block's input alone, and compute the block again in the backward pass.
        """
        body: Any = getattr(self.model, "base_model", self.model)
        if compiled:
            self._compiled = self._compiled or torch.compile(body.forward, dynamic=True)
            body.forward = self._compiled
        self.model.train()
        for layer in self.model.modules():
            if isinstance(layer, BatchNorm):
                layer.eval()
        writer: Any = self.model
        if checkpointing:
            # The reentrant form would need an input that requires a gradient, and the embeddings are frozen.
            activation_checkpointing(writer, "enable")({"use_reentrant": False})
            if self.places:
                checkpoint_in_place(self.model)
        # Not with either of them, which take the layers as they are.
        prefix = None if compiled or checkpointing else self.prefix
        try:
            with nullcontext() if prefix is None else prefix.training():
                yield
        finally:
            self.model.eval()
            if checkpointing:
                activation_checkpointing(writer, "disable")()
            if compiled:
                del body.forward  # which uncovers the method of its class

    def tail_penalty(self, tail: int) -> Tensor:
        """Return Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F over the modules, for k = `tail`."""
        pairs = [factors_of(layer) for layer in self.layers.values()]
        norms = [b[:, tail:].norm() * a[tail:].norm() for a, b in pairs]
        return torch.stack([norm.to(self.device) for norm in norms]).sum()

    def save_weights(self, path: str | os.PathLike[str], processor: Any) -> None:
        """Save the whole model and its processor as transformers does."""
        held: dict[str, Tensor] | None = None
        if self.places:
            # Copied as it was read, with weights that are shared still shared: by their addresses they are left out.
            own = self.model.state_dict(keep_vars=True)
            copies = {id(tensor): tensor.detach().cpu() for tensor in own.values()}
            held = {name: copies[id(tensor)] for name, tensor in own.items()}
        writer: Any = self.model
        with library_logs_silenced():
            writer.save_pretrained(os.fspath(path), state_dict=held)
            processor.save_pretrained(os.fspath(path))

    def save_adapter(
        self, path: str | os.PathLike[str], factors: Mapping[str, Factors], dense: Mapping[str, Tensor]
    ) -> None:
        """Save a PEFT adapter folder for the untouched base, with the heads as its `modules_to_save`.

        A weight that another module shares is saved for both: PEFT gives each of them a copy of its own.
        """
        conv = [name for name, layer in self.layers.items() if is_conv1d(base_layer(layer))]
        modules = (*self.heads, *self._tied_modules(dense))
        stacks = stacks_of(self.experts)
        peft_folder.save(
            Path(path),
            renamed(with_start(self.start, factors), stacks),
            base_model=resolve(self.name),
            task_type=self._task_type(),
            dense=self._with_all_that_peft_reads(dense, modules),
            modules_to_save=modules,
            fan_in_fan_out=bool(conv),
            stacks={path: parameter.shape[0] for path, parameter in stacks.items()},
            target_parameters=[parameter.path for parameter in self.experts],
        )

    def _task_type(self) -> str | None:
        """Return PEFT's name for what the model does."""
        answers = self.kind == "instruction" and getattr(self.model.config, "is_encoder_decoder", False)
        return "SEQ_2_SEQ_LM" if answers else _TASK_TYPES[self.kind]

    def _tied_modules(self, dense: Mapping[str, Tensor]) -> list[str]:
        """Return the modules outside the heads that share a trained weight with one of them."""
        trained = {id(self.dense_parameters[name]) for name in dense}
        owners = (n for n, p in self.model.named_parameters(remove_duplicate=False) if id(p) in trained)
        return [n.rpartition(".")[0] for n in owners if not any(n.startswith(f"{head}.") for head in self.heads)]

    def _with_all_that_peft_reads(self, dense: Mapping[str, Tensor], modules: Sequence[str]) -> dict[str, Tensor]:
        """Return the trained weights with everything else that PEFT expects of modules with these name endings.

        It takes every module whose name ends in one of them for a saved one, and wants all of its tensors: buffers of
        batch normalisation in a head, and the layers of the body that are called like a head (`norm`).
        """
        matched = [n for n, _ in self.model.named_modules(remove_duplicate=False) if n.endswith(tuple(modules))]
        held = {n: t for n, t in self.model.state_dict().items() if any(n.startswith(f"{m}.") for m in matched)}
        names = {id(p): n for n, p in self.dense_parameters.items() if n in dense}
        shared = {n: names.get(id(p), n) for n, p in self.model.named_parameters(remove_duplicate=False)}
        found = {n: dense.get(shared.get(n, n), t.detach()) for n, t in held.items() if ".lora_" not in n}
        return {**dense, **found}

    def apply_patch(self, patch: Mapping[str, Patch]) -> None:
        """Make the base the untouched base plus `patch`, in place of the patch before."""
        if patch is self._patch and self._patched_for == self.products:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        with torch.no_grad():
            for name in self._patch.keys() | patch.keys():
                self._patch_layer(name, patch.get(name))
        self._patch, self._patched_for = patch, self.products

    def untouched_weight(self, name: str, layer: Any) -> Tensor:
        """Return a base layer's weight without any patch; `name` is the target module's, "" for another layer."""
        weight: Tensor = self._originals.get(name, layer.weight.data)
        return weight

    def _patch_layer(self, name: str, patch: Patch | None) -> None:
        layer = base_layer(self.layers[name])
        if isinstance(layer, Expert):
            layer.patch = patch
            return
        weight = layer.weight
        if patch is not None and (weight.dtype, self.products) != (torch.float32, torch.float32):
            # A patch smaller than the base's rounding would be lost in the sum: it stays beside it in float32.
            if name in self._originals:
                weight.data = self._originals[name]
            self._hooks.append(layer.register_forward_hook(beside(patch, weight.device)))
            return
        # Always from the original, so that errors do not add up over the rounds; and never into it, because other
        # processes may be reading the same memory.
        original = self._originals.setdefault(name, weight.data)
        if patch is None:
            weight.data = original
            return
        delta = patch_dense(patch).to(weight.device)
        weight.data = original + (delta.T if is_conv1d(layer) else delta)


def activation_checkpointing(writer: Any, do: str) -> Any:
    """Return the method of that purpose, which older releases of transformers call by another name."""
    return getattr(writer, f"activation_checkpointing_{do}", None) or getattr(writer, f"gradient_checkpointing_{do}")
