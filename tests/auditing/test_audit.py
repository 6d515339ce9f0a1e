"""The attacks find what is there, and nothing where there is nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from audited import Audited

import fedspan
from fedspan.auditing.exposure import Exposure, Extraction
from fedspan.auditing.findings import Finding, extraction_finding, in_one_sentence
from fedspan.auditing.inversion import MASKED, RAW, _label_attacks, _row_attack, invert
from fedspan.auditing.messages import FirstRound, Message
from fedspan.auditing.sources import Source, find_source
from fedspan.auditing.subject import Loaded
from fedspan.federation.clients import Client
from fedspan.support.errors import FedspanError


def test_a_model_that_knows_its_rows_by_heart_is_found_out(overfitted: Audited) -> None:
    found = overfitted.dossier.membership
    for attack in found.whole:
        assert attack.auc.low > 0.75, attack.name
    assert found.strongest.succeeds
    point = found.strongest.points[0]
    assert point is not None
    assert point.tpr.low > 0.2
    assert overfitted.dossier.findings[0].verdict == "found"


def test_the_verdict_is_of_the_attacks_that_were_made(overfitted: Audited, private: Audited) -> None:
    assert overfitted.dossier.verdict.startswith("All 3 questions about attacks were put to this model, and in ")
    assert overfitted.dossier.verdict.endswith("an attack succeeded: the model gives something away.")
    won = [one for one in overfitted.dossier.findings[:-1] if one.verdict == "found"]
    assert f"in {'all' if len(won) == 3 else len(won)} of them" in overfitted.dossier.verdict
    one, none = Finding("?", "found", "", ""), Finding("?", "not tried", "", "")
    assert in_one_sentence([one, none, none, none]).startswith(
        "One of 3 questions about attacks was put to this model,"
    )
    assert "in it an attack succeeded" in in_one_sentence([one, none, none, none])
    safe = Finding("?", "not found", "", "")
    assert in_one_sentence([safe, safe, none, none]).endswith("and no attack succeeded.")
    assert in_one_sentence([one, safe, none, none]).startswith("2 of 3 questions")
    assert "in 1 of them an attack succeeded" in in_one_sentence([one, safe, safe, none])
    assert "in all of them an attack succeeded" in in_one_sentence([one, one, one, none])
    assert "does not hold" in in_one_sentence([safe, safe, none, one])


def test_the_untouched_base_tells_nothing(overfitted: Audited) -> None:
    control = overfitted.dossier.membership.control
    assert control.auc.low < 0.5 < control.auc.high
    assert not overfitted.dossier.membership.differs_before


def test_a_private_model_is_not_found_out_and_stays_within_its_bound(private: Audited) -> None:
    dossier = private.dossier
    assert not dossier.membership.succeeded
    assert dossier.guarantee is not None
    assert dossier.guarantee.epsilon == pytest.approx(json.loads((private.run / "summary.json").read_text())["epsilon"])
    assert [one.verdict for one in dossier.findings[:2]] == ["not found", "not found"]
    assert dossier.findings[3].verdict == "not found"


def test_a_false_epsilon_is_noticed(overfitted: Audited, tmp_path: Path) -> None:
    """A run that says it was private although it was not."""
    claimed = Path(shutil.copytree(overfitted.run, tmp_path / "run"))
    summary = json.loads((claimed / "summary.json").read_text()) | {"epsilon": 0.5}
    (claimed / "summary.json").write_text(json.dumps(summary))
    from fedspan.auditing import findings, sources
    from fedspan.config import from_mapping

    privacy = {"privacy": {"dp": "example", "noise_multiplier": 1.0}}
    guarantee, said = sources._privacy(claimed, from_mapping(privacy))
    answer = findings.guarantee_finding(guarantee, said, overfitted.dossier.membership)
    assert answer.verdict == "found"
    assert answer.answer.startswith("NO.")


def test_a_canary_that_was_planted_often_is_extracted_and_others_are_not(overfitted: Audited, private: Audited) -> None:
    found = overfitted.dossier.extraction
    assert found is not None
    often = found.planted[0]
    assert (often.repeats, often.rank, often.extracted) == (30, 1, True)
    assert often.base_rank > 1
    assert often in found.found
    for control in found.controls:
        assert control.rank > 5
        assert not control.extracted
    assert private.dossier.extraction is not None
    assert not private.dossier.extraction.succeeds
    assert [x.repeats for x in private.dossier.extraction.planted] == [1, 1]


def test_secrets_that_are_noticed_only_together_count() -> None:
    """Ranks that chance gives singly, and not all at once."""
    ranks, chance = (16, 19, 26, 66, 17, 22), (319, 106, 199, 12, 80, 319)
    found, none = (Extraction(tuple(Exposure(1, r, r, 499, None) for r in own)) for own in (ranks, chance))
    assert not found.found
    assert found.succeeds
    assert found.p_value < 1e-3
    assert not none.succeeds
    assert extraction_finding(found).verdict == "found"
    assert extraction_finding(none).verdict == "not found"


def test_planted_rows_and_repeated_ones_are_no_members(overfitted: Audited) -> None:
    """A row that was planted thirty times would be found thirty times."""
    rows = overfitted.dossier.rows
    assert rows.num_members == len(rows.members) == 60
    assert len(fedspan.audit(overfitted.run, messages=False).rows.members) == 63, "once for each site"


MASKS = 30
"""Masks are drawn by the operating system, so that one of them may agree with anything by chance."""


def masked_messages(run: Path) -> tuple[Source, FirstRound, Client, list[Message]]:
    """The server's view of the first site's message under masks that are drawn anew each time."""
    source = find_source(run, [], [], [], None, 2000)
    assert source.work is not None
    first, client = FirstRound.of(source.subject.trained, source.work), source.work.clients[0]
    updates = {one.client_id: first.update(one) for one in source.work.clients}
    return source, first, client, [first.masked(client, updates)[0] for _ in range(MASKS)]


def test_a_message_as_it_is_gives_rows_away_and_a_masked_one_does_not(overfitted: Audited) -> None:
    found = overfitted.dossier.inversion
    assert found is not None
    raw = found.of(RAW)
    assert raw is not None
    assert found.of(MASKED) is not None
    assert raw.auc.low > 0.6
    assert raw.succeeds
    assert found.one_row is not None
    assert found.one_row.hits.value > 0.9
    source, first, client, messages = masked_messages(overfitted.run)
    site = source.rows.sites[0]
    own, theirs = (
        first.gradients(client, first.loaded.encode(rows.take(places)))
        for rows, places in ((source.rows.members, site.members), (source.rows.others, site.others))
    )
    values = [_row_attack(MASKED, message, own, theirs).auc.value for message in messages]
    # Its spread is below 0.1 (see below): five standard errors.
    assert abs(np.mean(values) - 0.5) < 0.5 / math.sqrt(MASKS)


def test_class_shares_are_read_from_a_message_but_not_through_masks(skewed: Path) -> None:
    found = fedspan.audit(skewed).inversion
    assert found is not None
    labels = {attack.view: attack for attack in found.labels}
    assert labels[RAW].correlation > 0.7
    assert labels[RAW].succeeds
    assert MASKED in labels
    assert found.leaks
    _, first, client, messages = masked_messages(skewed)
    read = [_label_attacks(first, client, {RAW: one}, np.random.default_rng(0))[0].correlation for one in messages]
    # Of ten classes with random numbers, whose correlation has a spread of 1/3: five standard errors.
    assert abs(np.mean(read)) < 5 / 3 / math.sqrt(MASKS)


def test_a_mixture_of_classes_is_not_mistaken_for_knowledge_of_rows(skewed: Path) -> None:
    """A message of pure noise tells the rows of a site no better than chance, whatever classes it has most of."""
    source = find_source(skewed, [], [], [], None, 2000)
    site = source.rows.sites[0]
    kept = [np.bincount([rows.targets[i] for i in places], minlength=10) for rows, places in (
        (source.rows.members, site.members), (source.rows.others, site.others))]  # fmt: skip
    there = kept[0] > 0
    ratio = (kept[1][there] / kept[0][there]).max()
    assert (kept[1] >= ratio * kept[0] - 1).all()  # the same shares, to a row
    assert source.work is not None
    first = FirstRound.of(source.subject.trained, source.work)
    client = source.work.clients[0]
    own, theirs = (
        first.gradients(client, first.loaded.encode(rows.take(places)))
        for rows, places in ((source.rows.members, site.members), (source.rows.others, site.others))
    )
    rng, values = torch.Generator().manual_seed(0), []
    for _ in range(60):
        v = torch.randn(own.shape[1], generator=rng)
        x, y = ((d @ v / d.norm(dim=1)).numpy() for d in (own, theirs))
        values.append(np.mean(x[:, None] > y[None]))
    assert abs(np.mean(values) - 0.5) < 0.05
    assert np.std(values) < 0.1, "with all held-out rows it is twice that"


def test_row_losses_are_those_of_an_evaluation(overfitted: Audited, skewed: Path) -> None:
    for run, test in ((overfitted.run, overfitted.others), (skewed, skewed.parent / "test.jsonl")):
        source = find_source(run, [], [], [], None, 2000)
        (losses,) = source.subject.losses([source.rows.others])
        expected = fedspan.evaluate(run, [test], settings=["evaluation.max_new_tokens=1"]).metrics["loss"]
        weights = np.ones(len(losses.trained))
        if source.rows.others.kind == "instruction":
            weights = np.asarray([len(str(x)) + 1.0 for x in source.rows.others.targets])
        assert np.average(losses.trained, weights=weights) == pytest.approx(expected, rel=1e-4)
        assert not np.allclose(losses.trained, losses.base)


def test_an_adapter_is_audited_with_files_as_the_run_that_it_is_from(private: Audited) -> None:
    ours = fedspan.audit(private.run / "adapter", members=[private.members], nonmembers=[private.others])
    theirs = fedspan.audit(private.run, members=[private.members], nonmembers=[private.others])
    for x, y in zip(ours.membership.whole, theirs.membership.whole, strict=True):
        assert x.auc.value == pytest.approx(y.auc.value, abs=1e-2)
    assert ours.guarantee is None
    assert ours.inversion is None
    assert ours.findings[2].verdict == "not tried"


def test_rows_of_the_training_are_never_called_non_members(overfitted: Audited, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(overfitted.members.read_text() + overfitted.others.read_text() + overfitted.others.read_text())
    found = fedspan.audit(overfitted.run, members=[overfitted.members], nonmembers=[mixed])
    assert found.rows.num_duplicates == 60 + 100
    assert len(found.rows.others) == 100


def test_what_cannot_be_audited_is_refused(overfitted: Audited, skewed: Path, tmp_path: Path) -> None:
    run, members, others = overfitted.run, overfitted.members, overfitted.others
    few = tiny.write_jsonl(tmp_path / "few.jsonl", [json.loads(others.read_text().splitlines()[0])] * 30)
    sites = Path(shutil.copytree(run, tmp_path / "sites"))
    (sites / "sites.json").write_text("{}")
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    text = (moved / "config.toml").read_text()
    (moved / "config.toml").write_text(text.replace(str(run.parent / "planted.jsonl"), str(others)))
    adapter = skewed / "adapter"
    nameless = Path(shutil.copytree(adapter, tmp_path / "nameless"))
    settings = json.loads((nameless / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (nameless / "adapter_config.json").write_text(json.dumps(settings))
    cases = [
        (tmp_path / "nothing", {}, "nothing does not exist"),
        (run, {"members": [members]}, "--nonmembers is not given"),
        (run, {"nonmembers": [members]}, "--members is not given"),
        (run, {"members": [members], "nonmembers": [members]}, "0 non-members"),
        (run, {"members": [members], "nonmembers": [few]}, "1 non-members"),
        (run, {"canaries": members}, "no key of canaries"),
        (run, {"max_rows": 3}, "max_rows = 3"),
        (adapter, {}, "does not say what it was trained on"),
        (nameless, {"members": [members], "nonmembers": [others]}, "names no base"),
        (sites, {}, "federation of real sites"),
        (moved, {}, "train data of"),
        (skewed, {"canaries": overfitted.key}, "the key is of instruction data"),
    ]
    for where, arguments, message in cases:
        with pytest.raises(FedspanError, match=message):
            fedspan.audit(where, **arguments)


def test_noise_of_a_repeated_first_round_is_drawn_anew_and_charged_to_nobody(private: Audited) -> None:
    ledgers = {path: path.read_bytes() for path in (private.run / "privacy").iterdir()}
    source = find_source(private.run, [], [], [], None, 2000)
    found = invert(source, 0)
    assert found is not None
    assert found.rows
    assert source.work is not None
    first = FirstRound.of(source.subject.trained, source.work)
    client = source.work.clients[0]
    x, y = (first.message(client, first.update(client)).values for _ in range(2))
    assert not torch.equal(x, y)
    assert {path: path.read_bytes() for path in (private.run / "privacy").iterdir()} == ledgers


def test_a_base_without_training_is_its_own_reference(overfitted: Audited) -> None:
    source = find_source(overfitted.run, [], [], [], None, 2000)
    assert isinstance(source.subject.trained, Loaded)
    source.subject.final = source.subject.trained.untouched
    (losses,) = source.subject.losses([source.rows.members])
    assert np.array_equal(losses.trained, losses.base)


def test_classes_that_few_sites_trained_on_are_not_mistaken_for_knowledge_of_rows(tmp_path: Path) -> None:
    """Of all sites together too: after two steps a model knows which classes there are more of, and no row."""
    config = {
        "data": {"task": "builtin:digits"},
        "federation": {"rounds": 2, "num_clients": 4, "participation": 0.5, "dirichlet_alpha": 0.1},
        "local": {"steps": 1},
        "evaluation": {"local": False, "base": False},
    }
    fedspan.run(config, tmp_path / "run", quiet=True)
    source = find_source(tmp_path / "run", [], [], [], None, 400)
    whole = source.rows.whole
    kept = [
        np.bincount([rows.targets[i] for i in places], minlength=10)
        for rows, places in ((source.rows.members, whole.members), (source.rows.others, whole.others))
    ]
    there = kept[0] > 0
    assert (kept[1][~there] == 0).all()
    ratio = (kept[1][there] / kept[0][there]).max()
    assert (kept[1] >= ratio * kept[0] - 1).all()
    assert "the same shares of classes" in whole.matched_by
