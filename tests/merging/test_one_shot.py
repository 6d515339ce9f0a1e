"""One-shot merging, against dense float64 oracles and against PEFT's own models."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedspan.adapters.peft_folder import CONFIG_NAME, WEIGHTS_NAME, load
from fedspan.merging.merge_report import MergeReport
from fedspan.merging.one_shot import combine, merge
from fedspan.methods import METHODS, create
from fedspan.methods.messages import Request, Template
from fedspan.support.seeding import generator

torch.set_num_threads(1)
SHAPES = {"l.0.q": (12, 9), "l.0.up": (20, 7), "l.1.q": (12, 9)}
MIXED: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 3, "use_rslora": True},
    {"r": 3, "lora_alpha": 16, "rank_pattern": {"1.q": 6, "up": 1}, "alpha_pattern": {"q": 5}},
]
UNIFORM: list[dict[str, Any]] = [{"r": 3, "lora_alpha": 6}] * 3
WEIGHTS = [1.0, 5.0, 2.0]
SHARES = [w / 8 for w in WEIGHTS]
EXACT = ["glora", "flexlora", "flora"]


def pair(options: dict[str, Any], name: str, seed: int) -> tuple[Tensor, Tensor, float]:
    """(B, A, s) of one module, its rank and alpha read from the config by hand."""
    rank = next((r for key, r in options.get("rank_pattern", {}).items() if name.endswith(key)), options["r"])
    alpha = next(
        (x for key, x in options.get("alpha_pattern", {}).items() if name.endswith(key)), options["lora_alpha"]
    )
    m, n = SHAPES[name]
    b = torch.randn(m, rank, generator=generator(seed, name, "b"))
    a = torch.randn(rank, n, generator=generator(seed, name, "a"))
    return b, a, alpha / (rank**0.5 if options.get("use_rslora") else rank)


def head(seed: int) -> Tensor:
    return torch.randn(3, 5, generator=generator(seed, "head"))


def write(root: Path, clients: Sequence[dict[str, Any]], same_a: bool = False, **extra: Any) -> list[Path]:
    """One folder per client, written by hand: PEFT's files without PEFT and without the code under test."""
    folders = []
    for seed, options in enumerate(clients):
        folder = root / f"client-{seed}"
        folder.mkdir()
        tensors = {"base_model.model.score.weight": head(seed)}
        for name in SHAPES:
            b, a, _ = pair(options, name, seed)
            a = pair(options, name, 0)[1] if same_a else a
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        save_file(tensors, folder / WEIGHTS_NAME)
        config = {"peft_type": "LORA", "base_model_name_or_path": "base", "modules_to_save": ["score"]}
        (folder / CONFIG_NAME).write_text(json.dumps(config | options | extra))
        folders.append(folder)
    return folders


def average(clients: Sequence[dict[str, Any]], shares: Sequence[float] = SHARES) -> dict[str, Tensor]:
    """T = Σ p_k s_k B_k A_k, dense and in float64."""
    total = {}
    for name in SHAPES:
        terms = [pair(options, name, seed) for seed, options in enumerate(clients)]
        total[name] = sum(p * s * (b.double() @ a.double()) for p, (b, a, s) in zip(shares, terms, strict=True))
    return total


def products(folder: Path) -> dict[str, Tensor]:
    return {name: f.delta().dense().double() for name, f in load(folder).factors.items()}


def assert_products(folder: Path, expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    written = products(folder)
    assert written.keys() == expected.keys()
    for name, delta in expected.items():
        error = (written[name] - delta).norm() / delta.norm()
        assert error < tolerance, f"{name}: {error}"


def best(x: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(x)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize(
    "options",
    [
        *({"name": name} for name in EXACT),
        {"name": "glora", "basis": "energy"},
        {"name": "glora", "sides": "both"},
        {"name": "glora", "update": "innovation"},
        {"name": "glora", "start": "state"},
        {"name": "glora", "readout": "nested"},
    ],
    ids=lambda o: "-".join(o.values()),
)
def test_exact_methods_write_the_true_average(options: dict[str, Any], tmp_path: Path) -> None:
    """Mixed ranks, alphas, rsLoRA and patterns: the written adapter is T to 1e-5, and the report says so."""
    folders = write(tmp_path, MIXED, revision="v1")
    report = merge(folders, create(**options), weights=WEIGHTS, out=tmp_path / "out")
    assert_products(tmp_path / "out", average(MIXED))
    written = load(tmp_path / "out").config
    assert (written["base_model_name_or_path"], written["revision"]) == ("base", "v1")
    assert report.distance_overall < 1e-5
    assert report.lost_overall < 1e-5
    # 2 + 4 + 3, 2 + 4 + 6 of at most 9, and 2 + 4 + 1 directions of at most 7.
    assert report.ranks == {"l.0.q": 9, "l.0.up": 7, "l.1.q": 9} == report.full_ranks
    mean_head = sum(p * head(k) for k, p in enumerate(SHARES))
    torch.testing.assert_close(load(tmp_path / "out").dense["score.weight"], mean_head)


@pytest.mark.parametrize("name", ["fedex_lora", *EXACT])
def test_a_uniform_cohort_is_exact_under_every_exact_method(name: str, tmp_path: Path) -> None:
    """Equal ranks: FedEx-LoRA's means and residual, joined, are T like the others."""
    folders = write(tmp_path, UNIFORM)
    merge(folders, create(name), weights=WEIGHTS, out=tmp_path / "out")
    assert_products(tmp_path / "out", average(UNIFORM))


def test_fedex_folds_different_alphas(tmp_path: Path) -> None:
    """With one rank but several alphas the sum of means and residual is still T."""
    clients = [{"r": 3, "lora_alpha": alpha} for alpha in (2, 6, 30)]
    merge(write(tmp_path, clients), create("fedex_lora"), weights=WEIGHTS, out=tmp_path / "out")
    assert_products(tmp_path / "out", average(clients))


def test_fedit_writes_the_product_of_the_means(tmp_path: Path) -> None:
    """s·B̄Ā with each module's own scaling, far from T; the report measures how far."""
    clients = [{"r": 3, "lora_alpha": 6, "alpha_pattern": {"up": 24}, "rank_pattern": {"1.q": 2}}] * 3
    folders = write(tmp_path, clients)
    report = merge(folders, create("fedit"), weights=WEIGHTS, out=tmp_path / "out")
    expected = {}
    for name in SHAPES:
        terms = [pair(options, name, seed) for seed, options in enumerate(clients)]
        b = sum(p * b.double() for p, (b, _, _) in zip(SHARES, terms, strict=True))
        a = sum(p * a.double() for p, (_, a, _) in zip(SHARES, terms, strict=True))
        expected[name] = terms[0][2] * b @ a
    assert_products(tmp_path / "out", expected)
    target = average(clients)
    gap = sum((expected[n] - target[n]).norm() ** 2 for n in SHAPES) ** 0.5
    size = sum(target[n].norm() ** 2 for n in SHAPES) ** 0.5
    assert report.distance_overall == pytest.approx(float(gap / size), rel=1e-4)
    assert report.distance_overall > 0.2
    assert report.lost_overall < 1e-5


def test_hetlora_pads_and_weights_by_norm(tmp_path: Path) -> None:
    """Ā, B̄ padded with zeros and weighted by n_k·‖ΔW_k‖, per-module ranks included."""
    folders = write(tmp_path, MIXED)
    merge(folders, create("hetlora"), weights=WEIGHTS, out=tmp_path / "out")
    terms = {n: [pair(o, n, k) for k, o in enumerate(MIXED)] for n in SHAPES}
    sizes = [sum((t[k][2] * t[k][0] @ t[k][1]).norm() ** 2 for t in terms.values()) ** 0.5 for k in range(3)]
    weights = [w * float(size) for w, size in zip(WEIGHTS, sizes, strict=True)]
    expected = {}
    for name, (m, n) in SHAPES.items():
        b_mean, a_mean = torch.zeros(m, 6).double(), torch.zeros(6, n).double()
        for w, (b, a, s) in zip(weights, terms[name], strict=True):
            b_mean[:, : b.shape[1]] += w / sum(weights) * s * b.double()
            a_mean[: a.shape[0]] += w / sum(weights) * a.double()
        expected[name] = b_mean @ a_mean
    assert_products(tmp_path / "out", expected)


def test_ffa_lora_averages_b_for_a_common_a(tmp_path: Path) -> None:
    """With one A everywhere the result is T; it has no more directions than A."""
    folders = write(tmp_path, UNIFORM, same_a=True)
    report = merge(folders, create("ffa_lora"), weights=WEIGHTS, out=tmp_path / "out")
    expected = {}
    for name in SHAPES:
        b = sum(p * pair(o, name, k)[0].double() for k, (p, o) in enumerate(zip(SHARES, UNIFORM, strict=True)))
        _, a, s = pair(UNIFORM[0], name, 0)
        expected[name] = s * b @ a.double()
    assert_products(tmp_path / "out", expected)
    assert set(report.ranks.values()) == {3}
    assert report.distance_overall < 1e-5


@pytest.mark.parametrize("name", ["hetlora", "fedex_lora", "fedit", *EXACT])
def test_a_rank_limit_gives_the_best_adapter_of_that_rank(name: str, tmp_path: Path) -> None:
    """With `rank` the file holds the truncated SVD of the unlimited result, and the report says what that lost."""
    clients = UNIFORM if name.startswith("fed") else MIXED
    folders = write(tmp_path, clients)
    whole = merge(folders, create(name), weights=WEIGHTS, out=tmp_path / "all")
    report = merge(folders, create(name), weights=WEIGHTS, rank=2, out=tmp_path / "two")
    full, target = products(tmp_path / "all"), average(clients)
    expected = {module: best(x, 2) for module, x in full.items()}
    assert_products(tmp_path / "two", expected, 1e-4)
    assert {f.rank for f in load(tmp_path / "two").factors.values()} == {2} == {report.rank}
    for module, x in full.items():
        assert report.lost[module] == pytest.approx(float((x - expected[module]).norm() / x.norm()), rel=1e-3)
        far = (target[module] - expected[module]).norm() / target[module].norm()
        assert report.distance[module] == pytest.approx(float(far), rel=1e-3)
    assert 0.05 < report.lost_overall < 1
    assert "would hold everything" in str(report)
    assert report.unlimited is None
    own = max(f.rank for folder in folders for f in load(folder).factors.values())
    assert (whole.unlimited is not None) == (whole.rank > own)
    if whole.unlimited is not None:
        merge(folders, create(name), weights=WEIGHTS, rank=own, out=tmp_path / "own")
        files = [load_file(tmp_path / place / "adapter_model.safetensors") for place in ("all", "own")]
        sizes = [sum(t.numel() for key, t in file.items() if "lora_" in key) for file in files]
        assert [whole.unlimited.rank, whole.unlimited.written, whole.unlimited.limited] == [own, *sizes]
        cut = math.hypot(*(float((x - best(x, own)).norm()) for x in full.values()))
        norm = math.hypot(*(float(x.norm()) for x in full.values()))
        assert whole.unlimited.lost == pytest.approx(cut / norm, rel=1e-3)


def test_glora_server_rank_limits_the_state(tmp_path: Path) -> None:
    """The method's own option is honoured, and its cost shows as distance, not as truncation."""
    folders = write(tmp_path, MIXED)
    report = merge(folders, create("glora", server_rank=2), out=tmp_path / "out")
    assert report.rank == 2
    assert report.lost_overall < 1e-5
    assert report.distance_overall > 0.1
    assert report.diagnostics["truncation_error"] == pytest.approx(report.distance_overall, rel=1e-3)


def test_one_adapter_and_equal_adapters_come_back(tmp_path: Path) -> None:
    """Merging an adapter alone, or with copies of itself, keeps its update and its head bit for bit."""
    folders = write(tmp_path, MIXED)
    for number, given in enumerate(([folders[2]], [folders[2]] * 3)):
        out = tmp_path / f"out{number}"
        merge(given, create("glora"), out=out)
        b, a, s = pair(MIXED[2], "l.1.q", 2)
        torch.testing.assert_close(products(out)["l.1.q"], s * b.double() @ a.double(), rtol=1e-4, atol=1e-5)
        assert torch.equal(load(out).dense["score.weight"], head(2))


def test_zero_adapters_merge_to_zero(tmp_path: Path) -> None:
    """Freshly initialised adapters (B = 0) are no error, and nothing is divided by zero."""
    folders = write(tmp_path, UNIFORM)
    for folder in folders:
        tensors = {f"base_model.model.{n}.lora_A.weight": torch.ones(3, SHAPES[n][1]) for n in SHAPES}
        tensors |= {f"base_model.model.{n}.lora_B.weight": torch.zeros(SHAPES[n][0], 3) for n in SHAPES}
        save_file(tensors | {"base_model.model.score.weight": head(0)}, folder / WEIGHTS_NAME)
    for name in ["hetlora", "fedit", "fedex_lora", *EXACT]:
        report = merge(folders, create(name), out=tmp_path / name)
        assert all(not x.any() for x in products(tmp_path / name).values())
        assert (report.lost_overall, report.distance_overall, report.rank) == (0.0, 0.0, 1)


def test_half_precision_is_merged_in_float32(tmp_path: Path) -> None:
    """bfloat16 factors: the result is the average of what they say, not of a rounded sum."""
    folders = write(tmp_path, UNIFORM)
    for seed, folder in enumerate(folders):
        tensors = {"base_model.model.score.weight": head(seed)}
        for name in SHAPES:
            b, a, _ = pair(UNIFORM[0], name, seed)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
        save_file(tensors, folder / WEIGHTS_NAME)
    merge(folders, create("flora"), out=tmp_path / "out")
    expected = {}
    for name in SHAPES:
        terms = [pair(UNIFORM[0], name, seed) for seed in range(3)]
        expected[name] = sum(2.0 / 3 * b.bfloat16().double() @ a.bfloat16().double() for b, a, _ in terms)
    assert_products(tmp_path / "out", expected)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_merges_or_says_which_can(name: str, tmp_path: Path) -> None:
    """No method fails in its own way: it writes an adapter, or names methods that would."""
    folders = write(tmp_path, UNIFORM)
    method = create(name)
    info = method.info
    mergeable = info.trains == "adapter" and not info.pooled and not info.personalised
    if mergeable and len(method.exchanges) == 1:
        sent = method.broadcast(method.init(Template({"x": (2, 2)}, 1), {}), Request(None))
        # Or the folders would have to share an A, or all bases.
        mergeable = sent.recipe.train_a and not sent.recipe.confined
    if mergeable and len(method.exchanges) == 1:
        report = merge(folders, method, out=tmp_path / "out")
        assert report.method == name
        assert name in str(report)
        assert load(tmp_path / "out").config["r"] == report.rank
    else:
        with pytest.raises(ValueError, match=f"{name}.*: expected .*flora") as caught:
            merge(folders, method, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        if name == "ffa_lora":
            assert "l.0.q, l.0.up, l.1.q" in str(caught.value)


# PEFT's own models


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(lambda: LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    return _seeded(lambda: GPT2LMHeadModel(config))


def _seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def trained(base: nn.Module, seed: int, **options: Any) -> PeftModel:
    model = get_peft_model(base, LoraConfig(**options)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator(seed, name))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).reshape(2, 6)).logits


def moved(base: nn.Module, models: Sequence[PeftModel], shares: Sequence[float]) -> nn.Module:
    """The base with Σ p_k ΔW_k added to its weights, ΔW_k from PEFT."""
    model = copy.deepcopy(base)
    for peft_model, share in zip(models, shares, strict=True):
        for name, module in peft_model.named_modules():
            if isinstance(module, LoraLayer):
                layer = model.get_submodule(name.removeprefix("base_model.model."))
                delta = module.get_delta_weight("default").detach()
                layer.weight = nn.Parameter(layer.weight + share * delta)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_runs_the_merged_adapter(kind: str, tmp_path: Path) -> None:
    """PeftModel.from_pretrained on the output gives the model with the averaged updates, Conv1D and embeddings too."""
    base = llama if kind == "llama" else gpt2
    options: list[dict[str, Any]] = (
        [
            {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"},
            {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}},
        ]
        if kind == "llama"
        else [{"r": r, "target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True} for r in (2, 4)]
    )
    models = [trained(base(), seed, **o) for seed, o in enumerate(options)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    report = merge([tmp_path / "0", tmp_path / "1"], create("glora"), weights=[1, 3], out=tmp_path / "out")
    assert report.distance_overall < 1e-5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        ours = logits(PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval())
    torch.testing.assert_close(ours, logits(moved(base(), models, [0.25, 0.75])), rtol=1e-4, atol=1e-5)
    assert (ours - logits(base())).abs().max() > 0.05


@pytest.mark.filterwarnings("ignore")
def test_pefts_linear_combination_is_not_the_average(tmp_path: Path) -> None:
    """add_weighted_adapter("linear") puts √(w·s) on each factor and multiplies the sums: cross terms, like FedIT's.

    The true average is what an exact merge writes; both others miss it by more than a tenth of its norm.
    """
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    models = [trained(llama(), seed, **options) for seed in range(2)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    both = PeftModel.from_pretrained(llama(), str(tmp_path / "0"), adapter_name="x0")
    both.load_adapter(str(tmp_path / "1"), adapter_name="x1")
    both.add_weighted_adapter(["x0", "x1"], [0.5, 0.5], "mean", combination_type="linear")
    layers = {n: m for n, m in both.named_modules() if isinstance(m, LoraLayer)}
    folders = [tmp_path / "0", tmp_path / "1"]
    merge(folders, create("flora"), out=tmp_path / "exact")
    merge(folders, create("fedit"), out=tmp_path / "fedit")
    exact, fedit = products(tmp_path / "exact"), products(tmp_path / "fedit")
    for name, layer in layers.items():
        truth = (0.5 * layer.get_delta_weight("x0") + 0.5 * layer.get_delta_weight("x1")).detach().double()
        linear = layer.get_delta_weight("mean").detach().double()
        key = name.removeprefix("base_model.model.")
        assert (exact[key] - truth).norm() < 1e-5 * truth.norm()
        assert (linear - truth).norm() > 0.1 * truth.norm()
        assert (fedit[key] - truth).norm() > 0.1 * truth.norm()


# What is refused


def edit(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0, 2.0]}, "2 weights for 3 adapters"),
        ({"weights": [1.0, -2.0, 1.0]}, "weight -2.0: expected a finite number above 0"),
        ({"weights": [1.0, 0.0, 1.0]}, "weight 0.0"),
        ({"weights": [1.0, float("nan"), 1.0]}, "weight nan"),
        ({"weights": [1.0, float("inf"), 1.0]}, "weight inf"),
        ({"rank": 0}, "rank = 0: expected a whole number of at least 1"),
        ({"folders": []}, "no adapter to merge"),
        ({"folders": "client-0"}, "folders = 'client-0': expected a list of folders"),
        ({"method": "flor"}, "unknown method 'flor'; did you mean 'flora'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"folders": write(tmp_path, UNIFORM), "method": create("flora")} | arguments
    with pytest.raises(ValueError, match=message):
        merge(**given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "other"}, "client-2 adapts 'other', .*client-0 adapts 'base'"),
        ({"base_model_name_or_path": None}, "client-2 adapts None, .*client-0 adapts 'base'"),
        ({"revision": "v2"}, "client-2 adapts 'base@v2', .*client-0 adapts 'base'"),
        ({"fan_in_fan_out": True}, "client-2: fan_in_fan_out is True: expected False"),
        ({"use_dora": True}, "client-2: use_dora is set"),
    ],
)
def test_adapters_of_different_bases(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Adapters that do not belong together are named, and nothing is written."""
    folders = write(tmp_path, UNIFORM)
    edit(folders[2], **changes)
    with pytest.raises(ValueError, match=message):
        merge(folders, create("flora"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_task_types_may_be_absent_but_not_differ(tmp_path: Path) -> None:
    folders = write(tmp_path, UNIFORM)
    edit(folders[1], task_type="SEQ_CLS")
    merge(folders, create("flora"), out=tmp_path / "out")
    assert load(tmp_path / "out").config["task_type"] == "SEQ_CLS"
    edit(folders[2], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"task_type is 'SEQ_CLS' in .*client-1 and 'CAUSAL_LM' in .*client-2"):
        merge(folders, create("flora"), out=tmp_path / "out2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("module", r"client-1 adapts other modules than .*client-0 \(l.0.extra\)"),
        ("shape", r"client-1: l.0.q is \(12, 8\): expected \(12, 9\), as in .*client-0"),
        ("no head", "client-1 saves other whole weights than .*client-0 \\(score.weight\\)"),
        ("head shape", r"client-1: score.weight is \(2, 5\): expected \(3, 5\)"),
        ("frozen", r"client-1: the base's embed_tokens.weight is not that of .*client-0"),
    ],
)
def test_adapters_of_different_shapes(change: str, message: str, tmp_path: Path) -> None:
    folders = write(tmp_path, UNIFORM)
    for seed in range(2):
        tensors = {"base_model.model.score.weight": head(seed)}
        for name in SHAPES:
            tensors[f"base_model.model.{name}.lora_B.weight"], tensors[f"base_model.model.{name}.lora_A.weight"] = pair(
                UNIFORM[0], name, seed
            )[:2]
        tensors["base_model.model.embed_tokens.weight"] = torch.ones(2)
        if seed == 1 and change == "module":
            tensors["base_model.model.l.0.extra.lora_A.weight"] = torch.ones(3, 4)
            tensors["base_model.model.l.0.extra.lora_B.weight"] = torch.ones(4, 3)
        elif seed == 1 and change == "shape":
            tensors["base_model.model.l.0.q.lora_A.weight"] = torch.ones(3, 8)
        elif seed == 1 and change == "no head":
            del tensors["base_model.model.score.weight"]
            edit(folders[1], modules_to_save=None)
        elif seed == 1 and change == "head shape":
            tensors["base_model.model.score.weight"] = torch.ones(2, 5)
        elif seed == 1:
            tensors["base_model.model.embed_tokens.weight"] = torch.zeros(2)
        save_file(tensors, folders[seed] / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=message):
        merge(folders[:2], create("flora"), out=tmp_path / "out")


@pytest.mark.parametrize("name", ["fedit", "fedex_lora"])
def test_methods_of_one_rank_refuse_mixed_ranks(name: str, tmp_path: Path) -> None:
    """The error names the module, both ranks, and the methods that can."""
    folders = write(tmp_path, MIXED)
    with pytest.raises(ValueError, match=f"{name} needs one rank per module; l.0.q has 2 .* and 4 in .*flexlora"):
        merge(folders, create(name), out=tmp_path / "out")


def test_fedit_refuses_mixed_scalings(tmp_path: Path) -> None:
    folders = write(tmp_path, [{"r": 3, "lora_alpha": 6}, {"r": 3, "lora_alpha": 9}])
    with pytest.raises(ValueError, match=r"one scaling per module; l\.0\.q has 2 .*client-0 and 3 in .*client-1"):
        merge(folders, create("fedit"), out=tmp_path / "out")


def test_the_output_folder_must_be_free(tmp_path: Path) -> None:
    """An input folder, like any other with something in it, is never written into."""
    folders = write(tmp_path, UNIFORM)
    before = (folders[0] / WEIGHTS_NAME).read_bytes()
    with pytest.raises(ValueError, match="client-0 exists already: expected a new or empty folder"):
        merge(folders, create("flora"), out=folders[0])
    assert (folders[0] / WEIGHTS_NAME).read_bytes() == before


def test_a_methods_name_stands_for_its_defaults(tmp_path: Path) -> None:
    folders = write(tmp_path, MIXED)
    merge(folders, create("flexlora"), out=tmp_path / "one")
    merge([str(folder) for folder in folders], "flexlora", rank=np.int64(64), out=str(tmp_path / "two"))
    one, two = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_combine_works_without_files(tmp_path: Path) -> None:
    """The same result in memory, adapters called by number in errors."""
    given = [load(folder) for folder in write(tmp_path, MIXED)]
    adapter, report = combine(given, create("flora"), weights=WEIGHTS)
    assert isinstance(report, MergeReport)
    assert report.shares == pytest.approx(SHARES)
    for name, delta in average(MIXED).items():
        torch.testing.assert_close(adapter.factors[name].delta().dense().double(), delta, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="in adapter 0 and 4 in adapter 1"):
        combine(given, create("fedit"))
