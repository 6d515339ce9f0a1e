"""Laws of bases in 8 and 4 bits, and of half precision: what runs is x Ŵᵀ, and nothing is ever written into Ŵ."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import outcome
from test_models import KINDS, by_hand, folder, logits, plain, products, random_patch
from torch import Tensor, nn

from fedspan.methods.messages import Recipe
from fedspan.methods.patches import patch_dense
from fedspan.models import FederatedModel
from fedspan.models.layers import base_layer
from fedspan.models.losses import client_losses
from fedspan.models.merged import merged
from fedspan.models.quantised import QuantisedLinear, _pairs, base_size
from fedspan.runs.execution import resume, run
from fedspan.runs.export import merged_adapter
from fedspan.support.seeding import generator

LEVELS = torch.tensor(
    [-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
)
FORMS = ("int8", "nf4")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def library() -> None:
    pytest.importorskip("bitsandbytes")


def layer_of(form: str, m: int, n: int, bias: bool = False) -> tuple[QuantisedLinear, Tensor]:
    """A quantised layer of random codes, and its Ŵ worked out number by number in float64."""
    rng = generator("layer", form, m, n)
    drawn = torch.randn(m, generator=rng) if bias else None
    if form == "int8":
        codes = torch.randint(-127, 128, (m, n), generator=rng, dtype=torch.int8)
        scale = torch.rand(m, generator=rng) + 0.1
        dense = [[int(codes[i, j]) * float(scale[i]) / 127 for j in range(n)] for i in range(m)]
        return QuantisedLinear(codes, scale, (m, n), drawn), torch.tensor(dense, dtype=torch.float64)
    codes = torch.randint(0, 256, ((m * n + 1) // 2, 1), generator=rng, dtype=torch.uint8)
    scale = torch.rand(-(-m * n // 64), generator=rng) + 0.1
    halves = [half for byte in codes.view(-1).tolist() for half in (byte >> 4, byte & 15)]
    flat = [float(LEVELS[halves[i]]) * float(scale[i // 64]) for i in range(m * n)]
    layer = QuantisedLinear(codes, scale, (m, n), drawn, _pairs(LEVELS))
    return layer, torch.tensor(flat, dtype=torch.float64).view(m, n)


@settings(deadline=None)
@given(form=st.sampled_from(FORMS), m=st.integers(1, 17), n=st.integers(1, 23), bias=st.booleans())
def test_a_quantised_layer_is_a_linear_layer_of_its_dense_weight(form: str, m: int, n: int, bias: bool) -> None:
    """Its output and the gradient of its input, for any shape: also where a block ends within a row."""
    layer, weight = layer_of(form, m, n, bias)
    torch.testing.assert_close(layer.dense(torch.float32).double(), weight, rtol=1e-6, atol=1e-7)
    x = torch.randn(2, 3, n, generator=generator("x", n), requires_grad=True)
    g = torch.randn(2, 3, m, generator=generator("g", m))
    y = layer(x)
    y.backward(g)
    assert x.grad is not None
    shift = 0.0 if layer.bias is None else layer.bias.double()
    torch.testing.assert_close(y.double(), x.detach().double() @ weight.T + shift, **CLOSE)
    torch.testing.assert_close(x.grad.double(), g.double() @ weight, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_a_dense_weight_in_half_precision_is_rounded_once(form: str) -> None:
    layer, weight = layer_of(form, 64, 48)
    for dtype in (torch.bfloat16, torch.float16):
        half = layer.dense(dtype)
        assert half.dtype == dtype
        spacing = torch.finfo(dtype).eps / 2
        assert ((half.double() - weight).abs() <= spacing * 1.001 * weight.abs() + 1e-7).all()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_weights_size_waits_for_the_way_back(form: str) -> None:
    layer, weight = layer_of(form, 64, 48)
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    def saved(module: nn.Module) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            module(torch.ones(2, 48, requires_grad=True)).sum()
        return max(kept, default=0)

    assert saved(layer) == 0
    plain_layer = nn.Linear(48, 64, bias=False)
    plain_layer.weight.requires_grad_(False)
    assert saved(plain_layer) == weight.numel()


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_the_product_is_in_its_type_and_the_gradient_in_the_inputs(form: str) -> None:
    layer, weight = layer_of(form, 64, 48)
    x = torch.randn(5, 48, generator=generator("x"), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), x.detach().double() @ weight.T, rtol=0.05, atol=0.05)
    torch.testing.assert_close(x.grad.double(), weight.sum(dim=0).expand(5, -1), rtol=0.05, atol=0.05)


def test_without_the_library_a_quantised_base_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what an import finds where it is not installed
    nowhere = tmp_path / "nowhere"
    for form in FORMS:
        with pytest.raises(ValueError, match=r"not installed; pip install 'fedspan\[quantised\]'") as caught:
            tiny.load(nowhere, "instruction", quantise=form)
        assert str(caught.value).startswith(f"model.quantise = '{form}': bitsandbytes")
    with pytest.raises(ValueError, match=r"model\.name"):
        tiny.load(nowhere, "instruction", quantise="none")


def test_a_library_that_does_not_load_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bitsandbytes"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libbits.so: cannot open shared object file\\nmore')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with pytest.raises(ValueError, match=r"bitsandbytes cannot be used here \(libbits.so: cannot open") as caught:
        tiny.load(tmp_path, "instruction", quantise="nf4")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trains", ["targets", "all"])
def test_training_the_base_itself_is_refused_with_the_methods_that_do_not(tmp_path: Path, trains: str) -> None:
    with pytest.raises(ValueError, match=r"quantise = 'int8': .*methods that train adapters: .*glora") as caught:
        tiny.load(tmp_path / "nowhere", "instruction", trains=trains, quantise="int8")
    assert "fedavg" not in str(caught.value)
    with pytest.raises(ValueError, match="expected none, int8 or nf4"):
        tiny.load(tmp_path / "nowhere", "instruction", quantise="int3")


def test_a_base_whose_files_are_quantised_already_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(bases["llama"], tmp_path / "base")
    model_config = json.loads((path / "config.json").read_text())
    model_config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(model_config))
    with pytest.raises(ValueError, match="its files are quantised already; expected float32, bfloat16 or float16"):
        tiny.load(path, "instruction")


def quantised(bases: dict[str, Path], name: str, form: str, **changes: Any) -> FederatedModel:
    return tiny.load(folder(bases, name), KINDS[name], quantise=form, **changes)


def quantised_layers(model: FederatedModel) -> dict[str, QuantisedLinear]:
    """By their name in the base."""
    named = model.model.named_modules()
    return {n.replace(".base_layer", ""): layer for n, layer in named if isinstance(layer, QuantisedLinear)}


def dequantised(bases: dict[str, Path], name: str, model: FederatedModel) -> nn.Module:
    """The base as transformers alone loads it, with every Ŵ written into it."""
    base = plain(bases, name)
    with torch.no_grad():
        for layer_name, layer in quantised_layers(model).items():
            own: Any = base.get_submodule(layer_name)
            weight = layer.dense(torch.float32)
            own.weight.copy_(weight.T if type(own).__name__ == "Conv1D" else weight)
    return base


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(KINDS))
def test_quantised_are_the_linear_layers_but_what_is_trained_whole_and_the_output(
    bases: dict[str, Path], name: str, form: str
) -> None:
    model, other = quantised(bases, name, form), tiny.load(folder(bases, name), KINDS[name])
    assert quantised_layers(model).keys() == model.layers.keys() == other.layers.keys()
    assert model.modules() == other.modules()
    tiny.same(model.dense(), other.dense())
    weights, size = base_size(model.model)
    whole, most = base_size(other.model)
    assert weights == whole
    numbers = sum(m * n for m, n in model.modules().values())
    rows = sum(m for m, _ in model.modules().values())
    scales = 4 * rows if form == "int8" else sum(4 * -(-m * n // 64) for m, n in model.modules().values())
    per_number = 1.0 if form == "int8" else 0.5
    table = 0 if form == "int8" else 256 * 8
    assert size == most - 4 * numbers + per_number * numbers + scales + table


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_lost_is_at_most_half_a_step_of_the_format(bases: dict[str, Path], name: str, form: str) -> None:
    model, base = quantised(bases, name, form), plain(bases, name)
    for layer_name, layer in quantised_layers(model).items():
        own: Any = base.get_submodule(layer_name)
        weight = (own.weight.T if name == "gpt2" else own.weight).detach()
        lost = (layer.dense(torch.float32) - weight).abs()
        if form == "int8":
            largest = weight.abs().amax(dim=1, keepdim=True)
            # The library rounds to float16 first.
            assert (lost <= largest / 254 * 1.001 + 2.0**-11 * weight.abs() + 1e-6).all()
        else:
            blocks = weight.reshape(-1, 64)
            assert (lost.reshape(-1, 64) <= 0.153 * blocks.abs().amax(dim=1, keepdim=True)).all()
        assert lost.max() > 0


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("patched", ["none", "lowrank", "dense"])
def test_the_model_computes_the_dequantised_base_plus_patch_plus_scaled_product(
    bases: dict[str, Path], name: str, form: str, patched: str
) -> None:
    """Also where a patch is a thousandth of a step of the format: it is beside the base and not in it."""
    model = quantised(bases, name, form)
    codes = {n: layer.weight.clone() for n, layer in quantised_layers(model).items()}
    for size in (0.4, 1e-4):
        adapter = tiny.random_adapter(model, 3, scaling=0.7)
        patch = {} if patched == "none" else random_patch(model, patched, size=size)
        model.load(tiny.broadcast(model, adapter, patch=patch))
        deltas = products(adapter)
        deltas = {n: d + patch_dense(patch[n]) if n in patch else d for n, d in deltas.items()}
        expected = by_hand(dequantised(bases, name, model), deltas, model.dense())
        torch.testing.assert_close(
            logits(model.model, KINDS[name]), logits(expected, KINDS[name]), rtol=1e-4, atol=1e-4
        )
    tiny.same({n: layer.weight.data for n, layer in quantised_layers(model).items()}, codes)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
def test_fifty_patches_leave_no_trace_in_a_quantised_base(bases: dict[str, Path], form: str) -> None:
    model = quantised(bases, "llama", form)
    zero = tiny.random_adapter(model, 2, scaling=0.0)
    model.load(tiny.broadcast(model, zero))
    first = logits(model.model, "instruction")
    for i in range(50):
        model.load(tiny.broadcast(model, zero, patch=random_patch(model, ("lowrank", "dense")[i % 2], i)))
    assert not torch.allclose(logits(model.model, "instruction"), first, atol=1e-2)
    model.load(tiny.broadcast(model, zero))
    assert torch.equal(logits(model.model, "instruction"), first)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(KINDS))
def test_gradients_are_those_of_the_dequantised_base(bases: dict[str, Path], name: str, form: str) -> None:
    """In training too, after an evaluation, and with a patch: bitsandbytes' own layers fail the second on some CPUs."""
    model, other = quantised(bases, name, form), tiny.load(folder(bases, name), KINDS[name])
    with torch.no_grad():
        for layer_name, layer in quantised_layers(model).items():
            own = base_layer(other.layers[layer_name])
            weight = layer.dense(torch.float32)
            own.weight.copy_(weight.T if type(own).__name__ == "Conv1D" else weight)
    sent = tiny.broadcast(model, patch=random_patch(model, "lowrank", size=0.2))
    found: list[dict[str, Tensor]] = []
    for each in (model, other):
        each.load(sent)
        logits(each.model, KINDS[name])
        chosen = each.trainable(Recipe())
        with each.training(), torch.random.fork_rng():
            torch.manual_seed(0)
            with torch.enable_grad():
                client_losses(each, batch(KINDS[name])).sum().backward()
        found.append({n: p.grad for n, p in chosen.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == chosen.keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][key], rtol=1e-3, atol=1e-5)


def batch(kind: str) -> dict[str, Tensor]:
    rng = generator("batch")
    if kind == "image":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=rng), "labels": torch.tensor([0, 1, 2])}
    tokens = torch.randint(4, 90, (3, 11), generator=rng)
    labels = tokens if kind == "instruction" else torch.tensor([0, 1, 2])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_folds_nothing_into_a_quantised_base(bases: dict[str, Path], form: str) -> None:
    model = quantised(bases, "llama", form)
    model.load(tiny.broadcast(model))
    before = dict(model.model.named_modules())
    outside = logits(model.model, "instruction")
    with merged(model):
        assert dict(model.model.named_modules()) == before
        assert torch.equal(logits(model.model, "instruction"), outside)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_adapter_fits_the_base_in_full_precision(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    model = quantised(bases, name, "nf4")
    sent = tiny.broadcast(model, tiny.random_adapter(model, 3, scaling=0.7))
    model.save_adapter(tmp_path / "adapter", merged_adapter(sent), sent.dense)
    loaded = PeftModel.from_pretrained(plain(bases, name), str(tmp_path / "adapter")).eval()
    expected = by_hand(plain(bases, name), products(dict(sent.adapter)), {})
    torch.testing.assert_close(logits(loaded, "instruction"), logits(expected, "instruction"), rtol=1e-4, atol=1e-4)


def configured(base: Path, data: Path, method: str, form: str, /, **sections: Any) -> Any:
    federation = {"participation": 1.0} | sections.pop("federation", {})
    return tiny.config(
        base, data, method, model={"name": str(base), "quantise": form}, federation=federation, **sections
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("method", "form", "start"),
    [
        ("glora", "nf4", "fork"),
        pytest.param("flora", "int8", "fork", marks=pytest.mark.slow),
        pytest.param("flora", "nf4", "spawn", marks=pytest.mark.long),
    ],
)
def test_how_many_work_on_a_quantised_base_changes_no_bit(
    bases: dict[str, Path],
    instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    form: str,
    start: str,
) -> None:
    """Also where the base comes to them through shared memory."""
    monkeypatch.setattr("fedspan.client.executors.start_method", lambda device, threads: start)
    for workers in (1, 2):
        config = configured(bases["llama"], instructions, method, form, engine={"workers": workers})
        run(config, tmp_path / str(workers))
    one, two = outcome(tmp_path / "1"), outcome(tmp_path / "2")
    assert [name for name in one | two if one.get(name) != two.get(name)] == []


@pytest.mark.usefixtures("library")
def test_a_resumed_run_on_a_quantised_base_ends_with_the_same_bits(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedspan.federation.clients import Client
    from fedspan.runs.loop import MethodRun

    config = configured(bases["llama"], instructions, "flora", "nf4", federation={"rounds": 3})
    run(config, tmp_path / "whole")
    rounds = MethodRun._one_round

    def stop(self: MethodRun, round_num: int, cohort: list[Client], last: bool) -> None:
        if round_num == 2:
            raise KeyboardInterrupt
        rounds(self, round_num, cohort, last)

    with monkeypatch.context() as patched:
        patched.setattr(MethodRun, "_one_round", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "cut")
    resume(tmp_path / "cut")
    one, two = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    assert [name for name in one | two if one.get(name) != two.get(name)] == []


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
def test_the_cohort_learns_on_a_quantised_base_what_each_would_alone(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, form: str
) -> None:
    """A patch on the base among it: FLoRA's second round trains beside the first one's sum."""
    for engine in ("cohort", "sequential"):
        config = configured(bases["llama"], instructions, "flora", form, engine={"name": engine, "workers": 1})
        run(config, tmp_path / engine)
    one, two = (json.loads((tmp_path / e / "summary.json").read_text()) for e in ("cohort", "sequential"))
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / e / "metrics.jsonl").read_text().splitlines()]
        for e in ("cohort", "sequential")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert one["federated"] == pytest.approx(two["federated"], rel=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_half_precision_base_gives_nearly_the_gradients_of_the_whole(
    bases: dict[str, Path], name: str, dtype: str
) -> None:
    """Float16 has three more bits than bfloat16, and what is trained beside them is float32."""
    found: list[Tensor] = []
    sent = None
    for kind in ("float32", dtype):
        model = tiny.load(folder(bases, name), KINDS[name], dtype=kind)
        sent = sent or tiny.broadcast(model)
        model.load(sent)
        chosen = model.trainable(Recipe())
        assert {p.dtype for p in chosen.values()} == {torch.float32}
        client_losses(model, batch(KINDS[name])).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in chosen.values() if p.grad is not None]))
    off = float((found[1] - found[0]).norm() / found[0].norm())
    assert 0 < off < (0.02 if dtype == "float16" else 0.15)


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_a_base_that_is_not_quantised_does_not_pay_for_the_library(bases: dict[str, Path]) -> None:
    """PEFT imports it wherever it is installed: a second at the start of every run, and a line about other kernels."""
    script = (
        "import sys, torch; from fedspan.models import build; "
        f"m = build({str(bases['llama'])!r}, 'instruction', trains='adapter', num_labels=0, "
        "target_modules=('all-linear',), max_rank=4, rslora=False, dropout=0.0, dtype='float32', "
        "device=torch.device('cpu'), seed=0); print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    assert "kernels" not in done.stderr
