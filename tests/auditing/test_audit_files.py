"""The dossier's files, the model card, planted canaries, and the commands."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from audited import Audited, secrets

import fedspan
from fedspan.auditing import files
from fedspan.auditing.canaries import CanaryKey, read_key
from fedspan.cli.main import main
from fedspan.support.errors import FedspanError


def test_a_dossier_is_a_page_and_a_record_and_may_be_replaced(overfitted: Audited, tmp_path: Path) -> None:
    page, record = files.write(overfitted.dossier, tmp_path)
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text), "nothing is loaded from elsewhere"
    assert "<script" not in text
    assert html.escape(overfitted.dossier.verdict) in text
    assert re.search(r"below 0\.013 a secret counts as found.* 7\.6 at rank 1", text)
    for one in overfitted.dossier.findings:
        assert html.escape(one.question).replace("&#x27;", "&#39;") in text
    content = json.loads(record.read_text())
    assert content["membership"]["attacks"][0]["auc"]["value"] == overfitted.dossier.membership.whole[0].auc.value
    assert content["canaries"][0]["repeats"] == 30
    files.write(overfitted.dossier, tmp_path)
    for name in (files.PAGE, files.RECORD):
        shutil.copytree(tmp_path, other := tmp_path.with_name(f"other-{name}"))
        (other / name).write_text("[]")
        with pytest.raises(FedspanError, match=name):
            files.write(overfitted.dossier, other)


def test_names_from_outside_are_text_on_the_page(skewed: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(skewed, tmp_path / "<img src=x onerror=alert(1)>"))
    dossier = fedspan.audit(bad, messages=False)
    page, _ = files.write(dossier, tmp_path / "out")
    assert "<img" not in page.read_text()
    # The rows are there: that messages were not attacked was asked for.
    assert dossier.findings[2].answer.startswith("Left out on request (--no-messages)")
    assert "left out on request" in page.read_text()


def test_a_model_card_keeps_what_others_wrote(overfitted: Audited, private: Audited, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    files.write_card(overfitted.dossier, tmp_path)
    assert card.read_text().startswith("<!-- begin of fedspan audit -->")
    card.write_text(f"# Ours\n\n{card.read_text()}\nmore of ours\n")
    files.write_card(private.dossier, tmp_path)
    text = card.read_text()
    assert text.startswith("# Ours\n")
    assert text.endswith("more of ours\n")
    assert text.count("## Privacy audit") == 1
    assert "ε =" in text
    with pytest.raises(FedspanError, match="no folder"):
        files.write_card(private.dossier, tmp_path / "missing")


def test_planted_rows_are_the_keys_in_the_columns_of_the_data(overfitted: Audited, key_of: CanaryKey) -> None:
    rows = [json.loads(line) for line in (overfitted.run.parent / "planted.jsonl").read_text().splitlines()]
    assert rows[:60] == [json.loads(line) for line in overfitted.members.read_text().splitlines()]
    often, once = key_of.canaries[:2]
    assert rows[60:90] == [{"instruction": often.prompt, "input": "", "output": often.secret}] * 30
    assert [row["output"] for row in rows[90:]] == [once.secret]
    assert [canary.repeats for canary in key_of.canaries] == [30, 1, 0, 0]
    others = key_of.candidates(often, 50, np.random.default_rng(0))
    assert len({*others, often.secret}) == 51
    assert all(set(secret.split()) <= set(key_of.vocabulary) for secret in others)


def test_secrets_differ_from_call_to_call(overfitted: Audited, tmp_path: Path) -> None:
    """They come from the system's randomness unless a seed is given."""
    first, second = (
        fedspan.plant_canaries([overfitted.members], tmp_path / f"{n}.jsonl", tmp_path / f"{n}.json") for n in "ab"
    )
    assert {c.secret for c in first.canaries}.isdisjoint(c.secret for c in second.canaries)


def test_a_classifiers_canaries_are_texts_with_labels_of_the_data(tmp_path: Path) -> None:
    rows = [
        {"text": row["output"] + " " + row["instruction"], "label": "ab"[i % 2]} for i, row in enumerate(secrets(40))
    ]
    data = tiny.write_jsonl(tmp_path / "texts.jsonl", rows)
    made = fedspan.plant_canaries([data], tmp_path / "out.jsonl", tmp_path / "key.json", count=3, repeats=(2,))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(written) == 46
    assert {row["label"] for row in written[40:]} <= {"a", "b"}
    assert read_key(tmp_path / "key.json") == made


def test_what_cannot_be_planted_is_refused(overfitted: Audited, tmp_path: Path) -> None:
    data, new = overfitted.members, tmp_path / "out.jsonl"
    chat = tiny.write_jsonl(
        tmp_path / "chat.jsonl",
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}],
    )
    poor = tiny.write_jsonl(tmp_path / "poor.jsonl", [{"instruction": "say", "input": "", "output": "yes"}] * 20)
    cases = [
        ((data,), tmp_path / "out.csv", "ends in .jsonl"),
        ((data,), data, "exists"),
        ((chat,), new, "conversations"),
        ((poor,), new, "different words"),
        ((), new, "at least one file"),
    ]
    for given, out, message in cases:
        with pytest.raises(FedspanError, match=message):
            fedspan.plant_canaries(given, out, tmp_path / "key.json")
    assert not new.exists()
    assert not (tmp_path / "key.json").exists()


def test_the_commands(skewed: Path, overfitted: Audited, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(skewed, tmp_path / "run"))
    assert main(["audit", str(copy), "--card", "--no-messages", "--max-rows", "60"]) == 0
    told = capsys.readouterr().out
    assert "Can somebody with the model tell" in told
    assert (copy / "audit" / "dossier.html").exists()
    assert "## Privacy audit" in (copy / "adapter" / "README.md").read_text()
    assert main(["audit", str(copy), "--no-messages", "--json", "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == 1
    assert main(["audit", str(copy), "--max-rows", "none"]) == 2
    out, key = tmp_path / "p.jsonl", tmp_path / "k.json"
    assert main(["canaries", str(overfitted.members), "--out", str(out), "--key", str(key), "--repeats", "2,3"]) == 0
    assert "6 canaries planted (15 rows), 6 kept as controls" in capsys.readouterr().out
    assert main(["canaries", str(overfitted.members), "--out", "x.jsonl", "--key", "y", "--repeats", "0"]) == 2
