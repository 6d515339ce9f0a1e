"""Checks of a base by its values, before anything is trained: a fault of the base is named as the base's.

Shapes: t tokens of a sequence; V the vocabulary.
"""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.support.errors import FedspanError, first_line

_LENGTH = 8
_LEAK = 1e-5
"""Share of a changed token's own effect up to which its effect on earlier positions is rounding, in float32."""
_COARSE_LEAK = 2e-2
"""The same in types of 16 bits and fewer, whose rounding differs with the tokens that experts are given together."""
_SMALL = 2**26
"""Parameters up to which a base in 16 bits is copied to float32, where that decides."""
_POSITIONS = frozenset({"position_embeddings", "wpe", "embed_positions", "pos_emb"})
"""Names of tables with one row for each position."""


def check_finite(model: nn.Module, name: str, dtype: str) -> None:
    """Refuse a base with a weight that is NaN or infinite.

    Parameters
    ----------
    name, dtype
        The settings `model.name` and `model.dtype`, for the message.

    Raises
    ------
    FedspanError
        Naming the first such weight.
    """
    for key, value in chain(model.named_parameters(), model.named_buffers()):
        if _is_finite(value):
            continue
        # Masks are buffers that are filled with minus infinity on purpose, and are no weights.
        if isinstance(value, nn.Parameter) or bool(value.isnan().any()):
            raise FedspanError(
                f"model.name = {name!r}: its weight {key} holds NaN or infinity, read as {dtype}; "
                f"expected a base of finite weights"
            )


def _is_finite(x: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel():
        return True
    # Both extremes in one pass, without a mask as large as the tensor; NaN propagates to them.
    return all(math.isfinite(float(end)) for end in torch.aminmax(x.detach()))


@torch.no_grad()
def check_causal(model: Any, name: str) -> None:
    """Refuse a base whose logits depend on later tokens, by values: an encoder that is read as a causal model.

    Its training loss would be that of copying the answer, and its generation that of another model.

    Raises
    ------
    FedspanError
        Where a later token changes earlier logits, or the base gives none that are finite.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return  # its encoder is given the prompt alone, and its decoder the answer
    own, earlier = _effects(model, name)
    if not math.isfinite(own + earlier):
        raise FedspanError(f"model.name = {name!r}: its output is NaN or infinite; expected a base that computes")
    types, size = {p.dtype for p in model.parameters()}, sum(p.numel() for p in model.parameters())
    if earlier and types <= {torch.float16, torch.bfloat16} and size <= _SMALL:
        own, earlier = _effects(copy.deepcopy(model).float(), name)
        types = {torch.float32}
    if earlier > (_LEAK if types == {torch.float32} else _COARSE_LEAK) * own:
        raise FedspanError(
            f"model.name = {name!r} ({model.config.model_type}) reads later tokens too, as encoders do, and cannot be "
            f"trained to write answers: expected a causal language model, or data with labels"
        )


def _effects(model: Any, name: str) -> tuple[float, float]:
    """Return the largest effect of the last token on the logits at its own position, and at those before it."""
    first, second = (_logits(model, name, ids) for ids in _probes(model))
    change = (first - second).abs()  # (t, V)
    return float(change[-1].max()), float(change[:-1].max())


def _embedding_rows(model: Any) -> int | None:
    """Return the number of token ids that a base's embedding has rows for; None where ids are hashed (CANINE)."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:  # of transformers, for models without such a table
        return None


def _probes(model: Any) -> tuple[Tensor, Tensor]:
    """Return two sequences (1, t) that differ in their last token."""
    size = model.get_input_embeddings().weight.shape[0]
    # Spread over the vocabulary, whose ends are full of special tokens.
    ids = torch.arange(1, _LENGTH + 2) * max(1, size // (_LENGTH + 2)) % size
    device = model.get_input_embeddings().weight.device
    return ids[:-1][None].to(device), torch.cat([ids[:-2], ids[-1:]])[None].to(device)


def _logits(model: Any, name: str, ids: Tensor) -> Tensor:
    """Return (t, V) logits in float32."""
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    except Exception as error:  # whatever an architecture asserts
        raise FedspanError(
            f"model.name = {name!r} fails on {_LENGTH} tokens ({first_line(error)}); expected a causal language model"
        ) from None
    return logits


@torch.no_grad()
def check_pixels(model: Any, name: str, pixels: Tensor) -> None:
    """Refuse images of a size or number of channels that the base does not take.

    Parameters
    ----------
    pixels
        (1, channels, height, width), as the base's image processor gives them, on the model's device.

    Raises
    ------
    FedspanError
        With what the base says of them.
    """
    model.eval()
    try:
        model(pixel_values=pixels)
    except ValueError as error:  # by which transformers refuses them
        raise FedspanError(
            f"model.name = {name!r} does not take what its image processor makes of an image, "
            f"{'×'.join(map(str, pixels.shape[1:]))} ({first_line(error)}); expected the processor of that base"
        ) from None


def check_tokens(model: Any, name: str, largest_id: int, longest: int, largest_type: int | None) -> None:
    """Refuse data that reaches beyond the tables of the base.

    Parameters
    ----------
    largest_id, longest, largest_type
        Of the encoded data: the largest token id, tokens of the longest row, largest token type (none: no types).

    Raises
    ------
    FedspanError
        Naming the setting and the limit.
    """
    rows = _embedding_rows(model)
    if rows is None:
        # Its positions are hashed too, so that no table tells their number.
        _check_positions(name, longest, model.config.max_position_embeddings)
    elif largest_id >= rows:
        raise FedspanError(
            f"model.name = {name!r}: its tokenizer gives the token id {largest_id}, and its embedding has {rows} rows; "
            f"expected the tokenizer that belongs to the base"
        )
    for key, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        table = key.rpartition(".")[2]
        if table in _POSITIONS:
            _check_positions(name, longest, usable_positions(table, module))
        if table == "token_type_embeddings" and largest_type is not None and largest_type >= module.num_embeddings:
            raise FedspanError(
                f"model.name = {name!r}: its tokenizer gives the token type {largest_type}, and the base has "
                f"{module.num_embeddings}; expected the tokenizer that belongs to the base, or one text in "
                f"data.text_columns"
            )


def usable_positions(name: str, table: nn.Embedding) -> int:
    """Return the longest sequence that a table of positions, of that name in its model, is for."""
    # RoBERTa's kind numbers positions from the padding token's id plus one, BART's from a constant.
    unused = getattr(table, "offset", 0)
    if name == "position_embeddings" and table.padding_idx is not None:
        unused = table.padding_idx + 1
    return int(table.num_embeddings - unused)


def _check_positions(name: str, longest: int, positions: int) -> None:
    if longest > positions:
        raise FedspanError(
            f"data.max_length: a row has {longest} tokens, and model.name = {name!r} has {positions} positions; "
            f"expected data.max_length of at most {positions}"
        )
