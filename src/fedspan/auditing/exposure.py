"""Extraction of planted canaries: the rank of a secret among others that were as likely, by the model's loss.

With c candidates drawn as the secret was, its rank is 1 + the number of candidates whose loss is not larger. Exposure
is log₂(c + 1) − log₂(rank): 1 bit for an average secret, log₂(c + 1) for the one that the model finds likeliest. For a
model that has not seen it every rank is as likely, so rank/(c + 1) is an exact p-value, and those of all planted
secrets are combined by Fisher's method. A secret of instruction data
is *extracted* where the model, given the prompt, writes it out word for word.

Source: Carlini et al. 2019 (1802.08232), with exposure estimated by sampling (section 4.4 there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspan.auditing.canaries import CanaryKey, label_id
from fedspan.auditing.statistics import CONFIDENCE
from fedspan.auditing.subject import Subject
from fedspan.data import Rows
from fedspan.data.rows import concatenate
from fedspan.support.activity import report
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Exposure:
    """The trace of one canary in the model."""

    repeats: int
    """Times that it was planted; 0: never."""
    rank: int
    base_rank: int
    """For the untouched base, which has not seen it."""
    candidates: int
    extracted: bool | None
    """The model wrote it out; None for classifiers, which write nothing."""

    @property
    def bits(self) -> float:
        """The exposure."""
        return math.log2(self.candidates + 1) - math.log2(self.rank)

    @property
    def p_value(self) -> float:
        """The probability of so small a rank for a model that has not seen it."""
        return self.rank / (self.candidates + 1)


@dataclass(frozen=True, slots=True)
class Extraction:
    """All canaries of a key."""

    exposures: tuple[Exposure, ...]

    @property
    def planted(self) -> tuple[Exposure, ...]:
        """Those that were planted, the most often first."""
        return tuple(sorted((x for x in self.exposures if x.repeats), key=lambda x: -x.repeats))

    @property
    def controls(self) -> tuple[Exposure, ...]:
        """Those that were not."""
        return tuple(x for x in self.exposures if not x.repeats)

    @property
    def found(self) -> tuple[Exposure, ...]:
        """Planted canaries that were written out, or rank higher than chance explains with so many of them."""
        return tuple(x for x in self.planted if x.extracted or x.p_value <= self.limit)

    @property
    def limit(self) -> float:
        """The p-value up to which a single secret is found, with so many of them."""
        return (1 - CONFIDENCE) / 2 / max(1, len(self.planted))

    @property
    def most_bits(self) -> float:
        """The exposure of a secret at rank 1."""
        return math.log2(max(x.candidates for x in self.exposures) + 1)

    @property
    def p_value(self) -> float:
        """The probability of ranks as small in all, by Fisher's combination of the planted secrets' p-values."""
        from scipy.special import chdtrc

        planted = self.planted
        return float(chdtrc(2 * len(planted), -2 * sum(math.log(x.p_value) for x in planted))) if planted else 1.0

    @property
    def succeeds(self) -> bool:
        """True where one of the secrets is found, or all together are (each at half of the error that is allowed)."""
        return bool(self.found) or self.p_value <= (1 - CONFIDENCE) / 2


def extract(subject: Subject, key: CanaryKey, candidates: int, seed: int) -> Extraction:
    """Measure the exposure of every canary of a key.

    Raises
    ------
    FedspanError
        For a key of another kind of data, or with a label that the model does not know.
    """
    corpus = subject.trained.prepared.corpus
    if corpus.kind != key.kind:
        raise FedspanError(f"the key is of {key.kind} data, and the model is for {corpus.kind} data: expected its own")
    rng = np.random.default_rng([seed, 23])
    groups: list[Rows] = []
    for canary in key.canaries:
        secrets = [canary.secret, *key.candidates(canary, candidates, rng)]
        groups.append(key.rows(canary, secrets, label_id(canary, corpus.label_names)))
    (losses,) = subject.losses([concatenate(groups)])
    written = _written(subject, key, [group.take([0]) for group in groups])
    width, found = candidates + 1, []
    for i, canary in enumerate(key.canaries):
        own, before = (x[i * width : (i + 1) * width] for x in (losses.trained, losses.base))
        ranks = [1 + int((x[1:] <= x[0]).sum()) for x in (own, before)]  # a tie counts for the candidate
        found.append(Exposure(canary.repeats, ranks[0], ranks[1], candidates, written[i]))
    return Extraction(tuple(found))


def _written(subject: Subject, key: CanaryKey, rows: Sequence[Rows]) -> list[bool | None]:
    """Return whether the model writes each secret out."""
    if key.kind != "instruction":
        return [None] * len(rows)
    examples = subject.trained.encode(concatenate(rows))
    report(f"asking for {len(rows)} secrets")
    subject.trained.use(subject.final)
    longest = int(examples.lengths.max())
    answers = subject.trained.answers(examples, longest)
    return [canary.secret in " ".join(answer.split()) for canary, answer in zip(key.canaries, answers, strict=True)]
