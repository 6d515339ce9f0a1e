"""Attacks of a server on one site's message of the first round, as it is and under the masks of a secure sum.

Three attacks, on the differences that `fedspan.auditing.messages` computes (v, of P numbers; g(x) the direction in
which the row x alone moves the message):

* **rows**: is x among the site's rows? The score is the cosine of v and g(x) (membership from gradients: Nasr et al.
  2019, 1812.00910; matching gradients as in Zhu et al. 2019, 1906.08935, over known rows instead of free ones);
* **one row**: the same for a site that has a single row: which of N known rows is it?
* **labels**: the change of the classifier's bias, class by class, against the share of each class among the site's
  rows. Its gradient is Σ (p_c − y_c) (Zhao et al. 2020, 2001.02610; Wainakh et al. 2022, 2105.09369).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedspan.auditing.messages import MOST_NUMBERS, FirstRound, Message, largest, num_numbers
from fedspan.auditing.rows import FEWEST, drawn
from fedspan.auditing.sources import Source
from fedspan.auditing.statistics import CONFIDENCE, Interval, Scores, auc, share
from fedspan.client.training import num_steps
from fedspan.data import Rows
from fedspan.federation.clients import Client
from fedspan.methods.messages import Update
from fedspan.support.activity import report
from fedspan.support.errors import FedspanError

RAW, MASKED, SUM = "its message as it is", "its message under masks", "the sum of all messages"
"""The views of a server."""
_MOST_ROWS = 96
"""Rows of each sort whose directions are computed."""
_CANDIDATES = 48
_FEWEST_TRIALS, _TRIALS = 5, 16
"""Sites of one row that are tried: as many as keep their training within `_MOST_STEPS`."""
_MOST_STEPS = 480
_MOST_HELD = 120_000_000
"""Numbers of all directions that are held at once."""
_MOST_SITES = 8
_PERMUTATIONS = 4999
_CORRECTED = 1 - (1 - CONFIDENCE) / 3
"""Confidence at which each of three attacks is judged, so that all of them together err as seldom as one would."""


@dataclass(frozen=True, slots=True)
class RowAttack:
    """Telling a site's rows from others by what the server sees."""

    view: str
    auc: Interval
    num_members: int
    num_others: int
    succeeds: bool
    """Rows are told better than chance explains, with three attacks tried (Bonferroni)."""


@dataclass(frozen=True, slots=True)
class LabelAttack:
    """Reading the classes' shares."""

    view: str
    correlation: float
    """Of the bias's change and the classes' shares among the site's rows, over the classes."""
    p_value: float
    """Share of the assignments of changes to classes that correlate as well: of all that chance could give."""

    @property
    def succeeds(self) -> bool:
        """True where chance does not explain the correlation, with three attacks tried."""
        return self.p_value <= 1 - _CORRECTED


@dataclass(frozen=True, slots=True)
class OneRow:
    """Naming the row of a site that has a single one."""

    hits: Interval
    trials: int
    candidates: int
    succeeds: bool
    """The row is named more often than guessing explains, with three attacks tried."""


@dataclass(frozen=True, slots=True)
class Inversion:
    """All attacks on one site's message."""

    site: str
    num_rows: int
    num_numbers: int
    rows: tuple[RowAttack, ...] = ()
    one_row: OneRow | None = None
    labels: tuple[LabelAttack, ...] = ()
    not_tried: tuple[str, ...] = ()
    """Sentences on what was left out, and why."""

    @property
    def leaks(self) -> bool:
        """True where some attack on the message as it is succeeds."""
        by_rows = any(attack.succeeds for attack in self.rows if attack.view == RAW)
        by_labels = any(attack.succeeds for attack in self.labels if attack.view == RAW)
        return by_rows or by_labels or (self.one_row is not None and self.one_row.succeeds)

    def of(self, view: str) -> RowAttack | None:
        """Return the attack on the rows by one view."""
        return next((attack for attack in self.rows if attack.view == view), None)


def invert(source: Source, seed: int) -> Inversion | None:
    """Attack one site's message of the first round; None where no site's rows are known."""
    if source.work is None:
        return None
    first = FirstRound.of(source.subject.trained, source.work)
    client = largest(source.work.clients)
    report(f"repeating the first round of {client.client_id}")
    if len(client.indices) < FEWEST:
        reason = f"{client.client_id} has {len(client.indices)} rows, of which nothing could be said"
        return Inversion(client.client_id, len(client.indices), 0, not_tried=(reason,))
    try:
        update = first.update(client)
    except FedspanError as error:
        return Inversion(client.client_id, len(client.indices), 0, not_tried=(str(error),))
    size = num_numbers(update)
    if size > MOST_NUMBERS:
        reason = f"a message has {size:,} numbers, and attacks are made on at most {MOST_NUMBERS:,}"
        return Inversion(client.client_id, len(client.indices), size, not_tried=(reason,))
    return _attacked(first, source, client, update, np.random.default_rng([seed, 29]))


def _attacked(first: FirstRound, source: Source, client: Client, update: Update, rng: np.random.Generator) -> Inversion:
    views, missing = _views(first, client, update)
    most = max(FEWEST, min(_MOST_ROWS, _MOST_HELD // (3 * num_numbers(update))))
    attacks: list[RowAttack] = []
    pair = _rows_to_tell(source, client, most, rng)
    if pair is None:
        missing.append("telling the site's rows from others: there are too few comparable ones")
    else:
        own, theirs = (first.gradients(client, first.loaded.encode(rows)) for rows in pair)
        attacks = [_row_attack(view, message, own, theirs) for view, message in views.items()]
    labels = _label_attacks(first, client, views, rng)
    if not labels:
        missing.append(
            "the classes' shares: that takes three classes or more, of different shares at the site, and a classifier "
            "whose bias is in the message"
        )
    missing.append(
        "free reconstruction of texts or pictures from a gradient (such as DLG and its successors): matching known "
        "rows, "
        "as above, is the easier attack"
    )
    return Inversion(
        client.client_id,
        len(client.indices),
        num_numbers(update),
        tuple(attacks),
        _one_row(first, client, most, rng),
        tuple(labels),
        tuple(missing),
    )


def _rows_to_tell(source: Source, client: Client, most: int, rng: np.random.Generator) -> tuple[Rows, Rows] | None:
    """Return rows of a site and rows like them that it did not train on; None where there are too few."""
    site = next(one for one in source.rows.sites if one.name == client.client_id)
    if min(len(site.members), len(site.others)) < FEWEST:
        return None
    ours, theirs = drawn(site.members, most, rng), drawn(site.others, most, rng)
    return source.rows.members.take(ours), source.rows.others.take(theirs)


def _views(first: FirstRound, client: Client, update: Update) -> tuple[dict[str, Message], list[str]]:
    """Return what a server sees, by its name, and what it could not be shown."""
    views = {RAW: first.message(client, update)}
    method = first.work.method
    if not method.secure_sum:
        return views, [f"masks: the rule {method.info.name!r} needs every site's own message, which no mask may hide"]
    peers = [one for one in first.work.clients if one.client_id != client.client_id][: _MOST_SITES - 1]
    if not peers:
        return views, ["masks: a sum of one site hides nothing"]
    try:
        updates = {client.client_id: update, **{one.client_id: first.update(one) for one in peers}}
        masked, total = first.masked(client, updates)
    except FedspanError as error:
        return views, [f"masks: {error}"]
    return {**views, MASKED: masked, SUM: total}, []


def _cosines(values: Tensor, directions: Tensor) -> Tensor:
    """Return the cosine of v (P,) with each of N directions: (N,)."""
    v = values / values.norm().clamp_min(1e-30)
    cosines: Tensor = directions @ v / directions.norm(dim=1).clamp_min(1e-30)
    return cosines


def _row_attack(view: str, message: Message, own: Tensor, theirs: Tensor) -> RowAttack:
    x, y = (_scores(message, directions) for directions in (own, theirs))
    return RowAttack(view, auc(x, y), len(x), len(y), auc(x, y, _CORRECTED).low > 0.5)


def _scores(message: Message, directions: Tensor) -> Scores:
    found: Scores = np.nan_to_num(_cosines(message.values, directions).double().numpy(), nan=-2.0)
    return found


def _one_row(first: FirstRound, client: Client, most: int, rng: np.random.Generator) -> OneRow:
    """Let sites of one row each send a message, and name the row by the direction that is most like it."""
    places = drawn(client.indices, min(most, _CANDIDATES), rng)
    directions = first.gradients(client, first.loaded.context.data["train"].subset(places))
    steps = num_steps(first.work.config.local, 1)
    count = min(len(places), max(_FEWEST_TRIALS, min(_TRIALS, _MOST_STEPS // steps)))
    trials = np.linspace(0, len(places) - 1, count).astype(int)
    hits = 0
    for number, i in enumerate(trials.tolist()):
        report("naming the row of a site with one", number, len(trials))
        message = first.message(client, first.update(client, places[i : i + 1]))
        best = int(_cosines(message.values, directions).nan_to_num(-2.0).argmax())
        # Equal rows have equal directions: either is right.
        hits += bool(torch.equal(directions[best], directions[i]))
    surely = share(hits, len(trials), _CORRECTED).low > 1 / len(places)
    return OneRow(share(hits, len(trials)), len(trials), len(places), surely)


def _label_attacks(
    first: FirstRound, client: Client, views: Mapping[str, Message], rng: np.random.Generator
) -> list[LabelAttack]:
    classes = first.loaded.prepared.corpus.num_labels
    message = views[RAW]
    bias = next((key for key, shape in message.shapes.items() if key[0] == "" and shape == (classes,)), None)
    if classes < 3 or bias is None:
        return []
    labels = np.asarray([first.work.train.targets[i] for i in client.indices.tolist()], dtype=np.int64)
    shares = np.bincount(labels, minlength=classes) / len(labels)
    if shares.std() == 0:
        return []
    shuffled = np.stack([rng.permutation(shares) for _ in range(_PERMUTATIONS)])
    found = []
    for view, one in views.items():
        change = one.part(bias).double().numpy()
        if not change.std() > 0:
            continue
        own = float(np.corrcoef(change, shares)[0, 1])
        standard = (change - change.mean()) / change.std()
        others = (shuffled - shares.mean()) @ standard / (shares.std() * classes)
        found.append(LabelAttack(view, own, (1 + int((others >= own - 1e-12).sum())) / (1 + _PERMUTATIONS)))
    return found
