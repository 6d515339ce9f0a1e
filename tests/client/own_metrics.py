"""Two metrics as a user would write them in a module of their own: importing it registers them."""

from __future__ import annotations

from collections.abc import Sequence

from fedspan.data.metrics import METRICS, Metric


def first_word(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that begin with the first word of their reference."""
    pairs = zip(predictions, references, strict=True)
    return sum(p.split()[:1] == r.split()[:1] for p, r in pairs) / len(references)


def mean_recall(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the unweighted mean over the classes of the share of their examples that is predicted."""
    shares = []
    for label in sorted(set(references)):
        own = [p for p, r in zip(predictions, references, strict=True) if r == label]
        shares.append(sum(p == label for p in own) / len(own))
    return sum(shares) / len(shares)


METRICS["first_word"] = Metric(first_word, needs="texts", kinds=("instruction",))
METRICS["mean_recall"] = Metric(mean_recall, needs="labels", kinds=("classification", "image"))
