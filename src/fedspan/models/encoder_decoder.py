"""Encoder-decoders with instruction data: how their decoders begin, and the check that their loss is the plain one."""

from __future__ import annotations

from typing import Any

import torch

from fedspan.data.encoded import Encoded
from fedspan.data.encoder_decoder import DecoderStart
from fedspan.data.rows import Kind
from fedspan.data.text_ids import added_tokens
from fedspan.models.federated_model import FederatedModel
from fedspan.models.loading import read_config, read_generation_config
from fedspan.models.losses import client_losses
from fedspan.support.errors import FedspanError

_LAST_FIRST = ("mbart", "plbart")
"""Models whose decoder is given the last token of an answer first: the language."""
_FINE, _COARSE = 1e-4, 5e-2
"""Relative difference between two ways to compute one loss, in float32 and in half precision, in which some models
also add the loss up."""


def decoder_start(name: str, kind: Kind, tokenizer: Any) -> DecoderStart | None:
    """Return how the decoder of a base begins an answer, or None where it is no encoder-decoder for such data.

    Raises
    ------
    FedspanError
        When the base does not say it.
    """
    if kind != "instruction":
        return None
    config = read_config(name)
    if not is_encoder_decoder(config):
        return None
    generation = read_generation_config(name)
    forced = _stated("forced_bos_token_id", generation, config)
    _, trailing = added_tokens(tokenizer, target=True)
    if config.model_type in _LAST_FIRST and trailing:
        return DecoderStart(trailing[-1], forced)
    token = _stated("decoder_start_token_id", config, generation)
    if token is None and hasattr(config, "decoder"):
        token = _stated("bos_token_id", config.decoder)  # T5Gemma's two halves have configurations of their own
    if token is None:
        raise FedspanError(
            f"model.name = {name!r}: an encoder-decoder whose config.json has no decoder_start_token_id: expected one"
        )
    return DecoderStart(token, forced)


def is_encoder_decoder(config: Any) -> bool:
    """Return whether a model's configuration is that of an encoder-decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def _stated(key: str, *configs: Any) -> int | None:
    """Return the first of these configurations' values that is a token."""
    values = (getattr(config, key, None) for config in configs)
    return next((value for value in values if isinstance(value, int)), None)


@torch.no_grad()
def check_loss(model: FederatedModel, data: Encoded) -> None:
    """Check, on the first example, that the loss as it is trained on is the one that the model itself computes.

    Raises
    ------
    FedspanError
        When it is not: the model's decoder begins, or its loss is computed, in a way of its own.
    """
    batch = {name: value.to(model.device) for name, value in data.batch([0]).items()}
    own = client_losses(model, batch)
    given = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    plain = model.model(**given, use_cache=False).loss
    tolerance = _FINE if plain.dtype == next(model.model.parameters()).dtype == torch.float32 else _COARSE
    if not torch.allclose(own.double(), plain.double(), rtol=tolerance):
        raise FedspanError(
            f"model.name = {model.name!r}: the loss of this encoder-decoder is {float(plain):.6g}, and its output "
            f"layer gives {float(own):.6g}: expected one whose loss is the cross-entropy of the answer's tokens"
        )
