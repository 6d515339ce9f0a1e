"""Laws of the model that clients pass through: what is loaded is what runs, and nothing of the last client stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Broadcast, Factors, GaloreOptions, Recipe
from fedspan.methods.patches import Patch, patch_dense
from fedspan.models import FederatedModel, load_processor
from fedspan.runs.export import merged_adapter
from fedspan.support.seeding import generator

KINDS = {**tiny.KIND, "llama-classifier": "classification"}
ARCHITECTURES = sorted(KINDS)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def folder(bases: dict[str, Path], name: str) -> Path:
    return bases[name.removesuffix("-classifier")]


def federated(bases: dict[str, Path], name: str, **changes: Any) -> FederatedModel:
    return tiny.load(folder(bases, name), KINDS[name], **changes)


def plain(bases: dict[str, Path], name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same base as transformers alone loads it; its head is random."""
    import transformers as t

    auto = {
        "instruction": t.AutoModelForCausalLM,
        "classification": t.AutoModelForSequenceClassification,
        "image": t.AutoModelForImageClassification,
    }[KINDS[name]]
    labels = {} if KINDS[name] == "instruction" else {"num_labels": 3, "ignore_mismatched_sizes": True}
    return auto.from_pretrained(str(folder(bases, name)), dtype=dtype, **labels)


def logits(model: nn.Module, kind: str) -> Tensor:
    rng = generator("inputs")
    with torch.no_grad():
        if kind == "image":
            return model(pixel_values=torch.randn(3, 3, 16, 16, generator=rng)).logits
        return model(input_ids=torch.randint(4, 90, (3, 11), generator=rng)).logits


def by_hand(base: nn.Module, deltas: dict[str, Tensor], dense: dict[str, Tensor]) -> nn.Module:
    """`base` with every ΔW (m, n) added to its weight, as the layer stores it, and `dense` put in place."""
    own = dict(base.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            conv = type(base.get_submodule(name)).__name__ == "Conv1D"
            own[f"{name}.weight"].add_(delta.T if conv else delta)
        for name, value in dense.items():
            own[name].copy_(value)
    return base


def products(adapter: dict[str, Factors]) -> dict[str, Tensor]:
    return {name: f.scaling * (f.b @ f.a) for name, f in adapter.items()}


def random_patch(model: FederatedModel, form: str, *key: object, size: float = 1.0) -> dict[str, Patch]:
    adapter = tiny.random_adapter(model, 2, "patch", *key, scaling=size)
    low = {name: f.delta() for name, f in adapter.items()}
    return {name: patch_dense(x) for name, x in low.items()} if form == "dense" else dict(low)


def base_weights(model: FederatedModel) -> dict[str, Tensor]:
    layers = {name: layer.get_base_layer() for name, layer in model.layers.items()}
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_template_says_out_and_in_features_whichever_way_a_layer_stores_them(
    bases: dict[str, Path], name: str
) -> None:
    shapes = federated(bases, name).modules()
    own = plain(bases, name)
    assert shapes
    for module, (m, n) in shapes.items():
        out = own.get_submodule(module)(torch.zeros(1, n))
        assert out.shape == (1, m), module


def test_all_linear_is_every_linear_layer_but_heads_and_new_layers(bases: dict[str, Path]) -> None:
    for name in ARCHITECTURES:
        own = plain(bases, name)
        linear = {n for n, layer in own.named_modules() if type(layer).__name__ in ("Linear", "Conv1D")}
        expected = {n for n in linear if n not in ("lm_head", "classifier", "score", "bert.pooler.dense")}
        assert set(federated(bases, name).layers) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_load_and_read_are_inverse_at_every_rank_one_after_the_other(bases: dict[str, Path], name: str) -> None:
    model = federated(bases, name)
    for rank in (8, 1, 5, 2, 7, 3, 8, 4, 6):
        adapter = tiny.random_adapter(model, rank, scaling=1.0 / rank)
        sent = tiny.broadcast(model, adapter)
        model.load(sent)
        tiny.same_adapter(model.adapter(), adapter)
        tiny.same(model.dense(), sent.dense)


def test_what_is_loaded_and_what_is_read_are_copies(bases: dict[str, Path]) -> None:
    model = federated(bases, "bert")
    sent = tiny.broadcast(model)
    before = {name: t.clone() for name, t in (tiny.flat(sent.adapter) | dict(sent.dense)).items()}
    model.load(sent)
    read = tiny.flat(model.adapter()) | model.dense()
    with torch.no_grad():
        for parameter in model.trainable(Recipe()).values():
            parameter.add_(1.0)
    tiny.same(tiny.flat(sent.adapter) | dict(sent.dense), before)
    tiny.same(read, before)
    live = tiny.flat(model.adapter()) | model.dense()
    for tensor in (*read.values(), *before.values()):
        tensor.zero_()
    tiny.same(tiny.flat(model.adapter()) | model.dense(), live)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("patched", ["none", "lowrank", "dense"])
def test_the_model_computes_base_plus_patch_plus_scaled_product(
    bases: dict[str, Path], name: str, patched: str
) -> None:
    """The logits are those of a plain copy of the base with the sum written into its weights by hand."""
    model = federated(bases, name)
    adapter = tiny.random_adapter(model, 3, scaling=0.7)
    patch = {} if patched == "none" else random_patch(model, patched, size=0.4)
    model.load(tiny.broadcast(model, adapter, patch=patch))
    deltas = products(adapter)
    deltas = {n: d + patch_dense(patch[n]) if n in patch else d for n, d in deltas.items()}
    kind = KINDS[name]
    torch.testing.assert_close(
        logits(model.model, kind), logits(by_hand(plain(bases, name), deltas, model.dense()), kind), **CLOSE
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_factors_of_square_layers_are_told_apart_by_place_not_shape(bases: dict[str, Path], name: str) -> None:
    """At r = m = n nothing but the place says which factor is which; the transposed product is another function."""
    model = federated(bases, name, max_rank=tiny.SIZE, target_modules=("o_proj" if name == "llama" else "c_proj",))
    square = [n for n, shape in model.modules().items() if shape == (tiny.SIZE, tiny.SIZE)]
    assert len(square) == 2
    adapter = {n: f for n, f in tiny.random_adapter(model, tiny.SIZE, scaling=0.2).items()}
    model.load(tiny.broadcast(model, adapter))
    found = logits(model.model, "instruction")
    right = products(adapter)
    wrong = {n: d.T if n in square else d for n, d in right.items()}
    torch.testing.assert_close(found, logits(by_hand(plain(bases, name), right, {}), "instruction"), **CLOSE)
    assert not torch.allclose(found, logits(by_hand(plain(bases, name), wrong, {}), "instruction"), atol=0.01)


@pytest.mark.parametrize("form", ["lowrank", "dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_patch_below_the_rounding_of_a_half_precision_base_survives(
    bases: dict[str, Path], name: str, form: str
) -> None:
    model = federated(bases, name, dtype="bfloat16", target_modules=("o_proj" if name == "llama" else "c_attn",))
    module = next(iter(model.layers))
    layer = model.layers[module].get_base_layer()
    assert layer.weight.dtype == torch.bfloat16
    _, n = model.modules()[module]
    stored = layer.weight.detach()
    weight = (stored.T if name == "gpt2" else stored).float()  # (m, n)
    # Each entry is a fifth of the spacing of its weight's numbers, all in one direction: Σ over n counts.
    small = 2.0**-10 * weight.abs().min(dim=1, keepdim=True).values
    factors = LowRank(small, torch.ones(1, n))
    patch: Patch = factors if form == "lowrank" else factors.dense()
    assert torch.equal((weight + patch_dense(patch)).bfloat16().float(), weight)
    x = torch.full((2, n), 64.0, dtype=torch.bfloat16)
    before = layer(x)
    zero = tiny.random_adapter(model, 2, scaling=0.0)
    model.load(tiny.broadcast(model, zero, patch={module: patch}))
    expected = (before.float() + x.float() @ patch_dense(patch).T).bfloat16()
    assert torch.equal(layer(x), expected)
    assert not torch.equal(expected, before)
    model.load(tiny.broadcast(model, zero))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fifty_patches_leave_no_trace(bases: dict[str, Path], name: str, dtype: str) -> None:
    """Each patch is applied to the original base, so that repeated rounds cannot make it drift."""
    model = federated(bases, name, dtype=dtype)
    zero = tiny.random_adapter(model, 2, scaling=0.0)
    original, first = base_weights(model), logits(model.model, "instruction")
    for i in range(50):
        model.load(tiny.broadcast(model, zero, patch=random_patch(model, ("lowrank", "dense")[i % 2], i)))
    last = logits(model.model, "instruction")
    fresh = federated(bases, name, dtype=dtype)
    fresh.load(tiny.broadcast(fresh, zero, patch=random_patch(fresh, "dense", 49)))
    assert torch.equal(last, logits(fresh.model, "instruction"))
    assert not torch.allclose(last.float(), first.float(), atol=1e-2)
    model.load(tiny.broadcast(model, zero))
    tiny.same(base_weights(model), original)
    model.load(tiny.broadcast(model, zero, patch={}))
    tiny.same(base_weights(model), original)


def test_a_patch_on_some_layers_takes_back_the_one_before_on_others(bases: dict[str, Path]) -> None:
    model = federated(bases, "llama")
    original = base_weights(model)
    patch = random_patch(model, "lowrank")
    one, other, *_ = sorted(patch)
    model.load(tiny.broadcast(model, patch={one: patch[one]}))
    model.load(tiny.broadcast(model, patch={other: patch[other]}))
    changed = {n for n, w in base_weights(model).items() if not torch.equal(w, original[n])}
    assert changed == {other}


def test_a_head_is_drawn_from_the_run_seed(bases: dict[str, Path]) -> None:
    for name in ("bert", "llama-classifier", "vit"):
        state = torch.get_rng_state()
        one, again, other = (federated(bases, name, seed=seed).dense() for seed in (5, 5, 6))
        assert torch.equal(torch.get_rng_state(), state)
        tiny.same(one, again)
        assert not all(torch.equal(one[n], other[n]) for n in one)


def test_dense_weights_are_the_head_and_what_the_files_did_not_hold(bases: dict[str, Path]) -> None:
    head = {"classifier.weight", "classifier.bias"}
    assert set(federated(bases, "vit").dense()) == head
    assert set(federated(bases, "llama-classifier").dense()) == {"score.weight"}
    assert set(federated(bases, "llama").dense()) == set()
    bert = federated(bases, "bert")
    assert set(bert.dense()) == head | {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert bert.heads == ("classifier", "bert.pooler.dense")
    assert not any(name.startswith("bert.pooler") for name in bert.layers)


def test_what_trains_is_what_the_recipe_says(bases: dict[str, Path]) -> None:
    model = federated(bases, "bert")

    def training() -> set[str]:
        return {name for name, p in model.model.named_parameters() if p.requires_grad}

    for train_a, train_b in ((True, True), (False, True), (True, False)):
        model.load(tiny.broadcast(model))
        chosen = model.trainable(Recipe(train_a=train_a, train_b=train_b))
        assert len(chosen) == len(training()) == (train_a + train_b) * len(model.layers) + len(model.dense())
        assert any("lora_A" in name for name in training()) == train_a
        assert any("lora_B" in name for name in training()) == train_b
        assert not any("base_layer" in name for name in training())


def test_full_weight_training_is_of_the_targets_or_of_everything(bases: dict[str, Path]) -> None:
    targets = federated(bases, "bert", trains="targets", target_modules=("query", "value"))
    assert targets.adapter() == {}
    weights = {f"{name}.weight" for name in targets.layers}
    assert len(weights) == 4
    assert targets.projected == weights
    assert set(targets.dense()) == weights | {f"{head}.{part}" for head in targets.heads for part in ("weight", "bias")}
    everything = federated(bases, "bert", trains="all")
    assert set(everything.dense()) == {n for n, _ in plain(bases, "bert").named_parameters()}
    assert set(everything.trainable(Recipe())) == set(everything.dense())
    tied = federated(bases, "gpt2", trains="all")
    assert "lm_head.weight" not in tied.dense()
    assert federated(bases, "bert", trains="targets", dtype="bfloat16").model.dtype == torch.float32


def test_a_projector_wider_than_a_layer_is_refused_by_name(bases: dict[str, Path]) -> None:
    model = federated(bases, "llama", trains="targets")
    model.check(Recipe(galore=GaloreOptions(rank=16)))
    with pytest.raises(ValueError, match=r"galore_rank = 17: model\.layers\.0\.self_attn\.k_proj\.weight is 16×32"):
        model.check(Recipe(galore=GaloreOptions(rank=17)))


def test_targets_that_match_nothing_name_the_endings_that_there_are(bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="'attention' matches no linear layer") as caught:
        federated(bases, "llama", target_modules=("q_proj", "attention"))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)
    with pytest.raises(ValueError, match="'roj' matches no"):  # an ending is a whole name
        federated(bases, "llama", target_modules=("roj",))
    with pytest.raises(ValueError, match="'classifier' matches no"):
        federated(bases, "vit", target_modules=("classifier",))


def test_a_rank_above_a_layer_is_refused_by_name(bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"rank 17 .*k_proj \(16×32\).*at most 16"):
        federated(bases, "llama", max_rank=17, target_modules=("q_proj", "k_proj"))
    federated(bases, "llama", max_rank=32, target_modules=("q_proj",))
    federated(bases, "llama", max_rank=99, trains="all")


def damaged(base: Path, path: Path, change: str) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, path)
    weights, config = path / "model.safetensors", path / "config.json"
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "empty":
        weights.write_bytes(b"")
    elif change == "absent":
        weights.unlink()
    elif change == "pickled":
        torch.save(load_file(weights), path / "pytorch_model.bin")
        weights.unlink()
    elif change == "renamed":
        save_file({f"x.{n}": t for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    elif change == "partial":
        kept = {n: t for n, t in load_file(weights).items() if "layers.1" not in n and "layer.1" not in n}
        save_file(kept, weights, metadata={"format": "pt"})
    elif change == "json":
        config.write_text("{")
    elif change == "type":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": "wide"}))
    elif change == "size":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 2 * tiny.SIZE}))
    return path


@pytest.mark.parametrize("kind", ["instruction", "classification"])
@pytest.mark.parametrize(
    "change", ["truncated", "empty", "absent", "pickled", "renamed", "partial", "json", "type", "size"]
)
def test_an_unreadable_or_incomplete_base_gives_one_line(
    bases: dict[str, Path], tmp_path: Path, kind: str, change: str
) -> None:
    path = damaged(bases["llama"], tmp_path / "base", change)
    with pytest.raises(ValueError, match=r"model\.name = .*expected a") as caught:
        tiny.load(path, kind)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_or_of_another_kind_gives_one_line(bases: dict[str, Path], tmp_path: Path) -> None:
    for path, kind in ((tmp_path / "nowhere", "instruction"), (bases["vit"], "instruction"), (bases["llama"], "image")):
        with pytest.raises(ValueError, match=r"model\.name = .*could not be read") as caught:
            tiny.load(path, kind)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"model\.name = .*could not be read"):
        tiny.processor(tmp_path, "instruction")
    with pytest.raises(ValueError, match=r"model\.name = .*could not be read"):
        tiny.processor(tmp_path, "image")


def test_loading_is_strict(bases: dict[str, Path]) -> None:
    """What a broadcast leaves out would stay from the client before; a shape of 1 would be spread over a weight."""
    model = federated(bases, "bert")
    good = tiny.broadcast(model)
    module, weight = next(iter(good.adapter)), "classifier.weight"
    f = good.adapter[module]
    without = {n: x for n, x in good.adapter.items() if n != module}
    swapped = Factors(torch.zeros(f.a.shape[1] + 1, 4), f.a, 1.0)
    bad = (
        (Broadcast(without, good.dense), "the broadcast lacks"),
        (Broadcast({**good.adapter, "x": f}, good.dense), "unknown x"),
        (Broadcast({**good.adapter, module: swapped}, good.dense), "shape"),
        (Broadcast(good.adapter, {}), "the broadcast lacks"),
        (Broadcast(good.adapter, {**good.dense, "y": f.a}), "unknown y"),
        (Broadcast(good.adapter, {**good.dense, weight: torch.ones(1)}), "shape"),
    )
    before = tiny.flat(model.adapter()) | model.dense()
    for broadcast, message in bad:
        with pytest.raises(ValueError, match=message):
            model.load(broadcast)
        tiny.same(tiny.flat(model.adapter()) | model.dense(), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("patched", ["none", "lowrank", "dense"])
def test_a_saved_adapter_is_what_peft_loads_on_the_untouched_base(
    bases: dict[str, Path], tmp_path: Path, name: str, patched: str
) -> None:
    from peft import PeftModel

    model = federated(bases, name, seed=1)
    patch = {} if patched == "none" else random_patch(model, patched, size=0.4)
    sent = tiny.broadcast(model, tiny.random_adapter(model, 3, scaling=0.7), patch=patch)
    model.load(sent)
    model.save_adapter(tmp_path / "adapter", merged_adapter(sent), sent.dense)
    loaded = PeftModel.from_pretrained(plain(bases, name), str(tmp_path / "adapter")).eval()
    kind = KINDS[name]
    found = logits(loaded, kind)
    torch.testing.assert_close(found, logits(model.model, kind), **CLOSE)
    assert not torch.allclose(found, logits(plain(bases, name), kind), atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("trains", ["targets", "all"])
def test_a_saved_model_is_what_transformers_loads(
    bases: dict[str, Path], tmp_path: Path, name: str, trains: str
) -> None:
    model = federated(bases, name, trains=trains)
    rng = generator("noise")
    dense = {n: t + 0.05 * torch.randn(t.shape, generator=rng) for n, t in model.dense().items()}
    model.load(Broadcast({}, dense))
    processor = tiny.processor(bases[name], KINDS[name])
    model.save_weights(tmp_path / "model", processor)
    kind = KINDS[name]
    loaded = plain({name: tmp_path / "model"}, name)
    assert torch.equal(logits(loaded, kind), logits(model.model, kind))
    tiny.processor(tmp_path / "model", kind)


def test_a_silent_tokenizer_learns_its_end_token_from_the_model(bases: dict[str, Path], tmp_path: Path) -> None:
    """Some published folders hold a bare tokenizer.json beside a config.json that names the end token."""
    folder = tmp_path / "bare"
    shutil.copytree(bases["llama"], folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    expected = load_processor(str(bases["llama"]), "instruction").eos_token_id
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "eos_token_id": expected}))
    assert load_processor(str(folder), "instruction").eos_token_id == expected
