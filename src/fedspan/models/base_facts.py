"""The facts that a base states in its configuration and its settings for generation."""

from __future__ import annotations

from typing import Any

from fedspan.data.base_facts import BaseFacts
from fedspan.models.loading import fills_masks, read_config, read_generation_config

_ROBERTA_LIKE = frozenset(
    {
        *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"),
        *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
"""Types of models that number positions from the padding token's id plus one, so that many rows of their table are
unused."""


def read_facts(name: str) -> BaseFacts:
    """Read the facts that the base called `name` states.

    Raises
    ------
    FedspanError
        When its configuration cannot be read.
    """
    config = read_config(name)
    text = config.get_text_config()
    names = getattr(config, "id2label", None) or {}
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    return BaseFacts(
        end_tokens=_end_tokens(text, read_generation_config(name)),
        vocabulary=_positive(getattr(text, "vocab_size", None)),
        num_positions=_num_positions(text),
        num_labels=len(names) or None,
        encoder=text.model_type if not encoder_decoder and _is_encoder(text) else None,
        label_names=tuple(str(names[i]) for i in sorted(names)) or None,
        classifies_at=_first(getattr(text, "eos_token_id", None)) if encoder_decoder else None,
    )


def _is_encoder(config: Any) -> bool:
    """Return whether the model is one that fills in masked words, and is not set to write."""
    return fills_masks(config.model_type) and not getattr(config, "is_decoder", False)


def _end_tokens(config: Any, generation: Any) -> tuple[int, ...]:
    stated = getattr(generation, "eos_token_id", None)
    ends = stated if stated is not None else getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return tuple(dict.fromkeys(int(end) for end in ends if isinstance(end, int) and end >= 0))


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, int) else None


def _num_positions(config: Any) -> int | None:
    limit = _positive(getattr(config, "max_position_embeddings", None))
    if limit is not None and config.model_type in _ROBERTA_LIKE:
        limit = _positive(limit - int(getattr(config, "pad_token_id", None) or 0) - 1)
    return limit


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
