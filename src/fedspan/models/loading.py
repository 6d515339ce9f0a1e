"""Bases, tokenizers and image processors, read by transformers (imported inside functions: it takes seconds)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from fedspan.adapters.peft_folder import CONFIG_NAME
from fedspan.data.builtin import base_path
from fedspan.data.rows import Kind
from fedspan.models import quantised
from fedspan.models.base_checks import check_finite
from fedspan.models.streams import rates_of_dropout
from fedspan.support.errors import FedspanError, first_line
from fedspan.support.paths import exists
from fedspan.support.seeding import generator

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Code that lies beside a base is never run. Unless told so, transformers asks on a terminal, and runs it on a yes."""


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Run code that draws from the global generator (dropout, a library's initialisation) on a stream of its own.

    The global state is restored afterwards, so that nothing else depends on how many numbers were drawn.
    """
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator(*key).initial_seed())
        yield


def resolve(name: str) -> str:
    """Return the folder of a `builtin:` base, or the name, with `~` for the home folder."""
    if name.startswith("builtin:"):
        return str(base_path(name.removeprefix("builtin:")))
    return os.path.expanduser(name) if name.startswith("~") else name


def load_processor(name: str, kind: Kind) -> Any:
    """Load the tokenizer of a text model or the image processor of a vision model.

    A tokenizer without an end token is given that of the model's own configuration, if it names one.

    Raises
    ------
    FedspanError
        When it cannot be read, the message naming the alternatives; when it needs code of the base's own; or for a
        tokenizer that was made up because the base has no tokenizer files.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    with _reading(name):
        if kind == "image":
            return AutoImageProcessor.from_pretrained(resolve(name), backend="pil", **NO_CODE)
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), **NO_CODE)
    if all(i in tokenizer.all_special_ids for i in tokenizer.get_vocab().values()) or len(tokenizer) < 6:
        raise FedspanError(
            f"model.name = {name!r} has no usable tokenizer files (transformers makes one up, of "
            f"vocabulary size {len(tokenizer)}): expected the base's own, such as tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        end = getattr(read_config(name), "eos_token_id", None)
        if isinstance(end, int):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def read_config(name: str, **labels: Any) -> Any:
    """Read the configuration of a base, with other labels than it states where they are given.

    Raises
    ------
    FedspanError
        When it cannot be read, or needs code of the base's own.
    """
    from transformers import AutoConfig

    with library_logs_silenced(), _reading(name):
        return AutoConfig.from_pretrained(resolve(name), **NO_CODE, **labels)


def fills_masks(model_type: str) -> bool:
    """Return whether models of this type are made to fill in masked words."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def read_generation_config(name: str) -> Any:
    """Read the settings for generation that lie beside a base; None where there are none."""
    from transformers import GenerationConfig

    with library_logs_silenced(), _reading(name):
        try:
            return GenerationConfig.from_pretrained(resolve(name))
        except OSError:  # there is no such file, as for most encoders
            return None


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn the many errors of reading a model into one line that says what to do."""
    _check_no_adapter(name)
    try:
        yield
    except Exception as error:  # transformers, its hub client and safetensors share no base class of errors
        if "trust_remote_code" in str(error):
            raise FedspanError(
                f"model.name = {name!r} needs code of its own (auto_map in its files), which is never run here: "
                f"expected a base of an architecture that transformers knows"
            ) from None
        raise FedspanError(
            f"model.name = {name!r} could not be read ({first_line(error)}); expected a local folder with config.json, "
            f"weights and tokenizer or processor, or a hub id that can be reached from here"
        ) from None


def _check_no_adapter(name: str) -> None:
    """Refuse a folder that holds an adapter in place of a base: transformers would read its base in silence."""
    if name.startswith("builtin:"):
        return
    folder = Path(resolve(name))
    if not exists(folder / CONFIG_NAME) or exists(folder / "config.json"):
        return
    try:
        base = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    own = f", {base!r}," if isinstance(base, str) else ""
    raise FedspanError(
        f"model.name = {name!r} is the folder of an adapter: expected its base{own} as model.name, and "
        f"model.adapter = {name!r} to start from the adapter"
    )


@contextmanager
def library_logs_silenced() -> Iterator[None]:
    """Run without the progress bars and advice of transformers, which would break into the display.

    Its advice is on what is intended here, such as a head that is new.
    """
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


@contextmanager
def without(package: str) -> Iterator[None]:
    """Run as if that package were not installed, for a library that imports every package it finds."""
    modules: dict[str, Any] = cast(Any, sys.modules)
    if package in modules:
        yield
        return
    modules[package] = None  # an import then fails
    try:
        yield
    finally:
        del modules[package]


def load_base(
    name: str,
    kind: Kind,
    num_labels: int,
    dtype: str,
    seed: int,
    label_names: tuple[str, ...] | None,
    regression: bool,
    pad_token_id: int | None,
    quantise: str = "none",
    new_head: bool = False,
    dropout: bool = True,
) -> tuple[Any, set[str], bool]:
    """Load the base for a kind of data; return it in evaluation mode, and the parameters that its files lack.

    The last value returned says that a head in its files was left for a new one.

    Parameters
    ----------
    new_head
        Draw the layer that gives the classes anew, although the files may have one of the same size.
    dropout
        Keep the dropout that the base's configuration names.

    Raises
    ------
    FedspanError
        When it cannot be read, its files are quantised already, or its weights are not finite.
    """
    import transformers

    auto: Any = {
        "instruction": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
    }[kind]
    labels = {} if kind == "instruction" else _labels(num_labels, label_names, regression)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "ignore_mismatched_sizes": kind != "instruction"}
    config = read_config(name, **labels)
    if not dropout:
        for part, rate in rates_of_dropout(config):
            setattr(part, rate, 0.0)
    if kind == "instruction" and getattr(config, "is_encoder_decoder", False):
        auto = transformers.AutoModelForSeq2SeqLM
    if getattr(config, "quantization_config", None) is not None:
        raise FedspanError(
            f"model.name = {name!r}: its files are quantised already; expected float32, bfloat16 or float16 weights, "
            f"which model.quantise = 'int8' or 'nf4' quantises as they are read"
        )
    with library_logs_silenced(), _reading(name):
        if quantise != "none":
            options |= _quantised(auto, config, kind, quantise, options["dtype"])
        # A new head is drawn from the run's seed, the same for every method.
        with seeded(seed, "head"):
            model, info = auto.from_pretrained(
                resolve(name), config=config, output_loading_info=True, use_safetensors=True, **NO_CODE, **options
            )
    check_finite(model, name, dtype)
    if quantise != "none":
        quantised.take_over(model)
    if pad_token_id is not None:
        # A decoder classifies from the last token that is not padding, which it recognises by its id alone.
        model.config.pad_token_id = pad_token_id
    # A head of another size is drawn at random, and counts as missing.
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())}
    missing = set(info["missing_keys"]) | mismatched
    redrawn = _redraw_head(model, kind, num_labels, missing, seed) if new_head else set()
    return model, missing | redrawn, bool(mismatched or redrawn)


def _redraw_head(model: Any, kind: Kind, num_labels: int, missing: set[str], seed: int) -> set[str]:
    """Draw the layer that gives the classes anew where the files had one, and return the names of its parameters."""
    std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    heads, drawn = head_names(model, kind), set()
    with seeded(seed, "head"), torch.no_grad():
        for name, parameter in model.named_parameters():
            last = parameter.shape[0] == num_labels and name.startswith(tuple(f"{head}." for head in heads))
            if last and name not in missing:
                drawn.add(name)
                parameter.copy_(torch.randn(parameter.shape) * std if parameter.ndim > 1 else torch.zeros(num_labels))
    return drawn


def _labels(num_labels: int, names: tuple[str, ...] | None, regression: bool) -> dict[str, Any]:
    """Return the entries of a classifier's configuration that describe its labels."""
    labels: dict[str, Any] = {"num_labels": num_labels}
    if names:
        labels |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if regression:
        labels["problem_type"] = "regression"
    return labels


def _quantised(auto: Any, config: Any, kind: Kind, quantise: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options by which all of the base is quantised as it is read, except its heads and output layer."""
    from transformers import BitsAndBytesConfig

    with seeded("skeleton"), torch.device("meta"):
        skeleton = auto.from_config(config, **NO_CODE)
    output = skeleton.get_output_embeddings()
    excluded = [name for name, layer in skeleton.named_modules() if layer is output or name.endswith("pooler")]
    options = quantised.settings(quantise, dtype, [*excluded, *head_names(skeleton, kind)])
    # On the CPU, so that the weights have the same bits whatever the run's device is.
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}}


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """Return the causal language model of a configuration without values, on torch's device `meta`."""
    import transformers

    with seeded("skeleton"), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **NO_CODE)


def head_names(base: Any, kind: Kind) -> tuple[str, ...]:
    """Return the modules beside the body of a classifier, which are trained whole."""
    if kind == "instruction":
        return ()
    children = {name: child for name, child in base.named_children() if any(True for _ in child.parameters())}
    body = base.base_model_prefix
    if body not in children:  # one of several towers, as of CLIP
        body = max(children, key=lambda name: sum(p.numel() for p in children[name].parameters()))
    beside = (child for child in children.items() if child[0] != body)
    return tuple(name for name, child in beside if any(True for _ in child.parameters()))
