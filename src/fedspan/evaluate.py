"""A model on held-out data: the loss and the task's metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fedspan.data import Encoded
from fedspan.metrics import METRICS, perplexity_of
from fedspan.models import FederatedModel


def evaluate(
    model: FederatedModel,
    examples: Encoded,
    metrics: Sequence[str],
    processor: Any,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """`loss` and every metric, on whatever is loaded in the model.

    Instruction data is judged on text that the model generates greedily from the prompt, not on the argmax under
    teacher forcing. The loss is the mean over answer tokens (or examples).
    """
    model.model.eval()
    order = _by_length(examples)
    wanted = [name for name in metrics if name != "perplexity"]
    predictions: Sequence[Any]
    if examples.kind == "instruction":
        loss = _answer_loss(model, examples, order, batch_size)
        predictions = _generate(model, examples, order, processor, batch_size, max_new_tokens) if wanted else ()
    else:
        loss, predictions = _classify(model, examples, order, batch_size)
    values = {"loss": loss}
    for name in metrics:
        if name == "perplexity":
            values[name] = perplexity_of(loss)
        else:
            values[name] = METRICS[name].score(predictions, examples.references)
    return values


def _by_length(examples: Encoded) -> list[int]:
    """Indices from the longest to the shortest: batches then hold little padding."""
    lengths = examples.lengths
    return sorted(range(len(examples)), key=lambda i: (-int(lengths[i]), i))


def _chunks(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def _answer_loss(model: FederatedModel, examples: Encoded, order: Sequence[int], batch_size: int) -> float:
    total, count = 0.0, 0
    for indices in _chunks(order, batch_size):
        batch = {name: value.to(model.device) for name, value in examples.batch(indices).items()}
        # The library's loss is the mean over the batch's answer tokens, each predicted from the one before.
        size = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model.model(**batch).loss) * size
        count += size
    return total / max(count, 1)


@torch.no_grad()
def _classify(
    model: FederatedModel, examples: Encoded, order: Sequence[int], batch_size: int
) -> tuple[float, list[float]]:
    """Mean loss, and the predicted class (or number) of every example."""
    total = 0.0
    found: dict[int, float] = {}
    for indices in _chunks(order, batch_size):
        batch = {name: value.to(model.device) for name, value in examples.batch(indices).items()}
        output = model.model(**batch)
        total += float(output.loss) * len(indices)
        answers = output.logits[:, 0] if output.logits.shape[1] == 1 else output.logits.argmax(dim=1)
        found |= dict(zip(indices, answers.tolist(), strict=True))
    return total / len(order), [found[i] for i in range(len(examples))]


@torch.no_grad()
def _generate(
    model: FederatedModel,
    examples: Encoded,
    order: Sequence[int],
    tokenizer: Any,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found: dict[int, str] = {}
    for indices in _chunks(order, batch_size):
        batch = {name: value.to(model.device) for name, value in examples.prompts(indices).items()}
        tokens = model.model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found |= dict(zip(indices, texts, strict=True))
    return [found[i] for i in range(len(examples))]
