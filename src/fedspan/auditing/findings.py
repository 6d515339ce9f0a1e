"""The sentences of a dossier: what was tested, what was found, what follows and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedspan.auditing.bounds import Guarantee, empirical_epsilon
from fedspan.auditing.exposure import Extraction
from fedspan.auditing.inversion import MASKED, RAW, SUM, Inversion
from fedspan.auditing.membership import LIMITS, Attack, Membership
from fedspan.auditing.statistics import Interval

Verdict = Literal["found", "not found", "not tried"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One question that was put to the model."""

    question: str
    verdict: Verdict
    answer: str
    next_step: str


def interval(x: Interval, digits: int = 2) -> str:
    """Return an estimate with its 95 % interval as text."""
    return f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def percent(x: Interval) -> str:
    """Return a share with its 95 % interval as text."""
    return f"{100 * x.value:.1f} % [{100 * x.low:.1f}, {100 * x.high:.1f}]"


def times(count: int) -> str:
    """Return a number of repetitions as text."""
    return {0: "never", 1: "once"}.get(count, f"{count} times")


def membership_finding(found: Membership, guarantee: Guarantee | None) -> Finding:
    """Return what membership inference came to."""
    question = "Can somebody with the model tell which rows it was trained on?"
    best, controlled = found.strongest, ""
    if found.differs_before:
        controlled = (
            f" Take care: members and non-members differ already for the base, which has seen neither (AUC "
            f"{interval(found.control.auc)}), so a part of this may be a difference of the two sets of rows."
        )
    if found.succeeded:
        first = found.succeeded[0]
        whose = "" if first.site is None else f" of {first.site}"
        answer = (
            f"Yes: by the {first.name} the rows{whose} are told from others with an AUC of {interval(first.auc)}, "
            f"where 0.5 is guessing and 1 is certainty.{_rates(found)}{_worst_site(found, first)}{controlled}"
        )
        step = (
            "Train for fewer steps or with more rows, or with privacy.dp = 'example' and enough noise, and audit "
            "again. Until then treat the adapter as data about the people in the rows: do not publish it."
        )
        return Finding(question, "found", answer, step)
    answer = (
        f"No attack that was tried did so. The strongest, by the {best.name}, has an AUC of {interval(best.auc)}, "
        f"where 0.5 is guessing and 1 is certainty; a true value up to {best.auc.high:.2f} is compatible with that."
        f"{controlled}"
    )
    step = "This is no proof of safety: a stronger attack may succeed. "
    if guarantee is None:
        step += "Only privacy.dp with enough noise bounds every attack, known or not."
    else:
        step += "The bound below holds for every attack; weigh whether it is low enough."
    return Finding(question, "not found", answer, step)


def _worst_site(found: Membership, first: Attack) -> str:
    """Return the site whose rows are told most easily, where the first sentence was of all sites."""
    of_sites = [attack for attack in found.succeeded if attack.site is not None]
    if first.site is not None or not of_sites:
        return ""
    worst = of_sites[0]
    return f" Of single sites, {worst.site} is told most easily: {interval(worst.auc)} by the {worst.name}."


def _rates(found: Membership) -> str:
    """Return the largest shares of members that an attack finds at few false positives, and what they mean."""
    return "".join(_rate(found, place) for place in range(len(LIMITS)))


def _rate(found: Membership, place: int) -> str:
    limit = f"{100 * LIMITS[place]:.0f} %"
    points = [(x.points[place], x.name) for x in found.whole]
    measured = [(point, name) for point, name in points if point is not None]
    if not measured:
        return f" With {found.control.num_others} non-members a rate at {limit} false positives cannot be measured."
    point, name = max(measured, key=lambda pair: pair[0].tpr.value)
    line = (
        f" With at most {limit} of the non-members wrongly taken for members, the {name} finds {percent(point.tpr)} of "
        f"the members"
    )
    if point.tpr.low <= LIMITS[place]:
        return f"{line}: not clearly more than the {limit} of guessing, so single rows are hardly named like that."
    return f"{line}, where guessing finds {limit}."


def extraction_finding(found: Extraction | None, guarantee: Guarantee | None = None) -> Finding:
    """Return what the extraction of canaries came to."""
    question = "Does the model keep rare texts word for word?"
    if found is None:
        return Finding(
            question,
            "not tried",
            "No canaries were planted (or their key was not given), so nothing is known.",
            "Plant some with `fedspan canaries` at a site before a trial run, and audit that run with --canaries.",
        )
    planted, hits = found.planted, found.found
    noise = "use privacy.dp = 'example'"
    if guarantee is not None:
        noise = "lower ε, of which a row that is there k times has k times as much"
    written = sum(bool(x.extracted) for x in hits)
    most = max((x.repeats for x in planted), default=0)
    if found.succeeds and not hits:
        return Finding(
            question,
            "found",
            f"In part: none of {len(planted)} planted secrets by itself, but together they rank higher than chance "
            f"explains (p = {found.p_value:.2g}): the model has noticed them.",
            "Plant some more often to learn from how many repetitions on a secret is kept; train for fewer steps, or "
            f"{noise}, and audit again.",
        )
    if hits:
        least, rank = min(x.repeats for x in hits), "ranks" if len(hits) == 1 else "rank"
        out = f", {written} of them written out word for word when asked" if written else ""
        return Finding(
            question,
            "found",
            f"Yes: {len(hits)} of {len(planted)} planted secrets {rank} so high among others as likely that chance "
            f"does not explain it{out}. The least often planted of them was there {times(least)}.",
            "Remove repeated rows before training (records that are copied are remembered first), train for fewer "
            f"steps, or {noise}, and audit again.",
        )
    return Finding(
        question,
        "not found",
        f"{len(planted)} planted secrets, the most frequent there {times(most)}, rank no higher than chance explains, "
        f"each by itself and together (p = {found.p_value:.2g}).",
        "Secrets that occur more often, or another way of asking, may still be found.",
    )


def inversion_finding(found: Inversion | None, wanted: bool = True) -> Finding:
    """Return what the attacks on a site's message came to.

    Parameters
    ----------
    wanted
        False where the audit was asked to leave them out.
    """
    question = "Can the server recognise a site's rows in what the site sends?"
    if not wanted:
        left_out = "Left out on request (--no-messages), so nothing is known."
        return Finding(question, "not tried", left_out, "Audit again without that option.")
    raw = None if found is None else found.of(RAW)
    if found is None or (raw is None and found.one_row is None):
        reason = "the sites' rows are not here" if found is None else "; ".join(found.not_tried[:1])
        return Finding(
            question, "not tried", f"Not tried: {reason}.", "Audit a simulated run on comparable data to find out."
        )
    leaks = found.leaks
    verdict: Verdict = "found" if leaks else "not found"
    answer = " ".join(["Yes." if leaks else "No attack that was tried did so.", *_message_sentences(found)])
    return Finding(question, verdict, answer, _next_for_messages(leaks, found.of(MASKED) is not None))


def _message_sentences(found: Inversion) -> list[str]:
    """Return what each attack on what the server sees came to."""
    lines, one = [], found.one_row
    raw, masked, total = (found.of(view) for view in (RAW, MASKED, SUM))
    if raw is not None:
        lines.append(
            f"From {found.site}'s message as it is, its rows are told from others with an AUC of {interval(raw.auc)}, "
            f"where 0.5 is guessing."
        )
    if one is not None:
        lines.append(
            f"Of a site with a single row, the row is named among {one.candidates} known ones in {percent(one.hits)} "
            f"of {one.trials} trials, where guessing gives {100 / one.candidates:.1f} %."
        )
    lines += [
        f"The shares of the classes are read with a correlation of {x.correlation:.2f} (p = {x.p_value:.2g}), where 0 "
        f"is guessing."
        for x in found.labels
        if x.view == RAW
    ]
    if masked is not None:
        lines.append(f"Under secure sums, from the masked message: {interval(masked.auc)}.")
    if total is not None:
        lines.append(f"From the sum of all messages, which masks do not hide: {interval(total.auc)}.")
    return lines


def _next_for_messages(leaks: bool, maskable: bool) -> str:
    if not leaks:
        return "A message that gives nothing away to these attacks may do so to others."
    if maskable:
        return (
            "Use privacy.secure_sums = true: the server then sees the sum alone. What the sum gives away only noise "
            "(privacy.dp) hides."
        )
    return (
        "This rule needs every site's own message. Where the server must not learn of rows, use a rule of sums "
        "(such as ffa_lora, fed_sb or glora_sums) with privacy.secure_sums = true, or privacy.dp = 'example'."
    )


def guarantee_finding(guarantee: Guarantee | None, said: str, found: Membership) -> Finding:
    """Return how the measured attacks compare with the bound of differential privacy."""
    question = "Do the attacks stay within the privacy guarantee?"
    if guarantee is None:
        return Finding(
            question, "not tried", said, "Set privacy.dp if a bound is wanted; see docs/differential_privacy.md."
        )
    best = found.strongest
    point = next((x for x in best.points if x is not None), None)
    allowed = f"{said} Every attack on one row is then bounded: AUC at most {guarantee.best_auc():.3f}"
    if point is not None:
        limit = guarantee.best_tpr(point.fpr.value)
        allowed += f", and {100 * limit:.1f} % of members found at {100 * point.fpr.value:.1f} % false positives"
    exceeded = exceeds(guarantee, found)
    if exceeded:
        return Finding(
            question,
            "found",
            f"NO. {allowed}. Measured: {exceeded}. Unless members and non-members differ for another reason, the "
            "guarantee does not hold.",
            "Stop using this model until it is known why: a row that is in several sites or repeated, a ledger or a "
            "secret that was lost, data that was used outside the run, or a defect of the software.",
        )
    lower = max((empirical_epsilon(x, guarantee.delta) for a in found.whole for x in a.points if x), default=0.0)
    return Finding(
        question,
        "not found",
        f"Yes. {allowed}. Measured: an AUC of {interval(best.auc)}; the attacks speak for an ε of at least "
        f"{lower:.2g}.",
        "A bound above 0.9 promises little even where no attack comes near it: lower ε by more noise or fewer rounds."
        if guarantee.best_auc() > 0.9
        else "Keep the ledgers: the bound is of all that was released, and another run on the same rows adds to it.",
    )


def in_one_sentence(found: Sequence[Finding]) -> str:
    """Return what all questions together came to; the last of them is about the guarantee and not about an attack."""
    attacks, guarantee = found[:-1], found[-1]
    tried = [one for one in attacks if one.verdict != "not tried"]
    won = sum(one.verdict == "found" for one in tried)
    asked = f"{len(tried)} of {len(attacks)} questions about attacks were put to this model"
    if len(tried) == len(attacks):
        asked = f"All {len(attacks)} questions about attacks were put to this model"
    elif len(tried) == 1:
        asked = f"One of {len(attacks)} questions about attacks was put to this model"
    if guarantee.verdict == "found":
        return f"{asked}, and its privacy guarantee does not hold: do not use it until it is known why."
    if not won:
        return f"{asked}, and no attack succeeded."
    own = "it" if len(tried) == 1 else "all of them" if won == len(tried) else f"{won} of them"
    return f"{asked}, and in {own} an attack succeeded: the model gives something away."


def exceeds(guarantee: Guarantee, found: Membership) -> str:
    """Return which attacks did better than the bound allows, beyond what chance explains; empty where none did."""
    over = [f"AUC {interval(a.auc)} by the {a.name}" for a in found.whole if a.adjusted_low > guarantee.best_auc()]
    over += [
        f"{percent(x.tpr)} found at {percent(x.fpr)} false positives by the {a.name}"
        for a in found.whole
        for x in a.points
        if x is not None and guarantee.is_exceeded(x)
    ]
    return "; ".join(over)


LIMITS_OF_AN_AUDIT = (
    "An attack that fails proves nothing about another one. Attacks that train shadow models on the same task (such as "
    "LiRA, Carlini et al. 2022, 2112.03570) are stronger than those here, at many times the cost, and were not tried.",
    "The intervals are over rows, for this one model. Another training on the same rows may give more away.",
    "A row counts as a member if its site took part, even if no batch happened to draw it; this makes the figures a "
    "little smaller than they are for rows that were drawn.",
    "Rows of one person are treated as independent. Where several rows are about the same person, more can be told of "
    "that person than of a row.",
    "The figures of this dossier are computed from the training rows, without noise, and no ledger counts them. "
    "Keep it among those who may see the data, or publish no more than it says in words.",
)
