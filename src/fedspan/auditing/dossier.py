"""An audit from its beginning to its end, and what it leaves: `dossier.json`, `dossier.html`, lines in a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedspan.auditing import findings
from fedspan.auditing.bounds import Guarantee, empirical_epsilon
from fedspan.auditing.canaries import read_key
from fedspan.auditing.exposure import Extraction, extract
from fedspan.auditing.findings import Finding
from fedspan.auditing.inversion import Inversion, invert
from fedspan.auditing.membership import LIMITS, Attack, Membership, infer
from fedspan.auditing.rows import FEWEST, AuditRows
from fedspan.auditing.sources import find_source
from fedspan.support.errors import FedspanError
from fedspan.support.files import StrPath
from fedspan.support.versions import installed_version

FORMAT = 1
"""Of `dossier.json`; raised whenever the meaning of a field changes."""
MOST_ROWS = 2000
CANDIDATES = 499
"""Other secrets that a canary is ranked among, by default: enough for a p-value of 0.002."""


@dataclass(frozen=True, slots=True, eq=False)
class Dossier:
    """Everything that an audit found."""

    facts: Mapping[str, Any]
    rows: AuditRows
    membership: Membership
    guarantee: Guarantee | None
    privacy: str
    """One sentence on ε and δ."""
    extraction: Extraction | None
    inversion: Inversion | None
    notes: tuple[str, ...]
    made: str
    """Date and time, UTC."""
    version: str
    messages_wanted: bool = True
    """False where the attacks on a site's message were left out on request."""

    @property
    def verdict(self) -> str:
        """One sentence on all attacks together."""
        return findings.in_one_sentence(self.findings)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The questions and their answers."""
        return (
            findings.membership_finding(self.membership, self.guarantee),
            findings.extraction_finding(self.extraction, self.guarantee),
            findings.inversion_finding(self.inversion, self.messages_wanted),
            findings.guarantee_finding(self.guarantee, self.privacy, self.membership),
        )

    @property
    def found_something(self) -> bool:
        """True where some attack succeeded."""
        return any(one.verdict == "found" for one in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the content of `dossier.json`."""
        rows = self.rows
        return {
            "format": FORMAT,
            "made": self.made,
            "fedspan": self.version,
            "subject": dict(self.facts),
            "rows": {
                "members": len(rows.members),
                "of_members": rows.num_members,
                "members_from": rows.members_from,
                "non_members": len(rows.others),
                "of_non_members": rows.num_others,
                "non_members_from": rows.others_from,
                "duplicates_left_out": rows.num_duplicates,
            },
            "verdict": self.verdict,
            "findings": [asdict(one) for one in self.findings],
            "membership": {
                "attacks": [_attack(a, self.guarantee) for a in self.membership.attacks],
                "control": _attack(self.membership.control, None),
                "sites_too_small": list(self.membership.too_small),
            },
            "guarantee": None if self.guarantee is None else _guarantee(self.guarantee),
            "privacy": self.privacy,
            "canaries": None if self.extraction is None else _canaries(self.extraction),
            "canaries_p_value": None if self.extraction is None else self.extraction.p_value,
            "messages": None if self.inversion is None else asdict(self.inversion),
            "notes": list(self.notes),
            "limits": list(findings.LIMITS_OF_AN_AUDIT),
        }


def _attack(attack: Attack, guarantee: Guarantee | None) -> dict[str, Any]:
    points = []
    for limit, point in zip(LIMITS, attack.points, strict=True):
        if point is None:
            fewest = round(1 / limit)
            points.append({"limit": limit, "measured": False, "reason": f"fewer than {fewest} non-members"})
            continue
        entry: dict[str, Any] = {"limit": limit, "measured": True, "tpr": asdict(point.tpr), "fpr": asdict(point.fpr)}
        if guarantee is not None:
            entry["most_that_epsilon_allows"] = guarantee.best_tpr(point.fpr.value)
            entry["empirical_epsilon"] = empirical_epsilon(point, guarantee.delta)
            entry["exceeds"] = guarantee.is_exceeded(point)
        points.append(entry)
    return {
        "name": attack.name,
        "site": attack.site,
        "members": attack.num_members,
        "non_members": attack.num_others,
        "compared_with": attack.compared_with,
        "auc": asdict(attack.auc),
        "auc_low_corrected": attack.adjusted_low,
        "succeeds": attack.succeeds,
        "at_false_positives": points,
    }


def _guarantee(guarantee: Guarantee) -> dict[str, Any]:
    return {**asdict(guarantee), "most_auc": guarantee.best_auc()}


def _canaries(found: Extraction) -> list[dict[str, Any]]:
    return [{**asdict(x), "bits": x.bits, "p_value": x.p_value} for x in found.exposures]


def audit(
    where: StrPath,
    *,
    members: Sequence[StrPath] = (),
    nonmembers: Sequence[StrPath] = (),
    canaries: StrPath | None = None,
    settings: Sequence[str] = (),
    base: str | None = None,
    max_rows: int = MOST_ROWS,
    candidates: int = CANDIDATES,
    messages: bool = True,
) -> Dossier:
    """Attack a trained model and return what the attacks find. Nothing is written.

    Parameters
    ----------
    where
        The folder of a finished run, or of a PEFT adapter.
    members, nonmembers
        Files of rows that it was trained on, and of comparable rows that it was not. Empty, for a run of simulated
        clients: its own training rows, and its test rows.
    canaries
        The key file of `plant`, where some rows of the training were made by it.
    settings, base
        As for `fedspan.evaluate`.
    max_rows
        Members that are drawn in all, and non-members; the draw depends on the run's seed.
    candidates
        Other secrets that each canary is ranked among.
    messages
        Do a site's work of the first round again, and attack what it sends.

    Raises
    ------
    FedspanError
        For anything wrong with the model or the rows, such as too few of them.
    """
    if max_rows < FEWEST or candidates < 1:
        raise FedspanError(f"max_rows = {max_rows}, candidates = {candidates}: expected at least {FEWEST} and 1")
    key = None if canaries is None else read_key(Path(canaries))
    ours, theirs = ([str(name) for name in given] for given in (members, nonmembers))
    source = find_source(Path(where), ours, theirs, settings, base, max_rows, key)
    rows, seed = source.rows, source.subject.trained.config.seed
    own, others = source.subject.losses([rows.members, rows.others])
    return Dossier(
        facts=source.facts,
        rows=rows,
        membership=infer(rows, own, others),
        guarantee=source.guarantee,
        privacy=source.privacy,
        extraction=None if key is None else extract(source.subject, key, candidates, seed),
        inversion=invert(source, seed) if messages else None,
        notes=(*source.subject.notes, *rows.notes),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=installed_version("fedspan"),
        messages_wanted=messages,
    )
