"""BLEU and chrF of generated texts, by sacrebleu (the extra `text`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from fedspan.data.score_inputs import check_pairs
from fedspan.support.errors import FedspanError


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the BLEU of the whole corpus, 0 to 100, with sacrebleu's settings (13a tokens, exponential smoothing).

    Sources: Papineni et al. 2002; Post 2018 (1804.08771).
    """
    return _corpus("BLEU", predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the chrF2 of the whole corpus, 0 to 100, with sacrebleu's settings (n-grams of up to 6 characters).

    Source: Popović 2015.
    """
    return _corpus("CHRF", predictions, references)


def check_installed(name: str) -> None:
    """Refuse a metric of this module without its library.

    Raises
    ------
    FedspanError
        Saying how to install it.
    """
    if find_spec("sacrebleu") is None:
        raise FedspanError(
            f"data.metrics = {name!r} needs sacrebleu, which is not installed: pip install 'fedspan[text]'"
        )


def _corpus(name: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    check_pairs(predictions, references)
    check_installed(name.lower())
    from sacrebleu import metrics

    scorer: Any = getattr(metrics, name)()
    return float(scorer.corpus_score(list(predictions), [list(references)]).score)
