"""Laws of encoder-decoders with instruction data: tokens, loss, text and files are those of plain transformers."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seq2seq
import tiny
import torch
from memory_transport import MemoryTransport, make_sites
from test_cohort import CLOSE, agree, alone, clients, config

from fedspan.cli.main import main
from fedspan.client import cohort, length_parts
from fedspan.client.evaluation import batches, evaluate, predict
from fedspan.client.setup import prepare
from fedspan.client.training import Assignment, TrainingSettings, train
from fedspan.config import DataConfig, LocalConfig, PrivacyConfig
from fedspan.data import Corpus, Encoded, Rows
from fedspan.methods.messages import Broadcast, Recipe
from fedspan.models import FederatedModel
from fedspan.models.encoder_decoder import check_loss, decoder_start
from fedspan.models.losses import client_losses, fixed_shape_batches, fixed_shape_losses
from fedspan.privacy.example_dp import private_gradients
from fedspan.runs.events import ignore
from fedspan.runs.execution import run, serve
from fedspan.runs.export import merged_adapter
from fedspan.support.errors import FedspanError

DATA = DataConfig(template="{instruction}: {input}")
TASKS = tiny.questions(40)
ROWS = Rows(
    "instruction",
    [(row["instruction"] * (1 + i % 3), row["input"]) for i, row in enumerate(TASKS)],
    [row["output"] * (1 + i % 4) for i, row in enumerate(TASKS)],
    [""] * 40,
)
CORPUS = Corpus("instruction", ROWS, ROWS, None, None, None, 0, ("exact_match", "rouge_l"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seq2seq")
    return {name: seq2seq.save(name, folder / name) for name in seq2seq.MODELS}


@pytest.fixture(scope="module")
def data(folders: dict[str, Path]) -> dict[str, Encoded]:
    return {name: prepare(str(path), DATA, CORPUS).data["train"] for name, path in folders.items()}


def plain(path: Path) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(str(path)).eval()


def prompt_of(row: int) -> str:
    instruction, text = ROWS.inputs[row]
    return f"{instruction}: {text}"


def end_of(name: str) -> list[int]:
    """What no tokenizer of this name adds by itself, and every answer needs."""
    return [2] if name == "t5gemma" else []


def labels_of(name: str, tokenizer: Any, row: int) -> torch.Tensor:
    ids = tokenizer(text_target=ROWS.targets[row])["input_ids"]
    return torch.tensor([[*(ids[1:] if name == "t5gemma" else ids), *end_of(name)]])


@torch.no_grad()
def plain_figures(name: str, model: Any, tokenizer: Any, rows: list[int], length: int = 7) -> tuple[float, list[str]]:
    """The mean loss over answer tokens, and greedy text, from plain transformers, one example at a time."""
    total, count, texts = 0.0, 0, []
    for row in rows:
        source = tokenizer(prompt_of(row), return_tensors="pt")
        given = {key: source[key] for key in ("input_ids", "attention_mask")}
        labels = labels_of(name, tokenizer, row)
        total += float(model(**given, labels=labels).loss) * labels.numel()
        count += labels.numel()
        forced = {"bart": {"forced_bos_token_id": 1}, "mbart": {"decoder_start_token_id": 3}}.get(name, {})
        # There the token that is forced counts among the new ones.
        most = length + 1 if name == "bart" else length
        written = model.generate(**given, **forced, max_new_tokens=most, do_sample=False, num_beams=1)
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    return total / count, texts


def moved(model: FederatedModel) -> Broadcast:
    """Some adapter, or noise on all weights, large enough to change what is written."""
    if model.trains == "adapter":
        return tiny.broadcast(model, tiny.random_adapter(model, 3, scaling=0.3))
    rng = torch.Generator().manual_seed(5)
    return Broadcast({}, {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in model.dense().items()})


@pytest.mark.parametrize("name", seq2seq.MODELS)
def test_prompts_answers_and_decoder_inputs_are_the_tokenizers_and_the_models(
    folders: dict[str, Path], data: dict[str, Encoded], name: str
) -> None:
    model, tokenizer = plain(folders[name]), tiny.processor(folders[name], "instruction")
    batch, prompts = data[name].batch(range(12)), data[name].prompts(range(12))
    for row in range(12):
        own = {key: value[row] for key, value in batch.items()}
        source = own["input_ids"][own["attention_mask"].bool()]
        assert source.tolist() == tokenizer(prompt_of(row))["input_ids"]
        assert torch.equal(prompts["input_ids"][row], own["input_ids"])
        labels = labels_of(name, tokenizer, row)
        real = own["labels"] != -100
        assert own["labels"][real].tolist() == labels[0].tolist()
        expected = model.prepare_decoder_input_ids_from_labels(labels)[0]
        assert own["decoder_input_ids"][: len(expected)].tolist() == expected.tolist()
        begun = prompts["decoder_input_ids"][row].tolist()
        assert own["decoder_input_ids"][: len(begun)].tolist() == begun  # generation begins as training does


@pytest.mark.parametrize(
    ("name", "trains"), [*((name, "adapter") for name in seq2seq.MODELS), ("t5", "all"), ("mbart", "all")]
)
def test_loss_and_text_of_what_is_saved_are_those_of_plain_libraries(
    folders: dict[str, Path], data: dict[str, Encoded], name: str, trains: str, tmp_path: Path
) -> None:
    """In batches of different lengths here, one example at a time there; text by the same greedy search."""
    from peft import PeftModel

    model = tiny.load(folders[name], "instruction", trains=trains)
    tokenizer = tiny.processor(folders[name], "instruction")
    sent = moved(model)
    model.load(sent)
    if trains == "adapter":
        model.save_adapter(tmp_path / "out", merged_adapter(sent), sent.dense)
        stated = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert stated["task_type"] == "SEQ_2_SEQ_LM"
        loaded = PeftModel.from_pretrained(plain(folders[name]), str(tmp_path / "out")).eval()
    else:
        model.save_weights(tmp_path / "out", tokenizer)
        loaded = plain(tmp_path / "out")
    rows = list(range(6))
    loss, texts = plain_figures(name, loaded, tokenizer, rows)
    untouched, _ = plain_figures(name, plain(folders[name]), tokenizer, rows[:1])
    found = data[name].subset(rows)
    figures = evaluate(model, found, ("exact_match",), tokenizer, batch_size=4, max_new_tokens=7)
    assert abs(figures["loss"] - loss) < 1e-5 * loss
    assert abs(untouched - loss) > 1e-2
    cut = batches(found, 4)
    values = [part.values for part in predict(model, found, cut, tokenizer, 7)]
    written = {i: text for indices, own in zip(cut, values, strict=True) for i, text in zip(indices, own, strict=True)}
    assert [written[i] for i in rows] == texts
    assert len({*texts}) > 1


@pytest.mark.parametrize("name", ["bart", "mbart"])
def test_a_base_that_has_learnt_its_answers_scores_one(
    folders: dict[str, Path], data: dict[str, Encoded], name: str
) -> None:
    """Trained in full on four rows, it writes them: training and generation begin and end answers alike."""
    model = tiny.load(folders[name], "instruction", trains="all")
    tokenizer = tiny.processor(folders[name], "instruction")
    few = data[name].subset([0, 1, 5, 10])
    local = LocalConfig(learning_rate=5e-3, batch_size=4)
    work = Assignment("client-0", Broadcast({}, model.dense()), np.arange(4), 60, 1.0)
    result = train(model, work, few, TrainingSettings(local=local), 0)
    model.load(Broadcast({}, result.update.dense))
    figures = evaluate(model, few, ("exact_match", "rouge_l"), tokenizer, batch_size=3, max_new_tokens=12)
    assert (figures["exact_match"], figures["rouge_l"]) == (1.0, 1.0)
    assert figures["loss"] < 0.1


def test_wide_batches_in_parts(
    folders: dict[str, Path], data: dict[str, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of similar prompts together, whose answers have lengths of their own, give the gradient of the batch."""
    model = tiny.load(folders["t5"], "instruction")
    sent = tiny.broadcast(model)
    local = LocalConfig(learning_rate=0.3, batch_size=8, optimizer="sgd")
    work = Assignment("client-0", sent, np.arange(40), 2, 1.0)
    whole = train(model, work, data["t5"], TrainingSettings(local=local), 0)
    monkeypatch.setattr(length_parts, "WIDEST", 0)
    monkeypatch.setattr(length_parts, "WORTH_A_PART", 2 * seq2seq.SIZE**2)
    assert length_parts.worth_a_part(model, data["t5"], 8) is not None
    cut = train(model, work, data["t5"], TrainingSettings(local=local), 0)
    x, y, start = (tiny.flat(found) for found in (cut.update.modules, whole.update.modules, sent.adapter))
    for name in y:
        assert (x[name] - y[name]).norm() <= 1e-3 * (y[name] - start[name]).norm() + 1e-7, name
    assert any(not torch.equal(x[name], y[name]) for name in y)


@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_together_is_alone(
    folders: dict[str, Path], data: dict[str, Encoded], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed ranks, unequal data and steps; with the shapes of a CPU, and with the fixed ones of a GPU."""
    model = tiny.load(folders[name], "instruction")
    assert cohort.applies(model, data[name], Recipe(), config()) is None
    group = clients(model, 2, 8, 3, 1, steps=(3, 5, 1, 4), sizes=(9, 40, 3, 1))
    chosen = config(warmup=0.5, optimizer="sgd", learning_rate=0.01)
    wanted = alone(model, data[name], group, chosen)
    agree(cohort.work(model, data[name], group, chosen, 2), wanted, group, CLOSE)
    monkeypatch.setattr(cohort, "_on_cpu", cohort._on_device)
    agree(cohort.work(model, data[name], group, chosen, 2), wanted, group, CLOSE)


def test_dropout_at_two_lengths_is_drawn_for_one_client_at_a_time(data: dict[str, Encoded], tmp_path: Path) -> None:
    model = tiny.load(seq2seq.save("bart", tmp_path / "bart", dropout=0.1), "instruction")
    assert cohort.applies(model, data["bart"], Recipe(), config()) == (
        "its dropout is in an encoder and a decoder, at two lengths"
    )


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_every_examples_gradient_is_the_one_it_has_alone(
    folders: dict[str, Path], data: dict[str, Encoded], name: str
) -> None:
    """To 1e-4 of its norm, beside rows of other lengths."""
    model, rows = tiny.load(folders[name], "instruction"), [0, 5, 7, 11, 2]
    sent = tiny.broadcast(model)
    model.load(sent)
    wanted = []
    for row in rows:
        chosen = model.trainable(Recipe())
        torch.autograd.backward(client_losses(model, data[name].batch([row])).sum())
        wanted.append({key: p.grad.clone() for key, p in chosen.items() if p.grad is not None})
        model.model.zero_grad()
    with private_gradients(model, sent, PrivacyConfig(), 7, 5) as private:
        grads = private.of(data[name].batch(rows))
        places = private.stack.trained.places
        for i, truth in enumerate(wanted):
            gap = 0.0
            for key, (start, shape) in places.items():
                own = grads[i, start : start + math.prod(shape)].view(shape)
                gap += float((own - truth[key]).square().sum())
            size = math.sqrt(sum(float(g.square().sum()) for g in truth.values()))
            assert math.sqrt(gap) <= 1e-4 * size


def test_losses_of_fixed_shapes_are_the_losses(folders: dict[str, Path], data: dict[str, Encoded]) -> None:
    """Two clients of two rows, one of which only fills its client's batch."""
    model = tiny.load(folders["bart"], "instruction")
    batch = data["bart"].batch([3, 9, 14, 14])
    real = torch.tensor([[True, True], [True, False]])
    (fixed,) = fixed_shape_batches([(batch, real, 40)], 0, lambda size: size + 3)
    wanted = client_losses(model, batch, 2, real.flatten())
    torch.testing.assert_close(fixed_shape_losses(model, fixed), wanted, rtol=1e-5, atol=0)


def test_too_long_sides_are_cut_apart_and_said(folders: dict[str, Path]) -> None:
    """The prompt keeps its end and the special tokens around it; the answer its start; both are counted."""
    long = Rows("instruction", [("abcdefghij", ""), ("a", "")], ["zyxwvutsrq", "b"], ["", ""])
    config = DataConfig(template="{instruction}", max_length=6)
    data = prepare(str(folders["bart"]), config, Corpus("instruction", long, long, None, None, None, 0, ()))
    tokenizer = tiny.processor(folders["bart"], "instruction")
    batch = data.data["train"].batch([0, 1])
    assert batch["input_ids"][0].tolist() == tokenizer("ghij")["input_ids"]
    assert batch["labels"][0].tolist() == tokenizer("zyxwv")["input_ids"][:6]
    assert batch["labels"][1].tolist() == [*tokenizer("b")["input_ids"], -100, -100, -100]
    (note,) = data.data["train"].notes
    assert note == (
        "of 2 rows, 1 prompts lost their start; 1 answers lost their end, and so the token that ends them "
        "(data.max_length = 6)"
    )


def test_text_of_the_data_is_never_a_special_token(folders: dict[str, Path]) -> None:
    rows = Rows("instruction", [("say </s>", ""), ("b", "")], ["<s></s>", "b"], ["", ""])
    config = DataConfig(template="{instruction}")
    data = prepare(str(folders["t5"]), config, Corpus("instruction", rows, rows, None, None, None, 0, ()))
    batch = data.data["train"].batch([0])
    assert batch["input_ids"][0].tolist().count(2) == 1
    assert batch["labels"][0].tolist().count(2) == 1
    assert len(batch["labels"][0]) == len("<s></s>") + 1


def test_a_base_that_does_not_say_how_answers_begin_is_refused(tmp_path: Path) -> None:
    folder = seq2seq.save("t5", tmp_path / "t5")
    for name in ("config.json", "generation_config.json"):
        stated = json.loads((folder / name).read_text())
        stated["decoder_start_token_id"] = None
        (folder / name).write_text(json.dumps(stated))
    tokenizer = tiny.processor(folder, "instruction")
    with pytest.raises(FedspanError, match=r"config.json has no decoder_start_token_id: expected one$"):
        decoder_start(str(folder), "instruction", tokenizer)


def test_a_base_that_computes_its_loss_in_a_way_of_its_own_is_refused(
    folders: dict[str, Path], data: dict[str, Encoded]
) -> None:
    model = tiny.load(folders["bart"], "instruction")
    check_loss(model, data["bart"])
    model.model.prepare_decoder_input_ids_from_labels = lambda labels: labels  # type: ignore[assignment]
    forward = model.model.forward
    model.model.forward = lambda **inputs: _with_loss(forward(**inputs))  # type: ignore[assignment]
    with pytest.raises(FedspanError, match="the loss of this encoder-decoder is"):
        check_loss(model, data["bart"])


def _with_loss(output: Any) -> Any:
    if output.loss is not None:
        output.loss = output.loss * 1.5
    return output


def test_the_command_trains_a_t5_folder_on_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From `fedspan run` to an adapter that plain PEFT loads, with the loss that the summary states."""
    from peft import PeftModel

    base = seq2seq.save("t5", tmp_path / "t5", dropout_rate=0.1)
    with (tmp_path / "tasks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output"])
        writer.writerows([[*ROWS.inputs[row], ROWS.targets[row]] for row in range(16)])
    options = [
        f"model.name={base}",
        "data.task=files",
        f'data.train=["{tmp_path / "tasks.csv"}"]',
        f'data.test=["{tmp_path / "tasks.csv"}"]',
        "data.template={instruction}: {input}",
        "federation.num_clients=3",
        "federation.rounds=2",
        "federation.partition=iid",
        "federation.ranks=4",
        "local.steps=2",
        "local.learning_rate=0.01",
        "engine.workers=1",
        "evaluation.local=false",
        "evaluation.max_new_tokens=4",
    ]
    sets = [part for option in options for part in ("--set", option)]
    code = main(["run", *sets, "--out", str(tmp_path / "run")])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert "sequential engine (its dropout is in an encoder and a decoder, at two lengths)" in output.out
    loaded = PeftModel.from_pretrained(plain(base), str(tmp_path / "run" / "adapter")).eval()
    loss, _ = plain_figures("t5", loaded, tiny.processor(base, "instruction"), list(range(16)), 1)
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["server"]["loss"]
    assert abs(last - loss) < 1e-4 * loss


def test_sites_have_the_bits_of_one_process(folders: dict[str, Path], instructions: Path, tmp_path: Path) -> None:
    made = tiny.config(
        folders["bart"],
        instructions,
        "fedit",
        federation={"num_clients": 2, "rounds": 1, "participation": 1.0},
        evaluation={"every": 9, "diagnostics": False, "base": False},
        engine={"name": "sequential"},
        deployment={"wait": 20, "deadline": 30},
    )
    sites = make_sites(made, ["client-0", "client-1"], tmp_path / "sites")
    transport = MemoryTransport({f"node-{name}": site.answer for name, site in sites.items()})
    far, near = serve(made, tmp_path / "far", ignore, transport), run(made, tmp_path / "near", ignore)
    assert far.history[0]["num_clients"] == near.history[0]["num_clients"] == 2
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "far" / weights).read_bytes() == (tmp_path / "near" / weights).read_bytes()
