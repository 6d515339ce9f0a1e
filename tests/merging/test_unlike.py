"""Adapters of unlike make-up, merging rules of PEFT, and whole models: against PEFT's own models."""

from __future__ import annotations

import json
import math
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedspan.adapters.peft_folder import CONFIG_NAME, WEIGHTS_NAME, load
from fedspan.merging.one_shot import merge
from fedspan.merging.task_rules import TASK_RULES, TaskRule, create_rule
from fedspan.models.loading import seeded
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

PREFIX = "base_model.model."


def base_of(folder: Path, kind: str = "instruction") -> nn.Module:
    if kind == "instruction":
        return transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=3)


def trained(folder: Path, path: Path, seed: int, kind: str = "instruction", **options: Any) -> PeftModel:
    """An adapter with random weights, saved by PEFT."""
    task = "CAUSAL_LM" if kind == "instruction" else "SEQ_CLS"
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": task, **options}
    model = get_peft_model(base_of(folder, kind), LoraConfig(**given)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator(seed, name))
    model.save_pretrained(str(path))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 26).reshape(2, 11)).logits


def changes(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {n.removeprefix(PREFIX): m.get_delta_weight(adapter).detach() for n, m in layers.items()}


def rewrite(folder: Path, change: Any) -> None:
    """Rename or remove tensors of an adapter by a function of the dictionary."""
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


@pytest.fixture(scope="module")
def pair(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PeftModel]]:
    """Two adapters of one llama, on different modules and of different ranks."""
    folder = tmp_path_factory.mktemp("pair")
    options: list[dict[str, Any]] = [{}, {"r": 5, "target_modules": ["q_proj", "down_proj"]}]
    models = [trained(bases["llama"], folder / str(k), k, **o) for k, o in enumerate(options)]
    return folder, models


def folders(pair: tuple[Path, list[PeftModel]]) -> list[Path]:
    return [pair[0] / "0", pair[0] / "1"]


@pytest.mark.parametrize("method", ["flora", "glora", "flexlora", "hetlora"])
def test_an_absent_module_is_no_change(pair: tuple[Path, list[PeftModel]], tmp_path: Path, method: str) -> None:
    """The mean over all adapters, those without the module included, for exact rules; and refused unless asked for."""
    with pytest.raises(FedspanError, match=r"adapts other modules than .*or --missing zero \(missing='zero'\)"):
        merge(folders(pair), method, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = merge(folders(pair), method, weights=[1, 3], missing="zero", out=tmp_path / "out")
    found = {name: f.delta().dense() for name, f in load(tmp_path / "out").factors.items()}
    first, second = (changes(model) for model in pair[1])
    assert set(found) == set(first) | set(second)
    if method != "hetlora":
        for name, delta in found.items():
            expected = 0.25 * first.get(name, torch.zeros(())) + 0.75 * second.get(name, torch.zeros(()))
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
        assert report.distance_overall < 1e-5


def test_one_base_under_two_names(pair: tuple[Path, list[PeftModel]], tmp_path: Path, bases: dict[str, Path]) -> None:
    models = [trained(bases["llama"], tmp_path / str(k), k) for k in range(2)]
    config = json.loads((tmp_path / "1" / CONFIG_NAME).read_text())
    renamed = {**config, "base_model_name_or_path": "hub/llama", "revision": "v2"}
    (tmp_path / "1" / CONFIG_NAME).write_text(json.dumps(renamed))
    given = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(FedspanError, match=r"expected one base model, or --base NAME \(base=NAME\)"):
        merge(given, "flora", out=tmp_path / "out")
    merge(given, "flora", base=bases["llama"], out=tmp_path / "out")
    written = load(tmp_path / "out")
    assert written.base_model == str(bases["llama"])
    assert "revision" not in written.config
    deltas = [changes(model) for model in models]
    for name, f in written.factors.items():
        torch.testing.assert_close(f.delta().dense(), (deltas[0][name] + deltas[1][name]) / 2, rtol=1e-4, atol=1e-5)


def test_names_of_a_models_own_state_dict(pair: tuple[Path, list[PeftModel]], tmp_path: Path) -> None:
    """`.lora_A.default.weight`, as in `model.state_dict()`, is `.lora_A.weight`; a file of two adapters is refused."""
    source = folders(pair)[0]
    for name in ("own", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_NAME).write_text((source / CONFIG_NAME).read_text())
    tensors = load_file(source / WEIGHTS_NAME)
    named = {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}
    save_file(named, tmp_path / "own" / WEIGHTS_NAME)
    own, plain = load(tmp_path / "own"), load(source)
    assert own.factors.keys() == plain.factors.keys()
    for key, f in own.factors.items():
        assert torch.equal(f.b, plain.factors[key].b)
        assert torch.equal(f.a, plain.factors[key].a)
    other = {key.replace(".default.", ".other."): t.clone() for key, t in named.items()}
    save_file({**named, **other}, tmp_path / "two" / WEIGHTS_NAME)
    with pytest.raises(FedspanError, match="holds the adapters default, other: expected one"):
        load(tmp_path / "two")


def test_a_head_of_some_adapters_is_their_mean(bases: dict[str, Path], tmp_path: Path) -> None:
    """Three classifiers, of which one saved no head: the head is the weighted mean of the two that did."""
    for k in range(3):
        options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
        trained(bases["bert"], tmp_path / str(k), k, "classification", **options)
    given = [tmp_path / str(k) for k in range(3)]
    heads = [load(folder).dense for folder in given]
    rewrite(given[1], lambda t: [t.pop(key) for key in list(t) if "classifier" in key])
    config = json.loads((given[1] / CONFIG_NAME).read_text())
    (given[1] / CONFIG_NAME).write_text(json.dumps({**config, "modules_to_save": None}))
    with pytest.raises(FedspanError, match=r"saves other whole weights than .*missing zero"):
        merge(given, "flora", out=tmp_path / "out")
    merge(given, "flora", weights=[1, 5, 3], missing="zero", out=tmp_path / "out")
    for name, value in load(tmp_path / "out").dense.items():
        torch.testing.assert_close(value, 0.25 * heads[0][name] + 0.75 * heads[2][name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_written_type_is_the_one_asked_for(pair: tuple[Path, list[PeftModel]], tmp_path: Path, dtype: str) -> None:
    given = folders(pair)[:1]
    merge(given, "flora", out=tmp_path / "exact")
    merge(given, "flora", dtype=dtype, out=tmp_path / "out")
    exact = load_file(tmp_path / "exact" / WEIGHTS_NAME)
    for name, tensor in load_file(tmp_path / "out" / WEIGHTS_NAME).items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype)))


@pytest.mark.parametrize("name", TASK_RULES)
@pytest.mark.parametrize("weights", [None, [0.5, 1.5]])
def test_pefts_rules_are_pefts(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, weights: list[float] | None
) -> None:
    """One module, so that the random draws are the same: `add_weighted_adapter` with the combination on ΔW."""
    target = {"target_modules": ["layers.0.self_attn.q_proj"]}
    for k in range(2):
        trained(bases["llama"], tmp_path / str(k), k, **target)
    model = PeftModel.from_pretrained(base_of(bases["llama"]), str(tmp_path / "0"), adapter_name="x0")
    model.load_adapter(str(tmp_path / "1"), adapter_name="x1")
    given = weights or TaskRule(name).weights(None, 2)
    module = "model.layers.0.self_attn.q_proj"
    inner = "_svd_generalized_task_arithmetic_weighted_adapter"
    combine = getattr(LoraModel, inner)

    def same_draws(*args: Any, **options: Any) -> Any:
        with seeded(4, module):
            return combine(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(LoraModel, inner, same_draws)
        model.add_weighted_adapter(
            ["x0", "x1"], given, "both", combination_type=f"{name}_svd", density=0.4, svd_rank=32
        )
    rule = create_rule(name, density=0.4, seed=4)
    report = merge([tmp_path / "0", tmp_path / "1"], rule, weights=weights, out=tmp_path / "out")
    expected = changes(model, "both")[module]
    found = load(tmp_path / "out").factors[module].delta().dense()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert report.method == name
    assert report.shares == pytest.approx(given), "the report gives the factors that were used"
    if name == "magnitude_prune" and weights is None:
        assert report.distance_overall < 0.8  # of the mean, which its default weights aim at


def test_a_density_of_one_is_task_arithmetic(pair: tuple[Path, list[PeftModel]], tmp_path: Path) -> None:
    for name in ("magnitude_prune", "dare_linear"):
        rule = create_rule(name, density=1)
        report = merge(folders(pair), rule, missing="zero", out=tmp_path / name)
        assert report.distance_overall < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "method.density = 0: expected a number above 0 and at most 1"),
        ({"density": 1.5}, "method.density = 1.5"),
        ({"density": "half"}, "method.density = 'half'"),
        ({"density": math.nan}, "method.density = nan"),
        ({"majority_sign_method": "vote"}, "majority_sign_method = 'vote': expected 'total' or 'frequency'"),
        ({"seed": -1}, "method.seed = -1"),
        ({"dnsity": 0.5}, "unknown key 'method.dnsity'; did you mean 'density'"),
    ],
)
def test_options_of_pefts_rules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FedspanError, match=message):
        create_rule("ties", **options)


@pytest.mark.parametrize(("name", "dtype"), [("llama", None), ("llama", "bfloat16"), ("gpt2", None)])
def test_a_whole_model_is_merge_and_unload(
    bases: dict[str, Path], tmp_path: Path, name: str, dtype: str | None
) -> None:
    """Logits of PEFT's own merged model; the tokenizer's files lie beside the weights."""
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} if name == "gpt2" else {}
    model = trained(bases[name], tmp_path / "0", 0, **options)
    merge([tmp_path / "0"], "flora", full=True, dtype=dtype, base=bases[name], out=tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="auto")
    if dtype is None:
        torch.testing.assert_close(logits(found), logits(model.merge_and_unload()), rtol=1e-4, atol=1e-4)
        merged = dict(model.merge_and_unload().named_parameters())
        for key, parameter in found.named_parameters():
            torch.testing.assert_close(parameter, merged[key], rtol=1e-5, atol=1e-5)
    else:
        assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    texts = [
        transformers.AutoTokenizer.from_pretrained(str(f))("abc")["input_ids"] for f in (bases[name], tmp_path / "out")
    ]
    assert texts[0] == texts[1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_whole_classifier_has_the_adapters_head(bases: dict[str, Path], tmp_path: Path) -> None:
    """The base is a masked language model without a head or pooler; labels are counted from the adapter's."""
    options = {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}
    model = trained(bases["bert"], tmp_path / "0", 0, "classification", **options)
    merge([tmp_path / "0"], "flora", full=True, out=tmp_path / "out")
    found = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "out"))
    assert found.config.num_labels == 3
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)


def test_a_whole_image_model_is_of_the_bases_own_class(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT has no task type for images, so the base's architecture says what it is."""
    base = transformers.ViTForImageClassification.from_pretrained(str(bases["vit"]))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator(name))
    model.save_pretrained(str(tmp_path / "0"))
    merge([tmp_path / "0"], "flora", full=True, base=bases["vit"], out=tmp_path / "out")
    found = transformers.AutoModelForImageClassification.from_pretrained(str(tmp_path / "out")).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=generator("pixels"))
    with torch.no_grad():
        torch.testing.assert_close(found(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_what_no_model_can_be_made_of(bases: dict[str, Path], tmp_path: Path) -> None:
    trained(bases["llama"], tmp_path / "0", 0)
    trained(bases["bert"], tmp_path / "1", 0, "classification", target_modules=["query"])
    tied = tiny.save("llama", tmp_path / "tied", tie_word_embeddings=True)
    trained(tied, tmp_path / "2", 0, target_modules=["embed_tokens"])
    for folder, base, message in (
        ("0", "nowhere/at/all", "base 'nowhere/at/all' could not be read"),
        ("0", bases["gpt2"], "has no model.layers.0"),
        ("0", tiny.save("llama", tmp_path / "wide", intermediate_size=40), r"\(48, 32\) in the adapter and \(40, 32\)"),
        ("1", bases["bert"], "files lack 2 of the model's weights"),
        ("2", tied, "one weight for model.embed_tokens.weight and lm_head.weight"),
    ):
        with pytest.raises((FedspanError, AttributeError), match=message) as caught:
            merge([tmp_path / folder], "flora", full=True, base=base, out=tmp_path / "out")
        assert isinstance(caught.value, FedspanError)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    config = json.loads((tmp_path / "0" / CONFIG_NAME).read_text())
    (tmp_path / "0" / CONFIG_NAME).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(FedspanError, match="name no base, which a whole model needs: expected --base NAME"):
        merge([tmp_path / "0"], "flora", full=True, out=tmp_path / "out")


def test_the_conversions_of_the_documentation(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle and a DoRA adapter come back as plain LoRA folders that are merged."""
    page = (Path(__file__).parents[2] / "docs" / "merging.md").read_text(encoding="utf-8")
    of_bin, of_dora = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    trained(bases["llama"], tmp_path / "alice", 0)
    expected = load(tmp_path / "alice")
    torch.save(load_file("alice/" + WEIGHTS_NAME), "alice/adapter_model.bin")
    (tmp_path / "alice" / WEIGHTS_NAME).unlink()
    with pytest.raises(FedspanError, match=r"a pickle, which is never opened: .*docs/merging\.md"):
        load(tmp_path / "alice")
    exec(of_bin, {})
    for name, f in load(tmp_path / "alice").factors.items():
        assert torch.equal(f.b, expected.factors[name].b)
    dora = trained(bases["llama"], tmp_path / "dora", 1, use_dora=True)
    (tmp_path / "my-base").symlink_to(bases["llama"])
    exec(of_dora, {})
    plain = PeftModel.from_pretrained(base_of(bases["llama"]), "dora-as-lora")
    torch.testing.assert_close(logits(plain), logits(dora), rtol=1e-3, atol=1e-3)
    merge(["alice", "dora-as-lora"], "flora", base="my-base", out="out")


@pytest.mark.parametrize("full", [False, True])
def test_a_full_disk_is_no_bug_and_leaves_nothing(
    bases: dict[str, Path], pair: tuple[Path, list[PeftModel]], tmp_path: Path, full: bool
) -> None:
    """The kernel itself refuses to write more to any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises((FedspanError, OSError)) as caught:
            merge(folders(pair)[:1], "flora", full=full, base=bases["llama"], out=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_examples_are_no_factors() -> None:
    """Every other rule takes them; here the changes would be multiplied by hundreds."""
    with pytest.raises(FedspanError, match=r"weights = 300 100: ties multiplies .* such as the shares 0\.75 0\.25"):
        TaskRule("ties").weights([300, 100], 2)
    assert TaskRule("ties").weights([0.75, 10], 2) == [0.75, 10.0]
