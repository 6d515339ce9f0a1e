"""Bases, tokenizers and image processors, read by transformers (imported inside functions: it takes seconds)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from fedspan.builtin import base_path
from fedspan.seeding import generator

Kind = Literal["instruction", "classification", "image"]


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

    A tokenizer that does not say which token ends a text is told so by the model's own configuration, where that does.

    Raises
    ------
    ValueError
        When it cannot be read, saying how to give a local folder.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    with _reading(name):
        if kind == "image":
            return AutoImageProcessor.from_pretrained(resolve(name), backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(resolve(name))
        if tokenizer.eos_token_id is None:
            end = getattr(AutoConfig.from_pretrained(resolve(name)), "eos_token_id", None)
            if isinstance(end, int):
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        return tokenizer


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
def quiet() -> Iterator[None]:
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


def load_base(
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
    with quiet(), _reading(name), seeded(seed, "head"):
        model, info = auto.from_pretrained(resolve(name), output_loading_info=True, use_safetensors=True, **options)
    if pad_token_id is not None:
        # A decoder classifies from the last token that is no padding, and knows padding by its id alone.
        model.config.pad_token_id = pad_token_id
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())}
    return model, set(info["missing_keys"]) | mismatched
