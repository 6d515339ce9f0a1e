"""The base model and the places in it where a client's adapter, patch and dense weights go.

The only file that imports transformers and peft (inside functions: they take seconds).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedspan import adapters
from fedspan.builtin import base_path
from fedspan.lowrank import LowRank
from fedspan.methods.base import Broadcast, Factors, Patch, Recipe, Template, generator, patch_dense

Kind = Literal["instruction", "classification", "image"]
Trains = Literal["adapter", "targets", "all"]
_TASK_TYPES: Mapping[str, str | None] = {"instruction": "CAUSAL_LM", "classification": "SEQ_CLS", "image": None}


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Run code that draws from the global generator (dropout, a library's initialisation) on a stream of its own.

    The global state is restored afterwards, so that nothing else depends on how much was drawn.
    """
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator(*key).initial_seed())
        yield


def resolve(name: str) -> str:
    """The folder of a `builtin:` base, or the name as it is."""
    return str(base_path(name.removeprefix("builtin:"))) if name.startswith("builtin:") else name


def load_processor(name: str, kind: Kind) -> Any:
    """The tokenizer of a text model or the image processor of a vision model.

    Raises
    ------
    ValueError
        When it cannot be read, saying how to give a local folder.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    with _reading(name):
        if kind == "image":
            return AutoImageProcessor.from_pretrained(resolve(name), backend="pil")
        return AutoTokenizer.from_pretrained(resolve(name))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn a library's many ways of failing to read a model into one line that says what to do."""
    try:
        yield
    except Exception as error:  # it, its hub client and safetensors share no base class of errors
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model.name = {name!r} could not be read ({first}); expected a local folder with config.json, weights and "
            f"tokenizer or processor, or a hub id that can be reached from here"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's bars and advice (that a head is new is no news), which would cut through the display."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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

    def template_modules(self) -> dict[str, tuple[int, int]]:
        """Module name -> (m, n)."""
        return {name: _shape(_base_layer(layer)) for name, layer in self.layers.items()}

    def check(self, recipe: Recipe) -> None:
        """Raise a ValueError for a recipe that does not fit this model's layers."""
        if recipe.galore is None:
            return
        for name in sorted(self.projected):
            m, n = self.dense_parameters[name].shape
            if recipe.galore.rank > min(m, n):
                raise ValueError(
                    f"method.galore_rank = {recipe.galore.rank}: {name} is {m}×{n}, expected at most {min(m, n)}"
                )

    def load(self, broadcast: Broadcast) -> None:
        """Put a client's starting point into the model: patch on the base, adapter, dense weights.

        Raises
        ------
        ValueError
            When a module or weight is missing, unknown or of another shape: what the client before left would stay.
        """
        self._check_fits(broadcast)
        self._apply_patch(broadcast.patch)
        for name, factors in broadcast.adapter.items():
            _set_adapter(self.layers[name], factors, self.device)
        with torch.no_grad():
            for name, value in broadcast.dense.items():
                self.dense_parameters[name].copy_(value)

    def _check_fits(self, broadcast: Broadcast) -> None:
        expected: dict[str, tuple[int, ...]] = {name: p.shape for name, p in self.dense_parameters.items()}
        given: dict[str, tuple[int, ...]] = {name: value.shape for name, value in broadcast.dense.items()}
        if self.trains == "adapter":
            expected |= self.template_modules()
        given |= {name: (f.b.shape[0], f.a.shape[1]) for name, f in broadcast.adapter.items()}
        odd = sorted(expected.keys() ^ given.keys())
        if odd:
            raise ValueError(f"a broadcast {'with an unknown' if odd[0] in given else 'without'} {odd[0]}")
        for name, shape in given.items():
            if shape != expected[name]:
                raise ValueError(f"a broadcast with {name} of shape {tuple(shape)}: expected {tuple(expected[name])}")

    def trainable(self, recipe: Recipe) -> dict[str, nn.Parameter]:
        """The parameters that this recipe trains, by name; everything else is frozen."""
        chosen: dict[str, nn.Parameter] = {}
        if self.trains == "adapter":
            for name, layer in self.layers.items():
                a, b = _factors(layer)
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
        return {name: _read_adapter(layer) for name, layer in self.layers.items()}

    def dense(self) -> dict[str, Tensor]:
        """Copies of the dense weights as they stand, in float32 on the CPU."""
        return {name: p.detach().float().cpu().clone() for name, p in self.dense_parameters.items()}

    def tail_penalty(self, tail: int) -> Tensor:
        """Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F over the modules."""
        pairs = [_factors(layer) for layer in self.layers.values()]
        return torch.stack([b[:, tail:].norm() * a[tail:].norm() for a, b in pairs]).sum()

    def save_weights(self, path: Path, processor: Any) -> None:
        """The whole model and its processor, as transformers saves them."""
        with _quiet():
            self.model.save_pretrained(str(path))  # type: ignore[operator]
            processor.save_pretrained(str(path))

    def save_adapter(self, path: Path, factors: Mapping[str, Factors], dense: Mapping[str, Tensor]) -> None:
        """A PEFT adapter folder for the untouched base, heads included as `modules_to_save`."""
        conv = [name for name, layer in self.layers.items() if _is_conv1d(_base_layer(layer))]
        adapters.save(
            path,
            factors,
            base_model=resolve(self.name),
            task_type=_TASK_TYPES[self.kind],
            dense=dense,
            modules_to_save=self.heads,
            fan_in_fan_out=bool(conv),
        )

    def _apply_patch(self, patch: Mapping[str, Patch]) -> None:
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
        layer = _base_layer(self.layers[name])
        weight = layer.weight
        if patch is not None and weight.dtype != torch.float32:
            # A patch smaller than the base's rounding would vanish in it: it stays beside it in float32.
            self._hooks.append(layer.register_forward_hook(_beside(patch, self.device)))
            return
        if patch is None:
            if name in self._originals:
                weight.copy_(self._originals[name])
            return
        if name not in self._originals:
            self._originals[name] = weight.detach().clone()
        original = self._originals[name]
        delta = patch_dense(patch).to(self.device)
        # Always from the original, so that errors do not add up over the rounds.
        weight.copy_(original + (delta.T if _is_conv1d(layer) else delta))


def _in_float32(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a half-precision body hands to a head that is trained in float32."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _beside(patch: Patch, device: torch.device) -> Any:
    factors = patch if isinstance(patch, LowRank) else None
    b = factors.b.float().to(device) if factors else None
    a = factors.a.float().to(device) if factors else None
    dense = None if isinstance(patch, LowRank) else patch.float().to(device)

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].float()
        extra = x @ dense.T if dense is not None else (x @ a.T) @ b.T  # type: ignore[union-attr]
        return (output.float() + extra).to(output.dtype)

    return hook


def build(
    name: str,
    kind: Kind,
    *,
    trains: Trains,
    num_labels: int,
    target_modules: tuple[str, ...],
    max_rank: int,
    rslora: bool,
    dropout: float,
    dtype: str,
    device: torch.device,
    seed: int,
    label_names: tuple[str, ...] | None = None,
    regression: bool = False,
    pad_token_id: int | None = None,
) -> FederatedModel:
    """Load the base and attach what `trains` asks for.

    Parameters
    ----------
    pad_token_id
        What the batches are padded with; none: as the base's own configuration says.

    Raises
    ------
    ValueError
        When the base cannot be read, no layer matches `target_modules`, or a rank exceeds a layer's size.
    """
    kept = dtype if trains == "adapter" else "float32"
    base, new = _load_base(name, kind, num_labels, kept, seed, label_names, regression, pad_token_id)
    base.to(device)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    own = dict(base.named_parameters())
    heads = _heads(base, kind, name, new & own.keys())
    targets = _targets(base, target_modules, heads)
    head_names = {n for n in own if _within(n, heads)}
    for layer_name, layer in targets.items():
        m, n = _shape(layer)
        if trains == "adapter" and max_rank > min(m, n):
            raise ValueError(
                f"rank {max_rank} is above what {layer_name} ({m}×{n}) can hold: expected at most {min(m, n)}"
            )
    weights = {f"{layer_name}.weight" for layer_name in targets}
    chosen = {"adapter": head_names, "targets": head_names | weights, "all": set(own)}[trains]
    dense = {n: own[n] for n in own if n in chosen}
    for parameter in dense.values():
        parameter.data = parameter.data.float()
    if kept != "float32":
        for head in heads:
            base.get_submodule(head).register_forward_pre_hook(_in_float32)
    model: nn.Module = base
    layers: Mapping[str, Any] = targets
    if trains == "adapter":
        with seeded(seed, "adapter"):
            model, layers = _attach(base, targets, max_rank, rslora, dropout)
    return FederatedModel(name, kind, trains, model, layers, dense, frozenset(weights & chosen), heads, device)


def _load_base(
    name: str,
    kind: Kind,
    num_labels: int,
    dtype: str,
    seed: int,
    label_names: tuple[str, ...] | None,
    regression: bool,
    pad_token_id: int | None,
) -> tuple[Any, set[str]]:
    """The base in evaluation of its kind, and the names of parameters that its files did not hold."""
    import transformers

    auto = {
        "instruction": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
    }[kind]
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if kind != "instruction":
        options |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}
        if label_names:
            options |= {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
        if regression:
            options["problem_type"] = "regression"
    # A new head is drawn from the run's seed, the same for every method.
    with _quiet(), _reading(name), seeded(seed, "head"):
        model, info = auto.from_pretrained(resolve(name), output_loading_info=True, use_safetensors=True, **options)
    if pad_token_id is not None:
        # A decoder classifies from the last token that is no padding, and knows padding by its id alone.
        model.config.pad_token_id = pad_token_id
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())}
    return model, set(info["missing_keys"]) | mismatched


def _heads(base: Any, kind: Kind, name: str, new: Collection[str]) -> tuple[str, ...]:
    """The modules to train whole: all beside the body of a classifier, and a pooler that the files did not hold.

    Raises
    ------
    ValueError
        When the files lack anything else: it would be random, and nothing would say so.
    """
    heads: tuple[str, ...] = ()
    if kind != "instruction":
        beside = (child for child in base.named_children() if child[0] != base.base_model_prefix)
        heads = tuple(name for name, child in beside if any(True for _ in child.parameters()))
    lacking = sorted(n for n in new if not _within(n, heads))
    for parameter in lacking:
        if kind == "instruction" or "pooler" not in parameter.split("."):
            raise ValueError(
                f"model.name = {name!r}: its files lack {len(lacking)} of the model's weights, such as {parameter}; "
                f"expected a complete base"
            )
    return heads + tuple(sorted({parameter.rpartition(".")[0] for parameter in lacking}))


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _targets(base: nn.Module, wanted: tuple[str, ...], heads: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers whose names end in one of `wanted`, in the model's order."""
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None  # type: ignore[operator]
    linear = {
        name: layer
        for name, layer in base.named_modules()
        if (isinstance(layer, nn.Linear) or _is_conv1d(layer)) and layer is not output and not _within(name, heads)
    }
    if tuple(wanted) == ("all-linear",):
        if not linear:
            raise ValueError("adapter.target_modules: this model has no linear layer beside its head")
        return linear
    chosen = {
        name: layer for name, layer in linear.items() if any(name == end or name.endswith("." + end) for end in wanted)
    }
    for end in wanted:
        if not any(name == end or name.endswith("." + end) for name in chosen):
            endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(
                f"adapter.target_modules: {end!r} matches no linear layer; this model has {', '.join(endings)}"
            )
    return chosen


def _attach(
    base: nn.Module, targets: Mapping[str, nn.Module], rank: int, rslora: bool, dropout: float
) -> tuple[nn.Module, dict[str, Any]]:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(targets),
        lora_dropout=dropout,
        use_rslora=rslora,
        fan_in_fan_out=any(_is_conv1d(layer) for layer in targets.values()),
    )
    model = inject_adapter_in_model(config, base)
    return model, {name: model.get_submodule(name) for name in targets}


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"


def _base_layer(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _shape(layer: Any) -> tuple[int, int]:
    """(m, n) = (out_features, in_features), whichever way the layer stores its weight."""
    rows, columns = layer.weight.shape
    return (columns, rows) if _is_conv1d(layer) else (rows, columns)


_SLOT = "default"


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_SLOT].weight, layer.lora_B[_SLOT].weight


def _set_adapter(layer: Any, factors: Factors, device: torch.device) -> None:
    """New parameters, of whatever rank: nothing of the client before is left."""
    layer.lora_A[_SLOT].weight = nn.Parameter(factors.a.detach().float().to(device, copy=True))
    layer.lora_B[_SLOT].weight = nn.Parameter(factors.b.detach().float().to(device, copy=True))
    layer.r[_SLOT] = factors.rank
    layer.scaling[_SLOT] = factors.scaling


def _read_adapter(layer: Any) -> Factors:
    a, b = _factors(layer)
    return Factors(b.detach().cpu().clone(), a.detach().cpu().clone(), layer.scaling[_SLOT])


def make_template(model: FederatedModel, rank: int, alpha: float, rslora: bool, seed: int) -> Template:
    """The run's template over this model's modules."""
    return Template(model.template_modules(), rank, alpha, rslora, seed)
