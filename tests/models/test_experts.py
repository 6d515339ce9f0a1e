"""Adapters on the experts of a mixture: each expert is a module to a method, and the saved folder is plain PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedspan.adapters import peft_folder
from fedspan.client.training import Assignment, LocalResult
from fedspan.merging.one_shot import merge
from fedspan.models import FederatedModel
from fedspan.models.experts import AdaptedExperts
from fedspan.models.merged import merged
from fedspan.models.selection import Selection
from fedspan.models.starting_adapter import start_from
from fedspan.runs.execution import run
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZES = {
    **{"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
}
KINDS = ("mixtral", "gpt_oss")
"""gpt-oss stores its experts transposed, and has biases that Mixtral has not."""


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab = len(tiny.SPECIAL) + len(tiny.CHARACTERS)
    made = {}
    for kind in KINDS:
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            config = AutoConfig.for_model(kind, vocab_size=vocab, initializer_range=0.3, **tiny.ENDS, **SIZES)
            AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
        tiny.tokenizer().save_pretrained(str(folder))
    return made


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def adapted(folder: Path, parameters: tuple[str, ...] = PARAMETERS, **changes: Any) -> FederatedModel:
    selection = Selection(changes.pop("target_modules", ("q_proj",)), target_parameters=parameters)
    return tiny.load(folder, "instruction", selection=selection, **changes)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.randint(4, 90, (3, 11), generator=generator("inputs"))).logits


def deltas(folder: Path) -> dict[str, Tensor]:
    return {name: f.delta().dense().double() for name, f in peft_folder.load(folder).factors.items()}


def by_peft(base: Path, path: Path, seed: int, rank: int = 2) -> PeftModel:
    """An adapter with random weights on experts and attention, made and saved by PEFT alone."""
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=["q_proj"], target_parameters=list(PARAMETERS))
    model = get_peft_model(plain(base), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator(name, seed))
    model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize("parameters", [PARAMETERS, ("experts.down_proj",)], ids=["both", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_saved_experts(
    mixtures: dict[str, Path], tmp_path: Path, kind: str, parameters: tuple[str, ...]
) -> None:
    """Other factors for every expert; and what PEFT computes without them is far away."""
    model = adapted(mixtures[kind], parameters)
    sent = tiny.broadcast(model, tiny.random_adapter(model, 3, scaling=0.7))
    model.load(sent)
    own = logits(model.model)
    with merged(model):
        torch.testing.assert_close(logits(model.model), own, **CLOSE)
    model.save_adapter(tmp_path / "saved", sent.adapter, sent.dense)
    loaded = PeftModel.from_pretrained(plain(mixtures[kind]), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(logits(loaded), own, **CLOSE)
    attention = {name: f for name, f in sent.adapter.items() if "experts" not in name}
    changed = {n: tiny.Factors(f.b * (n in attention), f.a, f.scaling) for n, f in sent.adapter.items()}
    model.load(tiny.broadcast(model, changed))
    assert (logits(model.model) - own).abs().max() > 0.1
    assert len(model.layers) == 2 * (1 + 4 * len(parameters))


def test_experts_alone_are_adapted(mixtures: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(mixtures["mixtral"], target_modules=())
    assert all("experts" in name for name in model.layers)
    sent = tiny.broadcast(model, tiny.random_adapter(model, 3))
    model.load(sent)
    model.save_adapter(tmp_path / "saved", sent.adapter, sent.dense)
    loaded = PeftModel.from_pretrained(plain(mixtures["mixtral"]), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(logits(loaded), logits(model.model), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_factors_are_those_of_the_summed_weights(mixtures: dict[str, Path], kind: str) -> None:
    """∂/∂B_e = s G_e A_eᵀ and ∂/∂A_e = s B_eᵀ G_e for the gradient G_e of the whole weight at W_e + s B_e A_e."""
    model = adapted(mixtures[kind])
    sent = tiny.broadcast(model, tiny.random_adapter(model, 2, scaling=0.5))
    model.load(sent)
    chosen = model.trainable(sent.recipe)
    ids = torch.randint(4, 90, (3, 11), generator=generator("inputs"))
    model.model(input_ids=ids).logits.square().mean().backward()
    whole = plain(mixtures[kind])
    parameters = dict(whole.named_parameters())
    transposed = kind == "gpt_oss"
    with torch.no_grad():
        for name, f in sent.adapter.items():
            module, _, number = name.rpartition(".")
            delta = f.delta().dense()
            if number.isdigit():
                parameters[module][int(number)] += delta.T if transposed else delta
            else:
                parameters[f"{name}.weight"] += delta
    whole(input_ids=ids).logits.square().mean().backward()
    for name, f in sent.adapter.items():
        module, _, number = name.rpartition(".")
        if not number.isdigit():
            continue
        grad = parameters[module].grad[int(number)]
        grad = grad.T if transposed else grad
        for part, expected in (("b", 0.5 * grad @ f.a.T), ("a", 0.5 * f.b.T @ grad)):
            torch.testing.assert_close(chosen[f"{name}/{part}"].grad, expected, rtol=1e-3, atol=1e-6)


def test_two_rounds_of_mixed_ranks(
    mixtures: dict[str, Path], instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert of the result is the mean of its clients' products, and plain PEFT has the reported loss."""
    learnt: dict[str, LocalResult] = {}

    def note(assignment: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        if round_num == 1:
            learnt[assignment.client_id] = result
        return result

    tiny.intercept(monkeypatch, note)
    config = tiny.config(
        mixtures["mixtral"],
        instructions,
        "glora",
        adapter={"target_modules": "q_proj", "target_parameters": PARAMETERS, "alpha": 8.0},
        federation={"num_clients": 3, "participation": 1.0, "ranks": [1, 2, 4], "rounds": 2},
        method={"server_rank": 12},
        local={"steps": 2, "batch_size": 4, "learning_rate": 0.05},
        evaluation={"per_rank": False, "base": False},
    )
    result = run(config, tmp_path / "run")
    updates = [work.update for work in learnt.values()]
    total = sum(update.num_examples for update in updates)
    names = updates[0].modules
    assert result.adapter is not None
    saved = peft_folder.load(result.adapter)
    ours = {name.replace("gate_up_proj", "base_layer").replace(".down_proj", ""): name for name in names}
    for stored, name in ours.items():
        products = [u.num_examples / total * u.factors(name).delta().dense().double() for u in updates]
        expected = torch.stack(products).sum(dim=0)
        torch.testing.assert_close(
            saved.factors[stored].delta().dense().double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    assert saved.stacks == {
        f"model.layers.{i}.mlp.experts{inner}": 4 for i in range(2) for inner in ("", ".base_layer")
    }
    assert sum(bool(f.b.any()) for name, f in saved.factors.items() if "experts" in name) >= 8


@pytest.mark.parametrize("name", ["flora", "fed_sb"])
def test_patches_and_gradients_reach_the_experts(
    mixtures: dict[str, Path], instructions: Path, tmp_path: Path, name: str
) -> None:
    """Rules that add to the base, or ask for a gradient of it, end with what plain PEFT computes."""
    config = tiny.config(
        mixtures["gpt_oss"],
        instructions,
        name,
        adapter={"target_modules": "q_proj", "target_parameters": PARAMETERS, "alpha": 8.0},
        federation={"num_clients": 2, "participation": 1.0, "ranks": 2, "rounds": 2},
        evaluation={"per_rank": False, "base": False},
    )
    result = run(config, tmp_path / "run")
    assert result.adapter is not None
    again = tiny.config(
        mixtures["gpt_oss"],
        instructions,
        "fedit",
        model={"adapter": str(result.adapter)},
        adapter={"target_modules": "q_proj", "target_parameters": PARAMETERS, "alpha": 8.0},
        federation={"num_clients": 2, "participation": 1.0, "ranks": 2, "rounds": 1},
        evaluation={"per_rank": False},
    )
    more = run(again, tmp_path / "more")
    reported = result.summary["metrics"]["server"]["loss"]
    assert more.summary["metrics"]["base"]["loss"] == pytest.approx(reported, rel=1e-4)
    assert reported != pytest.approx(more.summary["metrics"]["server"]["loss"], rel=1e-6)


def test_a_run_starts_from_pefts_own_adapter(mixtures: dict[str, Path], tmp_path: Path) -> None:
    start = by_peft(mixtures["gpt_oss"], tmp_path / "start", 1)
    model = adapted(mixtures["gpt_oss"])
    start_from(model, str(tmp_path / "start"))
    model.load(tiny.broadcast(model, tiny.random_adapter(model, 2, scaling=0.0)))
    torch.testing.assert_close(logits(model.model), logits(start), **CLOSE)
    sent = tiny.broadcast(model, tiny.random_adapter(model, 2, scaling=0.7))
    model.load(sent)
    model.save_adapter(tmp_path / "saved", sent.adapter, sent.dense)
    loaded = PeftModel.from_pretrained(plain(mixtures["gpt_oss"]), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(logits(loaded), logits(model.model), **CLOSE)
    with pytest.raises(FedspanError, match=r"adapts experts: expected adapter\.target_parameters = \["):
        start_from(adapted(mixtures["gpt_oss"], ("down_proj",)), str(tmp_path / "start"))


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_own_adapters_are_merged_expert_by_expert(mixtures: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The mean of two adapters' changes, by name and as a whole model, is that of plain PEFT's merged weights."""
    models = [by_peft(mixtures[kind], tmp_path / str(k), k, rank=2 + k) for k in range(2)]
    folders, base = [tmp_path / "0", tmp_path / "1"], mixtures[kind]
    merge(folders, "glora", weights=[1, 3], out=tmp_path / "merged")
    merge(folders, "glora", weights=[1, 3], out=tmp_path / "full", full=True, base=base)
    expected = {name: p.detach().clone() for name, p in plain(base).named_parameters()}
    before = {name: p.clone() for name, p in expected.items()}
    for share, model in zip((0.25, 0.75), models, strict=True):
        changed = dict(model.merge_and_unload().named_parameters())
        for name, p in before.items():
            expected[name] += share * (changed[name].detach() - p)
    loaded = PeftModel.from_pretrained(plain(base), str(tmp_path / "merged")).merge_and_unload()
    for found in (loaded, plain(tmp_path / "full")):
        for name, p in found.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"parameters": ("experts.w1",)}, r"'experts\.w1' matches no parameter; this model has model\.layers\.\*"),
    ({"parameters": ("q_proj.weight",)}, r"q_proj\.weight is 16×16 of torch\.float32: expected experts×rows×columns"),
    ({"dropout": 0.1}, r"adapter\.dropout = 0\.1 with adapter\.target_parameters: expected 0"),
    ({"trains": "targets"}, "this method trains weights; expected a method with adapters"),
    ({"max_rank": 13}, r"rank 13 is above what an expert of .*down_proj \(16×12\) can hold: expected at most 12"),
    ({"parameters": (), "target_modules": ()}, r"adapter\.target_modules is empty"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_no_expert_can_have_is_refused(mixtures: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FedspanError, match=message) as caught:
        adapted(mixtures["mixtral"], **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"name": "cohort"}}, r"engine\.name = 'cohort': experts compute the tokens of all rows together"),
        ({"privacy": {"dp": "example", "noise_multiplier": 1.0}}, "dp = 'example': experts compute the tokens of all"),
    ],
)
def test_clients_and_examples_do_not_share_a_pass(
    mixtures: dict[str, Path], instructions: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    config = tiny.config(
        mixtures["mixtral"], instructions, "glora", adapter={"target_parameters": PARAMETERS}, **sections
    )
    with pytest.raises(FedspanError, match=message):
        run(config, tmp_path / "run")


def edited(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"target_parameters": None}, r"lora_A \(8, "),
        ({"target_parameters": "experts"}, "target_parameters = 'experts': expected a list of names"),
        ({"rank_pattern": {"q_proj": 2}}, "target_parameters and rank_pattern are set"),
        ({"r": 3, "lora_alpha": 3}, r"expected \(3·E, in\) and \(out, 3·E\) for E experts"),
    ],
)
def test_a_folder_of_experts_that_does_not_fit_is_refused(
    mixtures: dict[str, Path], tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    by_peft(mixtures["mixtral"], tmp_path / "0", 0)
    edited(tmp_path / "0", **entries)
    with pytest.raises(FedspanError, match=message):
        peft_folder.load(tmp_path / "0")


def test_adapters_of_other_parameters_are_not_merged(mixtures: dict[str, Path], tmp_path: Path) -> None:
    for k in range(2):
        by_peft(mixtures["mixtral"], tmp_path / str(k), k)
    edited(tmp_path / "1", target_parameters=["experts.gate_up_proj", "experts.other"])
    with pytest.raises(FedspanError, match=r"target_parameters is .*: expected .*, as in"):
        merge([tmp_path / "0", tmp_path / "1"], "glora", out=tmp_path / "out")


def test_the_module_of_experts_shows_its_bases_attributes(mixtures: dict[str, Path]) -> None:
    model = adapted(mixtures["mixtral"])
    wrapped = next(layer for layer in model.model.modules() if isinstance(layer, AdaptedExperts))
    assert wrapped.num_experts == 4
    with pytest.raises(AttributeError):
        _ = wrapped.nothing
