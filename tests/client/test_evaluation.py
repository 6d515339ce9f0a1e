"""Laws of evaluation: the figures are those of one example at a time, computed by other means."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sklearn.metrics
import tiny
import torch
import torch.nn.functional as F

from fedspan.algebra.lowrank import LowRank
from fedspan.client.evaluation import evaluate
from fedspan.config import DataConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.data.metrics import METRICS, Metric
from fedspan.models import FederatedModel
from fedspan.models.merged import merged
from fedspan.support.seeding import generator

TEXTS = [(row["text"] * (1 + i % 3),) for i, row in enumerate(tiny.words(20))]
LABELS = [i % 3 for i in range(20)]
QUESTIONS = [(f"say {'more ' * (i % 4)}", str(i)) for i in range(9)]
ANSWERS = ["yes" * (1 + i % 3) for i in range(9)]


def texts(labels: list[Any], tokenizer: Any = None) -> Encoded:
    return encode(Rows("classification", TEXTS, labels, [""] * 20), tokenizer or tiny.tokenizer(), DataConfig())


def tasks(answers: list[str] = ANSWERS, tokenizer: Any = None) -> Encoded:
    return encode(Rows("instruction", QUESTIONS, answers, [""] * 9), tokenizer or tiny.tokenizer(), DataConfig())


def score(
    model: FederatedModel,
    data: Encoded,
    *metrics: str,
    batch_size: int = 8,
    max_new_tokens: int = 4,
    processor: Any = None,
) -> dict[str, float]:
    return evaluate(
        model,
        data,
        metrics,
        processor or tiny.tokenizer(),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], list[Any]]]:
    """Predictions and references, as the metric called `caught` is given them."""
    found: list[tuple[list[Any], list[Any]]] = []

    def keep(predictions: Any, references: Any) -> float:
        found.append((list(predictions), list(references)))
        return 0.0

    kinds = ("instruction", "classification", "image")
    monkeypatch.setitem(METRICS, "caught", Metric(keep, "texts", kinds))  # texts, where there are prompts
    return found


def hidden_mean(model: FederatedModel, rows: list[torch.Tensor]) -> torch.Tensor:
    """The mean of what the classifier's last layer is given at the token that it classifies from."""
    seen: list[torch.Tensor] = []
    name = "classifier" if "classifier" in dict(model.model.named_children()) else "score"
    hook = model.model.get_submodule(name).register_forward_pre_hook(
        lambda layer, inputs: seen.append(inputs[0].reshape(-1, tiny.SIZE)[-1])
    )
    for row in rows:
        model.model(input_ids=row)
    hook.remove()
    return torch.stack(seen).mean(dim=0)


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
def test_classification_figures_are_sklearn_s_on_one_example_at_a_time(
    bases: dict[str, Path], base: str, caught: list[tuple[list[Any], list[Any]]]
) -> None:
    model = tiny.load(bases[base], "classification", pad_token_id=0)
    tokenizer = tiny.tokenizer()
    head = next(p for name, p in model.dense_parameters.items() if name in ("classifier.weight", "score.weight"))
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(text)["input_ids"]]) for (text,) in TEXTS]
        # Turned away from what all texts share, or a random head would give every one of them one class.
        shared = hidden_mean(model, rows)
        head.sub_((head @ shared)[:, None] * shared / shared.square().sum())
        logits = torch.cat([model.model(input_ids=row).logits for row in rows])
    predicted = logits.argmax(dim=1).tolist()
    assert len(set(predicted)) > 1
    found = score(model, texts(LABELS), "accuracy", "macro_f1", "matthews", "caught")
    assert caught == [(predicted, LABELS)]
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(LABELS))), rel=1e-5)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(LABELS, predicted))
    assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(LABELS, predicted, average="macro"))
    assert found["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(LABELS, predicted))


def test_regression_figures_are_of_the_number_itself(
    bases: dict[str, Path], caught: list[tuple[list[Any], list[Any]]]
) -> None:
    model = tiny.load(bases["bert"], "classification", num_labels=1, regression=True)
    wanted = [float(i) / 4 for i in range(20)]
    found = score(model, texts(wanted), "pearson", "caught", batch_size=7)
    predicted, references = caught[0]
    assert references == wanted
    errors = torch.tensor(predicted) - torch.tensor(wanted)
    assert found["loss"] == pytest.approx(float(errors.square().mean()), rel=1e-5)
    assert found["pearson"] == pytest.approx(float(torch.corrcoef(torch.tensor([predicted, wanted]))[0, 1]), rel=1e-4)


def test_image_figures_are_of_the_argmax(bases: dict[str, Path], caught: list[tuple[list[Any], list[Any]]]) -> None:
    model = tiny.load(bases["vit"], "image")
    pixels = torch.randn(10, 3, 16, 16, generator=generator("pixels"))
    labels = torch.arange(10) % 3
    data = Encoded("image", torch.arange(10), labels.tolist(), [""] * 10, None, pixels, labels)
    found = score(model, data, "accuracy", "caught", batch_size=4)
    with torch.no_grad():
        logits = model.model(pixel_values=pixels).logits
    assert caught[0] == (logits.argmax(dim=1).tolist(), labels.tolist())
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.parametrize(
    ("base", "kind"), [(b, "classification") for b in ("bert", "llama", "gpt2")] + [("llama", "instruction")]
)
def test_the_loss_does_not_depend_on_the_batch_size_nor_on_padding(
    bases: dict[str, Path], base: str, kind: str
) -> None:
    model = tiny.load(bases[base], kind, pad_token_id=0)
    data = texts(LABELS) if kind == "classification" else tasks()
    losses = [score(model, data, batch_size=size)["loss"] for size in (1, 3, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=2e-6)
    alone = [score(model, data.subset([i]))["loss"] for i in range(len(data))]
    sizes = [1] * len(data) if kind == "classification" else [len(answer) + 1 for answer in ANSWERS]
    mean = sum(a * n for a, n in zip(alone, sizes, strict=True)) / sum(sizes)
    assert losses[0] == pytest.approx(mean, rel=2e-6)


def test_a_classifier_that_pads_with_another_token_than_its_base_says(bases: dict[str, Path], tmp_path: Path) -> None:
    """A decoder finds its last token by the id of padding: it must be the id that the batches are padded with."""
    base = tiny.save("llama", tmp_path / "base", pad_token_id=None)
    for tokenizer, pad in ((tiny.tokenizer(), 0), (tiny.tokenizer(pad=False), 2)):
        data = texts(LABELS, tokenizer)
        assert data.texts is not None
        assert data.texts.pad == pad
        model = tiny.load(base, "classification", pad_token_id=data.texts.pad)
        alone, together = (score(model, data, "accuracy", batch_size=size) for size in (1, 20))
        assert together == pytest.approx(alone, rel=2e-6)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_generation_in_padded_batches_is_generation_one_by_one(
    bases: dict[str, Path], base: str, caught: list[tuple[list[Any], list[Any]]]
) -> None:
    model, tokenizer = tiny.load(bases[base], "instruction"), tiny.tokenizer()
    score(model, tasks(), "caught", batch_size=5, max_new_tokens=6)
    score(model, tasks(), "caught", batch_size=1, max_new_tokens=6)
    by_hand = []
    for instruction, text in QUESTIONS:
        ids = torch.tensor([tokenizer(f"{instruction}\n{text}\n")["input_ids"]])
        for _ in range(6):
            with torch.no_grad():
                token = int(model.model(input_ids=ids).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        start = len(tokenizer(f"{instruction}\n{text}\n")["input_ids"])
        by_hand.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert caught[0] == (by_hand, ANSWERS)
    assert caught[1] == (by_hand, ANSWERS)
    assert len(set(by_hand)) > 3


def test_text_is_judged_on_what_the_prompt_alone_brings_forth(
    bases: dict[str, Path], caught: list[tuple[list[Any], list[Any]]]
) -> None:
    """Not on the argmax under teacher forcing: the answers that are given have no say in the predictions."""
    model = tiny.load(bases["llama"], "instruction")
    for answers in (ANSWERS, ["quite another answer"] * 9):
        score(model, tasks(answers), "caught")
    assert caught[0][0] == caught[1][0]
    assert caught[0][1] != caught[1][1]


def test_generation_ends_at_the_limit_or_at_the_end_token(
    bases: dict[str, Path], caught: list[tuple[list[Any], list[Any]]]
) -> None:
    model = tiny.load(bases["llama"], "instruction")
    score(model, tasks(), "caught", max_new_tokens=1)
    assert all(len(text) <= 1 for text in caught[0][0])
    tokenizer = tiny.tokenizer()
    first = tokenizer.convert_tokens_to_ids(next(text for text in caught[0][0] if text))
    tokenizer.eos_token_id = first
    score(model, tasks(tokenizer=tokenizer), "caught", max_new_tokens=8, processor=tokenizer)
    assert "" in [text.replace(tokenizer.eos_token, "") for text in caught[1][0]]


def test_perplexity_is_the_exponential_of_the_loss(bases: dict[str, Path]) -> None:
    model = tiny.load(bases["llama"], "instruction", trains="all")
    found = score(model, tasks(), "perplexity")
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    with torch.no_grad():
        model.dense_parameters["lm_head.weight"].mul_(1e5)
    lost = score(model, tasks(), "perplexity")
    assert lost["loss"] > 1000
    assert lost["perplexity"] == math.inf  # and not an error that ends the run


def test_evaluation_changes_nothing_and_draws_nothing(bases: dict[str, Path]) -> None:
    model = tiny.load(bases["llama"], "instruction", dropout=0.5)
    sent = tiny.broadcast(model)
    model.load(sent)
    model.model.train()
    state = torch.get_rng_state()
    first, again = (score(model, tasks(), "rouge_l", "exact_match") for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    tiny.same_adapter(model.adapter(), sent.adapter)
    quiet = tiny.load(bases["llama"], "instruction")
    quiet.load(replace(sent))
    assert score(quiet, tasks()) == {"loss": first["loss"]}


def inputs(base: str) -> dict[str, torch.Tensor]:
    if base == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator("pixels"))}
    return {"input_ids": torch.arange(4, 40).view(3, 12)}


@pytest.mark.parametrize("base", sorted(tiny.KIND))
@pytest.mark.parametrize("patched", [False, True])
def test_adapters_folded_into_the_base_are_adapters_beside_it(bases: dict[str, Path], base: str, patched: bool) -> None:
    """And afterwards the model is what it was, to the bit."""
    model = tiny.load(bases[base], tiny.KIND[base])
    shapes = model.modules()
    patch = {name: LowRank(torch.randn(m, 1) * 0.1, torch.randn(1, n) * 0.1) for name, (m, n) in shapes.items()}
    model.load(tiny.broadcast(model, **({"patch": patch} if patched else {})))
    model.model.eval()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    with torch.no_grad():
        beside = model.model(**inputs(base)).logits
        with merged(model):
            inside = model.model(**inputs(base)).logits
            assert "lora" not in repr(model.model)
        after = model.model(**inputs(base)).logits
    torch.testing.assert_close(inside, beside, rtol=1e-4, atol=1e-4)
    assert not torch.equal(inside, beside)
    assert torch.equal(after, beside)
    tiny.same(model.model.state_dict(), before)


def test_what_cannot_be_folded_without_loss_or_thrift_stays_beside(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = (tiny.load(bases["llama"], "instruction", dtype=dtype) for dtype in ("bfloat16", "float32"))
    full = tiny.load(bases["llama"], "instruction", trains="all")
    assert_beside(half)
    assert_beside(full)
    monkeypatch.setattr("fedspan.models.merged.LARGEST", 1000)
    assert_beside(whole)


def assert_beside(model: FederatedModel) -> None:
    layers = dict(model.model.named_modules())
    with merged(model):
        assert all(layers[name] is layer for name, layer in model.model.named_modules())
