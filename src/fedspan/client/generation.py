"""Text that the model writes greedily from the prompts of instruction data, whatever lies beside the base.

Shapes: b prompts of a batch; t tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fedspan.data import Encoded
from fedspan.models import FederatedModel
from fedspan.models.padding import equal_lengths


def generate(
    model: FederatedModel, examples: Encoded, indices: Sequence[int], tokenizer: Any, max_new_tokens: int
) -> list[str]:
    """Return the answers of the model to the prompts at `indices`, up to the first token that ends one.

    No answer is longer than the base has positions for after its prompt; a reference answer always fits, since it was
    cut to them together with its prompt.
    """
    texts = examples.texts
    assert texts is not None
    assert texts.prompt_lengths is not None
    rows = examples.rows[list(indices)]
    room = [max_new_tokens] * len(indices)
    if texts.num_positions is not None:
        room = [min(max_new_tokens, texts.num_positions - int(n)) for n in texts.prompt_lengths[rows]]
    answers: dict[int, str] = {}
    # Nearly always one length for all. Where the room differs, a long prompt must not shorten another's answer.
    for length in sorted(set(room)):
        chosen = [place for place, own in enumerate(room) if own == length]
        batch = examples.prompts([indices[place] for place in chosen])
        answers |= zip(chosen, _written(model, batch, texts, tokenizer, length), strict=True)
    return [answers[place] for place in range(len(indices))]


def greedy_settings(texts: Any, max_new_tokens: int) -> dict[str, Any]:
    """Return the settings of generation, by transformers' names.

    Parameters
    ----------
    texts
        The texts of instruction data.
    """
    return {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": texts.pad,
        "eos_token_id": list(texts.ends),
    }


def _written(model: FederatedModel, batch: dict[str, Any], texts: Any, tokenizer: Any, length: int) -> list[str]:
    batch = {name: value.to(model.device) for name, value in batch.items()}
    if not model.prompt_padding_matters:
        return _continued(model, batch, texts, tokenizer, length)
    answers: dict[int, str] = {}
    for rows, part in equal_lengths(batch):
        answers |= zip(rows.tolist(), _continued(model, part, texts, tokenizer, length), strict=True)
    return [answers[row] for row in sorted(answers)]


def _continued(model: FederatedModel, batch: dict[str, Any], texts: Any, tokenizer: Any, length: int) -> list[str]:
    writer: Any = model.model
    chosen = greedy_settings(texts, length)
    if "decoder_input_ids" in batch:
        chosen["decoder_start_token_id"] = int(batch["decoder_input_ids"][0, 0])
    with _greedy(writer, chosen) as settings:
        tokens = writer.generate(**batch, generation_config=settings)
    # A decoder repeats the prompt, an encoder-decoder the tokens that it was given to begin with.
    begin = batch.get("decoder_input_ids", batch["input_ids"]).shape[1]
    return _decoded(tokens[:, begin:].tolist(), set(texts.ends), tokenizer)


def _decoded(rows: list[list[int]], ends: set[int], tokenizer: Any) -> list[str]:
    """Return token ids as text, each row up to its first end token, which need not be a special one."""
    cut = [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
    texts: list[str] = tokenizer.batch_decode(cut, skip_special_tokens=True)
    return texts


@contextmanager
def _greedy(writer: Any, settings: dict[str, Any]) -> Iterator[Any]:
    """Yield settings of generation while the model has no others: transformers takes from them what is not given."""
    own = writer.generation_config
    writer.generation_config = type(own)()
    try:
        yield type(own)(**settings)
    finally:
        writer.generation_config = own
