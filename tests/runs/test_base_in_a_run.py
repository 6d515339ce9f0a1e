"""Facts that a base states, from the run's first figures to the lines that load its result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bigram
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fedspan.cli.main import main
from fedspan.client.setup import prepare
from fedspan.config import to_toml
from fedspan.data import load
from fedspan.runs.execution import run
from fedspan.support.errors import NotResumable

ORDER = ("z", "x", "y")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a head for the labels of `tiny.words`, in an order of its own."""
    import transformers as t

    path = tmp_path_factory.mktemp("classifier") / "base"
    encoder = tiny.make("bert")
    config = encoder.config
    config.id2label, config.label2id = dict(enumerate(ORDER)), {name: i for i, name in enumerate(ORDER)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = t.BertForSequenceClassification(config)
    model.bert.load_state_dict(encoder.bert.state_dict(), strict=False)
    model.save_pretrained(str(path))
    tiny.tokenizer().save_pretrained(str(path))
    return path


def in_transformers(base: Path, data: Path) -> tuple[float, float]:
    """Loss and accuracy of the base as it is, by the names of its labels, one example at a time."""
    import transformers as t

    model = t.AutoModelForSequenceClassification.from_pretrained(str(base)).eval()
    tokenizer = t.AutoTokenizer.from_pretrained(str(base))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def quick(base: Path, rows: Path, /, **sections: Any) -> Any:
    """A run of one round, whose test data is all of its rows unless it says otherwise."""
    given = {"data": {"test": [str(rows)]}, "federation": {"rounds": 1}}
    return tiny.config(base, rows, "fedit", **{**given, **sections})


def test_a_base_that_knows_the_labels_scores_as_in_transformers(classifier: Path, texts: Path, tmp_path: Path) -> None:
    result = run(quick(classifier, texts), tmp_path / "run")
    base = result.summary["metrics"]["base"]
    loss, accuracy = in_transformers(classifier, texts)
    assert base == {**base, "loss": pytest.approx(loss, rel=1e-5), "accuracy": pytest.approx(accuracy)}
    assert result.summary["labels"] == list(ORDER)
    assert "test data" not in "".join(result.summary["notes"])
    assert result.summary["notes"][-1].startswith("labels are numbered as the base numbers them: 0 = z")
    for folder in (result.out, result.adapter):
        stored = json.loads((folder / "labels.json").read_text())
        assert list(stored["id2label"].values()) == list(ORDER)


def test_other_labels_get_a_new_head_and_a_line(classifier: Path, texts: Path, tmp_path: Path) -> None:
    """Of the same number, so that the old head would have fitted."""
    renamed = texts.read_text().replace('"label": "x"', '"label": "cat"')
    other = tmp_path / "other.jsonl"
    other.write_text(renamed)
    result = run(quick(classifier, other), tmp_path / "run")
    note = "a new head is drawn in place of the base's: its classes are 'z', 'x', 'y', the data's are 'cat', 'y', 'z'"
    assert note in result.summary["notes"]
    assert result.summary["labels"] == ["cat", "y", "z"]
    old = load_file(classifier / "model.safetensors")["classifier.weight"]
    again = tiny.load(classifier, "classification", new_head="why")
    assert not torch.equal(again.dense_parameters["classifier.weight"].cpu(), old)
    assert torch.equal(
        again.dense_parameters["classifier.weight"],
        tiny.load(classifier, "classification", new_head="why").dense_parameters["classifier.weight"],
    )
    assert torch.equal(tiny.load(classifier, "classification").dense_parameters["classifier.weight"].cpu(), old)


def test_a_context_shorter_than_the_default_length_lowers_it(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny bases have 128 positions: the default of 256 is lowered, a number of one's own is refused."""
    long = tiny.write_jsonl(tmp_path / "long.jsonl", [{"text": "ab" * 90, "label": "xyz"[i % 3]} for i in range(24)])
    common = {"federation": {"rounds": 1, "ranks": 2}}
    result = run(quick(bases["bert"], long, data={"max_length": 256}, **common), tmp_path / "run")
    assert result.summary["encoding"]["max_length"] == 128
    assert "data.max_length is lowered from 256 to 128" in result.summary["notes"][0]
    with pytest.raises(ValueError, match=r"data.max_length: a row has 181 tokens, .* at most 128") as caught:
        run(quick(bases["bert"], long, data={"max_length": 200}, **common), tmp_path / "refused")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_the_record_says_how_answers_are_generated(tmp_path: Path, instructions: Path) -> None:
    base = bigram.save(
        tmp_path / "base",
        "\nyes",
        bigram.TURN_END,
        chat="{{ strftime_now('%Y') }}" + bigram.CHAT,
        generation={"eos_token_id": [bigram.TURN_END_ID, 2], "do_sample": True},
    )
    result = run(quick(base, instructions, data={"template": "chat"}, evaluation={"base": False}), tmp_path / "run")
    assert result.summary["encoding"] == {
        "max_length": 48,
        "end_token": bigram.TURN_END,
        "template_date": "2024-07-26",
        "generation": {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": 2,
            "pad_token_id": 0,
            "eos_token_id": [bigram.TURN_END_ID, 2],
        },
    }
    assert result.summary["labels"] is None
    dated = "the chat template prints today's date: 2024-07-26 stands for it in every run"
    assert result.summary["notes"].count(dated) == 1


def test_a_base_that_is_not_finite_is_named_before_there_is_a_folder(
    tmp_path: Path, instructions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save("llama", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weight model.norm.weight holds NaN or infinity"):
        run(quick(base, instructions), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_whose_loss_is_not_finite_is_named_before_training(
    classifier: Path, texts: Path, tmp_path: Path
) -> None:
    """Every weight is finite, and their products are not: as a base in float16 that overflows."""
    base = shutil.copytree(classifier, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["classifier.weight"].fill_(3e38)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotResumable, match=r"the loss of the untouched base is (nan|inf) with model.dtype = 'float32'"):
        run(quick(base, texts), tmp_path / "run")


def test_a_rate_that_diverges_is_named_and_not_resumed(
    bases: dict[str, Path], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick(bases["bert"], texts, local={"learning_rate": 1e30, "steps": 3})
    (tmp_path / "my.toml").write_text(to_toml(config))
    assert main(["run", str(tmp_path / "my.toml"), "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "its training diverged" in line
    assert "expected a smaller local.learning_rate" in line
    assert "resume" not in line


LOAD = """
import json, sys, torch
import torch.nn.functional as F
found = {}
for name, (lines, examples) in json.load(open("blocks.json")).items():
    space = {}
    exec("\\n".join(lines), space)
    model, total, count = space["model"].eval(), 0.0, 0
    for example in examples:
        batch = {key: torch.tensor(value) for key, value in example.items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        if labels.ndim == 2:  # every answer token is predicted from the one before
            logits, labels = logits[0, :-1], labels[0, 1:]
        wanted = labels != -100
        total += float(F.cross_entropy(logits[wanted], labels[wanted], reduction="sum"))
        count += int(wanted.sum())
    found[name] = [total / count, [model.config.id2label[i] for i in range(model.config.num_labels)]]
json.dump(found, open("found.json", "w"))
"""
RESULTS = {
    "answers": ("llama", "instructions", "fedit"),
    "classes": ("bert", "texts", "fedit"),
    "a head of its own": ("classifier", "texts", "fedit"),
    "images": ("vit", "pictures", "fedit"),
    "whole weights": ("bert", "texts", "fedavg"),
    "personal": ("bert", "texts", "fedsa_lora"),
}


def examples(config: Any) -> list[dict[str, Any]]:
    """The test data of a run, one example at a time, as a model takes it."""
    test = prepare(config.model.name, config.data, load(config.data, config.seed)).data["test"]
    return [{name: value.tolist() for name, value in test.batch([i]).items()} for i in range(len(test))]


@pytest.mark.slow
def test_the_printed_lines_load_the_result_in_a_fresh_python(
    bases: dict[str, Path],
    classifier: Path,
    texts: Path,
    instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Answers, classes, images, whole weights and a client's own adapter: the loss is the run's, one example a time.

    In another working folder than the run's, and with names of classes under their numbers, as pipelines look them up.
    """
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures.npz"
    rng = np.random.default_rng(0)
    np.savez(pictures, images=rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8), labels=np.arange(24) % 3)
    places = {**bases, "classifier": classifier, "texts": texts, "instructions": instructions, "pictures": pictures}
    blocks = {}
    for name, (base, data, method) in RESULTS.items():
        config = tiny.config(
            places[base],
            places[data],
            method,
            federation={"rounds": 1, "ranks": 2},
            evaluation={"max_new_tokens": 1, "local": False, "base": False},
        )
        (tmp_path / "my.toml").write_text(to_toml(config))
        assert main(["run", str(tmp_path / "my.toml"), "--out", name]) == 0
        # Standard output alone: on a busy machine standard error has lines on what the run waited for.
        printed = capsys.readouterr().out.split("load it in Python:\n")[1]
        blocks[name] = [printed.splitlines(), examples(config)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "blocks.json").write_text(json.dumps(blocks))
    subprocess.run([sys.executable, "-c", LOAD], cwd=elsewhere, check=True, capture_output=True)
    for name, (loss, names) in json.loads((elsewhere / "found.json").read_text()).items():
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert np.isfinite(loss)
        if name != "personal":  # whose figures are means over the clients
            assert loss == pytest.approx(summary["metrics"]["server"]["loss"], rel=1e-4), name
        assert name == "answers" or names == summary["labels"]
