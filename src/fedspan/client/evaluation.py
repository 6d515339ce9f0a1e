"""A model on held-out data: the loss and the task's metrics.

The data is cut into batches by its lengths alone, each batch is answered by itself, and the figures are worked out
from all answers in the batches' order: whoever answers which batch, the figures have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fedspan.data import Encoded
from fedspan.data.encode import IGNORED
from fedspan.data.metrics import METRICS, perplexity_of
from fedspan.models import FederatedModel
from fedspan.models.losses import client_losses
from fedspan.models.merged import merged


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model makes of one batch."""

    loss: float
    """Summed over what is counted."""
    count: int
    """Answer tokens of instruction data, otherwise examples."""
    predictions: list[Any]
    """One for every example, in the batch's order: a text, a class or a number. None of texts when the loss is all
    that is asked for."""


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
    cut = batches(examples, batch_size)
    tokens = max_new_tokens if writes(examples, metrics) else 0
    return figures(examples, metrics, cut, [answer(model, examples, b, processor, tokens) for b in cut])


def batches(examples: Encoded, batch_size: int) -> list[list[int]]:
    """Indices in batches from the longest examples to the shortest, which then hold little padding."""
    lengths = examples.lengths.tolist()
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def writes(examples: Encoded, metrics: Sequence[str]) -> bool:
    """Whether these metrics need text that the model generates."""
    return examples.kind == "instruction" and any(name != "perplexity" for name in metrics)


@torch.no_grad()
def answer(
    model: FederatedModel, examples: Encoded, indices: Sequence[int], processor: Any, max_new_tokens: int
) -> Answers:
    """What the model, as it is loaded, makes of one batch.

    Parameters
    ----------
    max_new_tokens
        Longest text that is generated for instruction data; 0: none is, the loss is enough.
    """
    model.model.eval()
    with merged(model):
        return _answer(model, examples, indices, processor, max_new_tokens)


def _answer(
    model: FederatedModel, examples: Encoded, indices: Sequence[int], processor: Any, max_new_tokens: int
) -> Answers:
    batch = {name: value.to(model.device) for name, value in examples.batch(indices).items()}
    if examples.kind == "instruction":
        # The mean over the batch's answer tokens, each predicted from the one before.
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        loss = float(client_losses(model, batch))
        texts = _generate(model, examples, indices, processor, max_new_tokens) if max_new_tokens else []
        return Answers(loss * count, count, texts)
    labels = batch.pop("labels")
    logits = model.model(**batch).logits.float()
    if logits.shape[1] == 1:
        return Answers(float(F.mse_loss(logits[:, 0], labels, reduction="sum")), len(indices), logits[:, 0].tolist())
    loss = float(F.cross_entropy(logits, labels, reduction="sum"))
    return Answers(loss, len(indices), logits.argmax(dim=1).tolist())


def figures(
    examples: Encoded, metrics: Sequence[str], cut: Sequence[Sequence[int]], answers: Sequence[Answers]
) -> dict[str, float]:
    """`loss` and every metric, from the answers to all of `batches`, in their order."""
    loss = sum(a.loss for a in answers) / max(sum(a.count for a in answers), 1)
    found = {i: value for b, a in zip(cut, answers, strict=True) for i, value in zip(b, a.predictions, strict=False)}
    predictions = [found[i] for i in sorted(found)]
    values = {"loss": loss}
    for name in metrics:
        if name == "perplexity":
            values[name] = perplexity_of(loss)
        else:
            values[name] = METRICS[name].score(predictions, examples.references)
    return values


def _generate(
    model: FederatedModel, examples: Encoded, indices: Sequence[int], tokenizer: Any, max_new_tokens: int
) -> list[str]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = {name: value.to(model.device) for name, value in examples.prompts(indices).items()}
    writer: Any = model.model
    tokens = writer.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
