"""Laws of a base whose layers lie on several devices: its clients learn and answer what they do over a base on one.

There need be no GPU: the second device is that of `lazy_device`. Both sides take the same plain optimizers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lazy_device
import numpy as np
import pytest
import seq2seq
import tiny
import torch
from lazy_device import LAZY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedspan.client import cohort as cohort_module
from fedspan.client.evaluation import predict
from fedspan.client.training import Assignment, LocalResult, TrainingSettings
from fedspan.config import DataConfig, EngineConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.federation.clients import Client
from fedspan.federation.rounds import RunState
from fedspan.methods import METHODS
from fedspan.methods.base import Method
from fedspan.methods.kept_optimizer import with_kept_optimizer
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel, frozen_prefix
from fedspan.models.encoder_decoder import decoder_start
from fedspan.models.experts import AdaptedExperts
from fedspan.models.placement import checkpoint_in_place, seed_each_gpu
from fedspan.models.selection import Selection
from fedspan.models.starting_adapter import start_from
from fedspan.support.seeding import generator

CLOSE = 1e-3
"""Largest relative difference: AdamW's first steps are as large for a gradient that is nearly 0."""
TABLES: Mapping[str, Mapping[str, int | str]] = {
    "llama": {
        **{"model.embed_tokens": LAZY, "model.layers.0": LAZY, "model.layers.1": "cpu"},
        **{"model.norm": "cpu", "lm_head": "cpu"},
    },
    "gpt2": {"transformer": "cpu", "transformer.h.0": LAZY, "transformer.ln_f": LAZY, "lm_head": "cpu"},
    "bert": {
        **{"bert.embeddings": LAZY, "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": LAZY},
        **{"bert.pooler": LAZY, "classifier": "cpu"},
    },
    "vit": {"vit": LAZY, "vit.layers.1": "cpu", "classifier": "cpu"},
    "t5": {
        **{"shared": "cpu", "encoder": "cpu", "encoder.block.1": LAZY, "encoder.final_layer_norm": LAZY},
        **{"decoder": LAZY, "decoder.embed_tokens": "cpu", "lm_head": "cpu"},
    },
}


@pytest.fixture(scope="module", autouse=True)
def lazy() -> None:
    lazy_device.begin()


@pytest.fixture(autouse=True)
def plain_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy_device.plain_optimizers(monkeypatch)


@pytest.fixture(scope="module")
def folders(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    changed = {
        "t5": seq2seq.save("t5", tmp_path_factory.mktemp("t5")),
        "gpt2": tiny.save("gpt2", tmp_path_factory.mktemp("gpt2"), use_cache=False),
    }
    return {**bases, **changed}


@pytest.fixture(scope="module")
def data(folders: dict[str, Path]) -> dict[str, Encoded]:
    questions = tiny.questions(8)
    prompts = [(q["instruction"], q["input"]) for q in questions]
    asked = Rows("instruction", prompts, [q["output"] for q in questions], [q["task"] for q in questions])
    words = tiny.words(8)
    labelled = Rows(
        "classification",
        [(r["text"],) for r in words],
        ["xyz".index(r["label"]) for r in words],
        [r["site"] for r in words],
    )
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    shown = Rows("image", list(images), [i % 3 for i in range(8)], ["all"] * 8)
    processor = tiny.processor(folders["t5"], "instruction")
    decoder = decoder_start(str(folders["t5"]), "instruction", processor)
    found = {"t5": encode(asked, processor, DataConfig(), decoder=decoder)}
    for name, rows in (("llama", asked), ("gpt2", asked), ("bert", labelled), ("vit", shown)):
        found[name] = encode(rows, tiny.processor(folders[name], rows.kind), DataConfig())
    return found


def pair(folders: Mapping[str, Path], name: str, **changes: Any) -> list[FederatedModel]:
    """The base on one device, and in parts."""
    kind = {**tiny.KIND, "t5": "instruction"}[name]
    return [tiny.load(folders[name], kind, **changes, device_map=table) for table in ("none", TABLES[name])]


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].device.type == "cpu", name
        apart, size = float((found[name].double() - value).norm()), float(value.double().norm())
        assert apart <= CLOSE * max(size, 1e-3), f"{name}: {apart:.2e} of {size:.2e}"


def beside_their_layers(model: FederatedModel) -> None:
    """Whatever is trained lies on the device of its layer, and both devices hold some of it."""
    for name, layer in model.layers.items():
        own = {parameter.device for parameter in layer.parameters()}
        assert own == {layer.weight.device}, name
    assert len({p.device for p in model.model.parameters()}) == 2


def learnt(
    model: FederatedModel, data: Encoded, method: Method, rounds: int = 2, **settings: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """What the server and the clients hold after some rounds of two clients, and the clients' losses."""
    local = {"learning_rate": 1e-2, "batch_size": 4, **settings.pop("local", {})}
    given = TrainingSettings(local=LocalConfig(**local), engine=EngineConfig(name="sequential", **settings))
    cohort = [Client(f"client-{k}", 4, np.arange(4 * k, 4 * k + 4), np.zeros(0, dtype=np.int64)) for k in range(2)]
    losses = []

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        assigned = Assignment(client.client_id, sent, client.indices, 2, 4.0)
        (result,) = cohort_module.work(model, data, [assigned], given, round_num)
        losses.append(result.train_loss)
        return result

    start = {name: value.clone() for name, value in model.dense().items()}
    standing = RunState(method.init(model.template(4, 8.0, False, 0, 2), start))
    for _ in range(rounds):
        standing, _ = tiny.run_round(method, standing, cohort, work)
    kept = {f"{client}/{n}": t for client, own in standing.client_states.items() for n, t in own.items()}
    return tiny.state_tensors(standing.state) | kept, losses


def same_learning(
    models: list[FederatedModel], data: Encoded, method: Method, rounds: int = 2, **settings: Any
) -> None:
    plain, parts = (learnt(model, data, method, rounds, **settings) for model in models)
    np.testing.assert_allclose(parts[1], plain[1], rtol=CLOSE)
    close(parts[0], plain[0])


@pytest.fixture(scope="module")
def decoders(folders: dict[str, Path]) -> list[FederatedModel]:
    return pair(folders, "llama")


ADAPTERS = ("fedit", "glora", "flora", "hetlora", "fed_sb", "ravan")


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_learn_the_same(decoders: list[FederatedModel], data: dict[str, Encoded], name: str) -> None:
    """Adapters, patches on the base (FLoRA), tail penalties (HetLoRA), subspaces (Fed-SB, RAVAN)."""
    same_learning(decoders, data["llama"], METHODS[name]())
    beside_their_layers(decoders[1])


def test_kept_optimizers_learn_the_same(decoders: list[FederatedModel], data: dict[str, Encoded]) -> None:
    same_learning(decoders, data["llama"], with_kept_optimizer(METHODS["fedit"]()))


@pytest.mark.parametrize(
    "settings",
    [{"local": {"accumulate": 2}}, {"local": {"lora_plus_ratio": 4.0}}, {"precision": "bfloat16"}],
    ids=["accumulate", "rates", "bfloat16"],
)
def test_other_ways_to_train_learn_the_same(
    decoders: list[FederatedModel], data: dict[str, Encoded], settings: dict[str, Any]
) -> None:
    """With a patch on the base in the second round, which lies beside the layers where their products are rounded."""
    same_learning(decoders, data["llama"], METHODS["flora"](), **settings)


@pytest.mark.parametrize("name", ["fedavg", "fedftg", "scaffold"])
def test_weights_learn_the_same(folders: dict[str, Path], data: dict[str, Encoded], name: str) -> None:
    """All of them, those of target modules by GaLore, and corrected ones; the output layer on the second device."""
    method = METHODS[name](**({"galore_rank": 4} if name == "fedftg" else {}))
    models = pair(folders, "llama", trains=method.info.trains)
    same_learning(models, data["llama"], method, local={"optimizer": "sgd"} if method.info.optimizer == "sgd" else {})
    close(models[1].dense(), models[0].dense())


@pytest.mark.parametrize(
    ("name", "method"),
    [("bert", "fedit"), ("vit", "hetlora"), pytest.param("t5", "flora", marks=pytest.mark.slow)],
)
def test_other_bases_learn_and_answer_the_same(
    folders: dict[str, Path], data: dict[str, Encoded], name: str, method: str
) -> None:
    """Heads, images, an encoder and a decoder."""
    models = pair(folders, name, base_dropout=False)
    same_learning(models, data[name], METHODS[method](), local={"optimizer": "sgd"})
    same_answers(models, data[name], tiny.processor(folders[name], models[0].kind))
    assert len({p.device for p in models[1].model.parameters()}) == 2


def test_transposed_layers_are_patched_the_same(folders: dict[str, Path]) -> None:
    """Layer by layer: `lazy` does not differentiate the parts of a split tensor, as GPT-2 needs it."""
    models = pair(folders, "gpt2")
    patch = {name: f.delta() for name, f in tiny.random_adapter(models[0], 3).items()}
    for sent in (tiny.broadcast(models[0], patch=patch), tiny.broadcast(models[0])):
        for model in models:
            model.load(sent)
        for name, layer in models[0].layers.items():
            x = torch.randn(2, layer.weight.shape[0], generator=generator(name))
            close({name: models[1].layers[name](x).detach().cpu()}, {name: layer(x).detach()})
    assert {layer.weight.device.type for layer in models[1].layers.values()} == {"cpu", "lazy"}


def same_answers(models: list[FederatedModel], data: Encoded, processor: Any) -> None:
    """The same losses and texts of the model as it is loaded, adapters folded in."""
    tokens = 2 if data.kind == "instruction" else 0
    plain, parts = (predict(m, data, [[0, 3, 5], [1, 2]], processor, tokens, probabilities=True) for m in models)
    np.testing.assert_allclose([p.loss for p in parts], [p.loss for p in plain], rtol=CLOSE)
    assert [p.values for p in parts] == [p.values for p in plain]
    assert [p.count for p in parts] == [p.count for p in plain]


def test_answers_are_the_same(
    decoders: list[FederatedModel], folders: dict[str, Path], data: dict[str, Encoded]
) -> None:
    for model in decoders:
        model.load(tiny.broadcast(model, tiny.random_adapter(model, 4)))
    same_answers(decoders, data["llama"], tiny.processor(folders["llama"], "instruction"))


@pytest.mark.parametrize("form", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_quantised_base_learns_the_same(
    folders: dict[str, Path], data: dict[str, Encoded], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    pytest.importorskip("bitsandbytes")
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "lazy" and known(kind))
    models = pair(folders, "llama", quantise=form)
    same_learning(models, data["llama"], METHODS["flora"]())
    assert models[1].digest() == models[0].digest()


def test_experts_have_their_adapters_and_patches_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their weights: `lazy` cannot compute the chunks that a mixture cuts its products into."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    experts = {
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 64,
    }
    vocab = len(tiny.SPECIAL) + len(tiny.CHARACTERS)
    config = AutoConfig.for_model("mixtral", vocab_size=vocab, initializer_range=0.3, **tiny.ENDS, **sizes, **experts)
    monkeypatch.setattr(sys.modules["fedspan.models.build"], "check_causal", lambda *args: None)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path))
    selection = Selection(("q_proj",), target_parameters=("experts.down_proj",))
    table = {"model": "cpu", "model.layers.1": LAZY, "lm_head": "cpu"}
    weights = []
    for given in ("none", table):
        model = tiny.load(tmp_path, "instruction", selection=selection, max_rank=4, device_map=given)
        patch = {name: f.delta() for name, f in tiny.random_adapter(model, 3, "patch").items()}
        model.load(tiny.broadcast(model, patch=patch))
        held = [m for m in model.model.modules() if isinstance(m, AdaptedExperts)]
        weights.append({str(k): m._weight("down_proj").detach().cpu() for k, m in enumerate(held)})
        if given == table:
            assert {m._weight("down_proj").device.type for m in held} == {"cpu", "lazy"}
            beside_their_layers(model)
    close(weights[1], weights[0])


def test_checkpointed_blocks_learn_the_same(
    decoders: list[FederatedModel], data: dict[str, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are given their input on their own device: torch keeps the state of random numbers of the devices it sees."""
    monkeypatch.setattr(torch, "lazy", SimpleNamespace(), raising=False)
    given: list[str] = []

    def noted(block: Any, hidden: Tensor, *args: Any, **options: Any) -> Any:
        given.append(hidden.device.type)
        return checkpoint(block, hidden, *args, **options)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", noted)
    same_learning(decoders, data["llama"], METHODS["fedit"](), 1, checkpointing=True)
    # Two blocks, in two steps of two clients, over both bases.
    assert given == ["cpu", "cpu"] * 4 + ["lazy", "cpu"] * 4


def test_a_block_that_is_checkpointed_with_its_hooks_is_given_its_input_where_it_lies() -> None:
    """As by releases of transformers that checkpoint a layer's whole call, and by models that do so themselves."""

    class Block(nn.Linear):
        def __call__(self, x: Tensor) -> Any:
            return super().__call__(x)

    block, given = Block(2, 2).to(LAZY), []
    body = nn.Module()
    body.block = block
    vars(body)["_gradient_checkpointing_func"] = lambda call, x: given.append(x.device.type) or call(x)
    checkpoint_in_place(body)
    for call in (block.__call__, partial(super(Block, block).__call__)):
        body._gradient_checkpointing_func(call, torch.ones(1, 2))
    assert given == ["lazy", "lazy"]


def test_a_saved_model_and_a_saved_adapter_are_those_of_the_base_on_one_device(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """To the byte; weights that are shared are written once."""
    for name in ("gpt2", "bert"):
        models = pair(folders, name)
        assert models[0].digest() == models[1].digest()
        for k, model in enumerate(models):
            model.save_weights(tmp_path / f"{name}{k}", tiny.processor(folders[name], model.kind))
            model.save_adapter(tmp_path / f"{name}{k}-adapter", tiny.random_adapter(model, 4), model.dense())
        for part in ("", "-adapter"):
            files = sorted((tmp_path / f"{name}0{part}").rglob("*.safetensors"))
            assert files
            for file in files:
                assert (tmp_path / f"{name}1{part}" / file.name).read_bytes() == file.read_bytes()


def test_the_lowest_layers_are_computed_in_every_step(folders: dict[str, Path], data: dict[str, Encoded]) -> None:
    """Their states would be kept on another device than that of the layers above them."""
    _, parts = pair(folders, "llama", selection=Selection(layers=(1,)))
    with pytest.raises(frozen_prefix.NotApplicable, match="lie on several devices"):
        frozen_prefix.find(parts, data["llama"].batch([0, 1]), 8)


def test_an_adapter_to_start_from_lies_with_its_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    models = pair(folders, "llama")
    models[0].save_adapter(tmp_path / "adapter", tiny.random_adapter(models[0], 4), models[0].dense())
    for model in models:
        start_from(model, str(tmp_path / "adapter"))
    assert models[1].digest() == models[0].digest()


def test_every_gpu_draws_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's global seed gives all of them the same, and layers on two devices would drop alike."""
    gpus = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    places = {"a": torch.device("cuda:0"), "b": torch.device("cuda:1"), "c": torch.device("cpu")}
    before = torch.random.get_rng_state()
    drawn = []
    for key in (0, 1, 0):
        seed_each_gpu(places, key, "dropout")
        drawn.append([int(torch.randint(2**40, (), generator=gpu)) for gpu in gpus])
    assert drawn[0] == drawn[2]
    assert len({*drawn[0], *drawn[1]}) == 4
    assert torch.equal(torch.random.get_rng_state(), before)
