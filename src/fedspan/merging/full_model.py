"""A merged adapter written as a whole model: the base with the changes added to its weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.adapters.experts import expert_name
from fedspan.adapters.state_dict import Adapter
from fedspan.data.rows import Kind
from fedspan.merging.labels import Entries, set_labels
from fedspan.models.experts import ExpertParameter, choose, stacks_of
from fedspan.models.layers import is_conv1d
from fedspan.models.loading import NO_CODE, library_logs_silenced, load_processor, resolve
from fedspan.support.errors import FedspanError, first_line

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task type -> the class of transformers that reads such a model."""
_PROCESSOR_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("chat_template*", "*processor_config.json"),
)


def write_model(path: Path, adapter: Adapter, dtype: torch.dtype | None = None, labels: Entries | None = None) -> None:
    """Write the adapter's base with W + s·B·A in place of its weights, as transformers saves a model, whole or not.

    The base's tokenizer or image processor is written beside it. Sums are computed in float32.

    Parameters
    ----------
    path
        A new or empty folder.
    dtype
        Type of the written floats; none: that of the base's own files.
    labels
        Entries of the model's configuration on its labels; none: as the base has them.

    Raises
    ------
    FedspanError
        When the adapter names no base, the base cannot be read, or it has no such modules; for weights that the base
        shares between layers.
    """
    name = adapter.base_model
    if name is None:
        raise FedspanError("the adapters name no base, which a whole model needs: expected --base NAME (base=NAME)")
    model = _base(name, adapter)
    if labels is not None:
        set_labels(model.config, labels)
    _add(name, model, adapter)
    if dtype is not None:
        model.to(dtype)
    _check_finite(name, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        with _writing(path), library_logs_silenced():
            model.save_pretrained(str(folder))
            _save_processor(name, adapter, folder)
        if path.exists():
            path.rmdir()  # empty, or this fails
        folder.rename(path)


def _base(name: str, adapter: Adapter) -> Any:
    """Load the base with the adapter's number of labels; only its heads may be missing in the files."""
    import transformers

    def config_of(**changes: Any) -> Any:
        return transformers.AutoConfig.from_pretrained(resolve(name), **NO_CODE, **changes)

    with library_logs_silenced(), _reading(name):
        config = config_of()
    kind = _class_of(name, adapter, config)
    with library_logs_silenced(), _reading(name):
        labels = _num_labels(config, kind, adapter)
        model, info = kind.from_pretrained(
            resolve(name),
            config=config if labels is None else config_of(num_labels=labels),
            dtype="auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **NO_CODE,
        )
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())}
    if lacking := sorted(({*info["missing_keys"]} | mismatched) - adapter.dense.keys()):
        raise FedspanError(
            f"base {name!r}: its files lack {len(lacking)} of the model's weights, such as {lacking[0]}, and so does "
            "the adapter: expected a complete base"
        )
    return model.eval()


def _class_of(name: str, adapter: Adapter, config: Any) -> Any:
    import transformers

    task = adapter.config.get("task_type")
    if task in _AUTO:
        return getattr(transformers, _AUTO[task])
    architecture = next(iter(getattr(config, "architectures", None) or ()), None)
    found = getattr(transformers, str(architecture), None)
    if found is None:
        raise FedspanError(
            f"base {name!r} has architecture {architecture!r}, and the adapter no task_type: expected one of "
            f"{', '.join(_AUTO)}, or an architecture of transformers"
        )
    return found


def _num_labels(config: Any, kind: Any, adapter: Adapter) -> int | None:
    """Return the number of labels of the adapter's head, where the base's own is another."""
    with torch.device("meta"):
        skeleton = kind.from_config(config, **NO_CODE) if hasattr(kind, "from_config") else kind(config)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    for name, tensor in adapter.dense.items():
        own = shapes.get(name)
        if own is not None and own != tuple(tensor.shape) and own[0] == config.num_labels:
            return int(tensor.shape[0])
    return None


def _experts_of(name: str, model: nn.Module, adapter: Adapter) -> dict[str, tuple[ExpertParameter, int]]:
    """Return the parameter and the number of every expert that the adapter changes."""
    if not adapter.stacks:
        return {}
    stacks = stacks_of(choose(model, adapter.config["target_parameters"], (), 0))
    if {path: parameter.shape[0] for path, parameter in stacks.items()} != dict(adapter.stacks):
        raise FedspanError(f"base {name!r} has other experts than the adapter: expected the adapter's base")
    return {
        expert_name(path, e): (parameter, e) for path, parameter in stacks.items() for e in range(parameter.shape[0])
    }


@torch.no_grad()
def _add(name: str, model: nn.Module, adapter: Adapter) -> None:
    experts = _experts_of(name, model, adapter)
    held = model.state_dict(keep_vars=True)  # statistics of batch normalisation too
    shared = _shared(held)
    for module, factors in adapter.factors.items():
        change = factors.delta().dense().float()
        if module in experts:
            parameter, e = experts[module]
            weight = _weight(name, held, shared, parameter.path, adapter)[e]
            transposed = parameter.transposed
        else:
            weight = _weight(name, held, shared, f"{module}.weight", adapter)
            transposed = module in adapter.embeddings or is_conv1d(model.get_submodule(module))
        change = change.T if transposed else change
        if change.shape != weight.shape:
            problem = f"{module} is {tuple(change.shape)} in the adapter and {tuple(weight.shape)} in it"
            raise FedspanError(f"base {name!r}: {problem}: expected the adapter's base")
        weight.copy_((weight.float() + change).to(weight.dtype))
    for key, value in (*adapter.dense.items(), *adapter.frozen.items()):
        own = key.replace(".base_layer.", ".")
        weight = _weight(name, held, {} if key in adapter.frozen else shared, own, adapter)
        if value.shape != weight.shape:
            problem = f"{key} is {tuple(value.shape)} in the adapter and {tuple(weight.shape)} in it"
            raise FedspanError(f"base {name!r}: {problem}: expected the adapter's base")
        if key not in adapter.frozen:
            weight.copy_(value.to(weight.dtype))


def _weight(
    name: str, held: Mapping[str, Tensor], shared: Mapping[str, Sequence[str]], key: str, adapter: Adapter
) -> Tensor:
    if key not in held:
        raise FedspanError(f"base {name!r} has no {key}, which the adapter changes: expected the adapter's base")
    value = adapter.dense.get(key)
    for other in shared.get(key, ()):
        # One weight under several names, all of which an adapter has whole, can be written as the one that it is.
        same = value is not None and other in adapter.dense and torch.equal(value, adapter.dense[other])
        if not same:
            raise FedspanError(
                f"base {name!r} has one weight for {key} and {other}, of which the adapter changes one alone, or each "
                "in a way of its own: expected an adapter, without --full (full=True)"
            )
    return held[key]


def _shared(held: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the weights with several names -> their other names."""
    names: dict[int, list[str]] = {}
    for key, weight in held.items():
        names.setdefault(id(weight), []).append(key)
    return {key: [n for n in group if n != key] for group in names.values() if len(group) > 1 for key in group}


def _check_finite(name: str, model: nn.Module) -> None:
    for key, parameter in model.named_parameters():
        value: Tensor = parameter
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FedspanError(
                f"base {name!r} with the change has NaN or infinite values in {key}: expected finite ones"
            )


def _save_processor(name: str, adapter: Adapter, folder: Path) -> None:
    """Write the base's tokenizer or image processor: its own files where they are at hand."""
    source = Path(resolve(name))
    if source.is_dir():
        for pattern in _PROCESSOR_FILES:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        return
    kinds: Mapping[object, Kind] = {"CAUSAL_LM": "instruction", "SEQ_2_SEQ_LM": "instruction", None: "image"}
    kind = kinds.get(adapter.config.get("task_type"), "classification")
    load_processor(name, kind).save_pretrained(str(folder))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers, its hub client and safetensors share no base class of errors
        raise FedspanError(
            f"base {name!r} could not be read ({first_line(error)}); expected a local folder with config.json and "
            "safetensors weights, or a hub id that can be reached from here"
        ) from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:  # its errors of the disk are no OSErrors
        raise FedspanError(f"{path} cannot be written ({first_line(error)}): expected a disk with room") from None
