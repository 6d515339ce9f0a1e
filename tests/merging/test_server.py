"""A server in a loop of one's own: PEFT models on one side, the method's own fold on the other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fedspan
from fedspan.merging.server import RoundReport, Server
from fedspan.methods import METHODS, create
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import ClientState, Factors, Request, Template, Update, Vector
from fedspan.runs import checkpoint
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

torch.set_num_threads(1)
HEAD = "base_model.model.lm_head.weight"
TARGETS = ["q_proj", "v_proj"]
COUNTS = {"a": 300.0, "b": 120.0, "c": 5.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, make in METHODS.items() if make().info.trains == "adapter" and not make().info.alone),
    ("glora", {"start": "state", "server_rank": 20}),
    ("glora", {"start": "split", "sides": "both"}),
    ("glora", {"momentum": 0.5}),
    ("glora_sums", {"passes": 2}),
    ("hetlora", {"gamma": 0.5}),
    ("raflora", {"weighting": "rb"}),
]
CASES = [case for case in CASES if case[0] not in ("ravan", "centralised")]
ESTIMATE = {"fed_sb": 2}
"""Exchanges of the first round that gradients answer."""
IDS = ["-".join([name, *map(str, options.values())]) for name, options in CASES]


def peft_model(rank: int, **changes: Any) -> Any:
    options: dict[str, Any] = {"lora_alpha": 12, "target_modules": TARGETS, "modules_to_save": ["lm_head"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(tiny.make("llama"), LoraConfig(r=rank, **{**options, **changes}))


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    return {rank: peft_model(rank) for rank in (4, 8)}


def ranks_of(method: Method) -> dict[str, int]:
    return dict(zip("abc", (8, 4, 8) if method.info.hetero_rank else (8, 8, 8), strict=True))


def train(
    model: Any, start: Mapping[str, Tensor], trains: tuple[str, ...], *key: object, server: Server | None = None
) -> dict[str, Tensor]:
    """The state dict of a real PEFT model after a random step on what is free, where its gradient is not zero.

    With a server, the step is taken inside its `training`.
    """
    set_peft_model_state_dict(model, dict(start))
    rng = generator("train", *key)
    with server.training(model) if server else nullcontext(), torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in trains) or "modules_to_save" in name:
                step = 0.1 * torch.randn(parameter.shape, generator=rng)
                module = name.partition(".lora_")[0]
                if ".lora_" in name:
                    b, a = start[f"{module}.lora_B.weight"], start[f"{module}.lora_A.weight"]
                    alive = (a.any(dim=1) | b.any(dim=0)).float()
                    step = step * (alive[:, None] if "lora_A" in name else alive)
                parameter += step
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def pair(state_dict: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    return tuple(state_dict[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")


def fold(
    method: Method,
    state: ServerState,
    kept: dict[str, ClientState],
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    ranks: Mapping[str, int],
) -> ServerState:
    """A round of the method's own functions, on factors read from the state dicts by hand."""
    before = dict(kept)
    for number in range(ESTIMATE.get(method.info.name, 0), len(method.exchanges)):
        state = replace(state, exchange=number)
        encoded = []
        for client, state_dict in state_dicts.items():
            sent = method.start(method.broadcast(state, Request(ranks[client])), before.get(client))
            modules = {}
            for name in state.template.modules:
                (b, a), rank = pair(state_dict, name), ranks[client]
                q = sent.adapter[name].rank if name in sent.adapter else rank
                modules[name] = Factors(b[:, :q], a[:q], 12 / rank)
            trained = Update(client, COUNTS[client], modules, {"lm_head.weight": state_dict[HEAD]})
            update, after = method.encode(trained, sent, before.get(client))
            encoded.append(update)
            if after is not None:
                kept[client] = after
        state, _ = aggregate(method, state, encoded)
    return state


def gradients_of(server: Server, *key: object) -> dict[str, Tensor]:
    """Random gradients of the adapted weights, as a PEFT model names them."""
    return {
        f"base_model.model.{module}.base_layer.weight": torch.randn(
            shape, generator=generator("gradient", module, *key)
        )
        for module, shape in server.state.template.modules.items()
    }


def fold_gradients(method: Method, state: ServerState, given: Mapping[str, Mapping[str, Tensor]]) -> ServerState:
    for number in range(ESTIMATE[method.info.name]):
        state = replace(state, exchange=number)
        sent = method.broadcast(state, Request(8))
        encoded = []
        for client, gradient in given.items():
            grads = dict(zip(state.template.modules, gradient.values(), strict=True))
            update = Update(client, COUNTS[client], {n: Vector({"gradient": g}) for n, g in grads.items()}, {})
            encoded.append(method.encode(update, sent, None)[0])
        state, _ = aggregate(method, state, encoded)
    return replace(state, exchange=ESTIMATE[method.info.name])


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_three_rounds_are_the_methods_own_fold(
    name: str, options: dict[str, Any], models: dict[int, Any], tmp_path: Path
) -> None:
    """Bit for bit, with a client that is away in the second round; and so is a server saved and loaded in between."""
    method, server = create(name, **options), Server(name, base=models[8], seed=5, **options)
    ranks = ranks_of(method)
    shapes = server.state.template.modules
    head = models[8].state_dict()["base_model.model.lm_head.modules_to_save.default.weight"]
    state = method.init(Template(dict(shapes), 8, 12.0, False, 5), {"lm_head.weight": head.clone()})
    assert list(shapes) == [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in TARGETS]
    kept: dict[str, ClientState] = {}
    if server.asks == "gradient":
        assert server.trains == ()
        given = {client: gradients_of(server, client) for client in "ab"}
        report = server.update(given, num_examples={client: COUNTS[client] for client in "ab"})
        assert (report.round_num, report.num_clients) == (0, 2)
        state = fold_gradients(method, state, given)
        tiny.same_state(server.state, state)
        server.save(tmp_path / "server.safetensors")
        server = Server.load(str(tmp_path / "server.safetensors"))
    for round_num in range(3):
        assert server.asks == "train"
        cohort = [client for client in "abc" if not (client == "c" and round_num == 1)]
        state_dicts = {
            client: train(
                models[ranks[client]],
                server.adapter(ranks[client], client_id=client),
                server.trains,
                client,
                round_num,
                server=server,
            )
            for client in cohort
        }
        report = server.update(state_dicts, num_examples={client: COUNTS[client] for client in cohort})
        state = fold(method, state, kept, state_dicts, ranks)
        tiny.same_state(server.state, state)
        assert (report.round_num, report.num_clients, report.method) == (round_num + 1, len(cohort), name)
        assert report.weights["b"] == pytest.approx(120 / sum(COUNTS[client] for client in cohort))
        assert report.bytes_up == sum(4 * t.numel() for sd in state_dicts.values() for t in sd.values())
        server.save(tmp_path / "server.safetensors")
        server = Server.load(str(tmp_path / "server.safetensors"))
    for client, rank in ranks.items():
        sent = method.start(method.broadcast(state, Request(rank)), kept.get(client))
        adapter = server.adapter(rank, client_id=client)
        for module, f in sent.adapter.items():
            b, a = pair(adapter, module)
            assert torch.equal(b[:, : f.rank], f.b)
            assert torch.equal(a[: f.rank], f.a)
            assert not b[:, f.rank :].any()
            assert f.scaling == 12 / rank
        assert torch.equal(adapter[HEAD], state.dense["lm_head.weight"])
        assert server.tail_penalty(rank, client_id=client) == sent.recipe.tail_penalty


def test_every_method_that_trains_adapters_is_served() -> None:
    """And the message of one that is not names exactly these."""
    served = []
    for name, make in METHODS.items():
        info = make().info
        if info.trains == "adapter" and not info.alone and not info.pooled and name != "ravan":
            served.append(name)
            assert Server(name, base={"q": (12, 9)}, max_rank=4).asks in ("train", "gradient")
        else:
            with pytest.raises(FedspanError, match="expected one of"):
                Server(name, base={"q": (12, 9)}, max_rank=4)
    assert "fed_sb" in served
    with pytest.raises(FedspanError, match=f": expected one of {', '.join(served)}$"):
        Server("fedavg", base={"q": (12, 9)}, max_rank=4)


def effective(model: Any, module: str) -> Tensor:
    """W + s·B·A as PEFT computes it."""
    layer = model.get_submodule(f"base_model.model.{module}")
    weight: Tensor = layer.get_base_layer().weight.detach().double()
    return weight + layer.get_delta_weight("default").detach().double()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flora", {}),
        ("fedex_lora", {}),
        ("glora", {"start": "state", "server_rank": 40}),
        ("glora", {"start": "split", "server_rank": 40}),
        ("glora_plus", {"server_rank": 40}),
        ("glora", {"server_rank": 40}),
        ("flexlora", {}),
        ("ffa_lora", {}),
        ("rolora", {}),
        ("fedsvd", {}),
    ],
)
def test_a_peft_model_with_adapter_and_patch_is_the_ideal_model(name: str, options: dict[str, Any]) -> None:
    """Base + patch + adapter after two rounds is the mean of the clients' models, as dense float64 says."""
    method = create(name, **options)
    # With as many directions as the layers have, rank costs nothing.
    ranks = {"a": 32, "b": 4} if method.info.hetero_rank else {"a": 16, "b": 16}
    by_rank = {rank: peft_model(rank) for rank in {*ranks.values(), 32}}
    largest = max(ranks.values())
    server = Server(name, base=by_rank[largest], **options)
    original = {
        key: value.clone() for key, value in by_rank[largest].state_dict().items() if key.endswith("base_layer.weight")
    }
    modules = list(server.state.template.modules)

    def load(rank: int) -> Any:
        model = by_rank[rank]
        patched = {key: original[key] + x for key, x in server.patch(rank).items()}
        result = model.load_state_dict({**original, **patched}, strict=False)
        assert not result.unexpected_keys
        result = set_peft_model_state_dict(model, server.adapter(rank))
        assert not result.unexpected_keys
        return model

    for round_num in range(2):
        state_dicts, means = {}, dict.fromkeys(modules, torch.zeros((), dtype=torch.float64))
        for client, rank in ranks.items():
            model = load(rank)
            state_dicts[client] = train(model, server.adapter(rank), server.trains, client, round_num)
            share = {"a": 0.75, "b": 0.25}[client]
            means = {module: means[module] + share * effective(model, module) for module in modules}
        server.update(state_dicts, num_examples={"a": 3, "b": 1})
        model = load(largest)
        for module in modules:
            torch.testing.assert_close(effective(model, module), means[module], rtol=0, atol=2e-5)
    assert bool(server.patch(largest)) == (method.broadcast(server.state, Request(largest)).patch != {})


def test_bases_of_every_form_are_the_same_server(tmp_path: Path) -> None:
    """A model, its folder, a template and shapes; the adapter's name may be another and stand in the keys."""
    model = peft_model(8, modules_to_save=None)
    model.save_pretrained(str(tmp_path / "adapter"))
    of_model = Server("glora", base=model, seed=2)
    template = of_model.state.template
    assert (template.rank, template.alpha, template.rslora, template.seed) == (8, 12.0, False, 2)
    bases: list[tuple[Any, dict[str, Any]]] = [
        (str(tmp_path / "adapter"), {"seed": 2}),
        (tmp_path / "adapter", {"seed": 2}),
        (template, {}),
    ]
    for base, options in bases:
        assert Server("glora", base=base, **options).state.template == template
    of_shapes = Server("glora", base=dict(template.modules), max_rank=8)
    assert of_shapes.state.template == replace(template, alpha=16.0, seed=0)
    trained = train(model, of_model.adapter(), of_model.trains, "x")
    named = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    assert all(".default." in key for key in named)
    report = of_model.update({"x": named}, num_examples={"x": 1})
    other = Server("glora", base=template, adapter_name="mine")
    other.update(
        {"x": {key.replace(".default.", ".mine."): value for key, value in named.items()}}, num_examples={"x": 1}
    )
    third = fedspan.Server("glora", base=template)
    third.update({"x": trained}, num_examples={"x": 9})
    tiny.same_state(of_model.state, other.state)
    torch.testing.assert_close(third.adapter(4), other.adapter(4))
    assert isinstance(report, RoundReport)
    assert report.diagnostics["truncation_error"] < 1e-6


def test_gpt2_and_embeddings_keep_their_orientation() -> None:
    """Conv1D and embeddings store weights transposed; patches and adapters come back as PEFT has them."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    model = get_peft_model(tiny.make("gpt2", tie_word_embeddings=False), config)
    server = Server("flora", base=model)
    original = {key: value.clone() for key, value in model.state_dict().items()}
    assert server.trains == ("lora_A", "lora_embedding_A", "lora_B", "lora_embedding_B")
    set_peft_model_state_dict(model, server.adapter())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator(name))
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    server.update({"a": get_peft_model_state_dict(model)}, num_examples={"a": 1})
    model.load_state_dict({key: original[key] + x for key, x in server.patch().items()}, strict=False)
    set_peft_model_state_dict(model, server.adapter())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_one_client_keeps_is_its_own(models: dict[int, Any]) -> None:
    """FedSA-LoRA: each client gets its own B back, a new one starts at zero."""
    server = Server("fedsa_lora", base=models[8])
    state_dicts = {c: train(models[8], server.adapter(client_id=c), server.trains, c) for c in "ab"}
    server.update(state_dicts, num_examples={"a": 1, "b": 1})
    module = next(iter(server.state.template.modules))
    for client in "ab":
        assert torch.equal(pair(server.adapter(client_id=client), module)[0], pair(state_dicts[client], module)[0])
    assert not pair(server.adapter(), module)[0].any()
    assert not pair(server.adapter(client_id="new"), module)[0].any()


def test_which_factor_trains(models: dict[int, Any]) -> None:
    """RoLoRA takes turns, and refuses an update of the factor whose turn it is not."""
    server = Server("rolora", base=models[8])
    for expected in (("lora_B",), ("lora_A",), ("lora_B",)):
        assert server.trains == expected
        wrong = train(models[8], server.adapter(), ("lora_A", "lora_B"), "wrong")
        with pytest.raises(ValueError, match=rf"lora_[AB] was changed, but round \d of rolora trains {expected[0]}"):
            server.update({"a": wrong}, num_examples={"a": 1})
        # A model in half precision returns the frozen factor rounded.
        right = train(models[8], server.adapter(), server.trains, "right")
        server.update({"a": {key: value.bfloat16() for key, value in right.items()}}, num_examples={"a": 1})


def test_what_was_sent_is_a_copy(models: dict[int, Any]) -> None:
    server = Server("fedit", base=models[8])
    before = server.adapter()
    for tensor in server.adapter().values():
        tensor.zero_()
    tiny.same(server.adapter(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.pop(HEAD),
            r"client a: modules_to_save = \['lm_head'\]: expected weights of these modules",
        ),
        (
            lambda d: d.update({HEAD: torch.ones(3, 3)}),
            r"client a: the whole weight of lm_head.weight has shape \(3, 3\)",
        ),
        (lambda d: d.update({"x": torch.ones(2)}), "client a: tensor 'x': expected names that start with"),
        (lambda d: d.update({"base_model.model.x": torch.ones(2)}), "client a: tensor 'base_model.model.x' is none"),
        (lambda d: d.update({HEAD: d[HEAD] * math.nan}), r"client a: tensor .*lm_head.weight' holds NaN"),
        (lambda d: d.update({HEAD: d[HEAD].numpy()}), "client a: .*lm_head.weight' is a ndarray: expected a tensor"),
        (lambda d: d.update({HEAD: d[HEAD].to("meta")}), "client a: tensor .*lm_head.weight' is on the meta device"),
        (lambda d: d.update({HEAD: d[HEAD].to_sparse()}), "client a: tensor .*lm_head.weight' is sparse: expected a d"),
        (lambda d: d.clear(), "client a holds no lora_A and lora_B"),
        (
            lambda d: [d.pop(k) for k in list(d) if "layers.1.self_attn.v_proj" in k],
            "client a: the adapter of model.layers.1.self_attn.v_proj is missing",
        ),
        (
            lambda d: d.update({k: v[:2] for k, v in d.items() if "layers.1" in k and "lora_A" in k}),
            r"client a: model.layers.1.*lora_A \(2, 32\) and lora_B .*expected \(8, in\)",
        ),
        (
            lambda d: d.update({k: v[:, :9] for k, v in d.items() if "layers.1" in k and "lora_A" in k}),
            r"client a: the adapter of model.layers.1.self_attn.q_proj has shape \(32, 9\): expected \(32, 32\)",
        ),
    ],
)
def test_a_wrong_state_dict_changes_nothing(change: Any, message: str, models: dict[int, Any]) -> None:
    server = Server("glora", base=models[8])
    state, good = server.state, server.adapter()
    bad = dict(good)
    change(bad)
    with pytest.raises(FedspanError, match=message) as said:
        server.update({"b": good, "a": bad}, num_examples={"a": 1, "b": 1})
    assert "\n" not in str(said.value)
    assert server.state is state


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 1}, "client b has no num_examples"),
        ({"a": 1, "b": 2, "z": 3}, "num_examples names client z, which sent no state dict"),
        ({"a": 1, "b": 0}, "client b: num_examples = 0: expected a finite number above 0"),
        ({"a": math.nan, "b": 1}, "client a: num_examples = nan"),
        ({"a": "1", "b": 1}, "client a: num_examples = '1'"),
        ({"a": True, "b": 1}, "client a: num_examples = True"),
        ({"a": 10**400, "b": 1}, "client a: num_examples = 1000.*: expected a finite number above 0"),
        ({"a": 1e308, "b": 1e308}, "num_examples add up to infinity: expected numbers with a finite sum"),
        ({"a": 1, 2: 1}, "client id 2: expected a string"),
        ([1, 2], "num_examples is a list: expected a mapping from client ids"),
    ],
)
def test_every_client_counts(counts: dict[str, Any], message: str, models: dict[int, Any]) -> None:
    server = Server("glora", base=models[8])
    good = server.adapter()
    with pytest.raises(ValueError, match=message):
        server.update({"a": good, "b": good}, num_examples=counts)
    with pytest.raises(ValueError, match="no update to aggregate"):
        server.update({}, num_examples={})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Server("fedavg", base=m), "fedavg averages weights, not adapters: expected one of glora, .*fedit"),
        (lambda m: Server("local", base=m), "local is a control without a server: expected one of glora"),
        (lambda m: Server("ravan", base=m), "ravan trains several cores .*: expected one of"),
        (lambda m: Server("glory", base=m), "unknown method 'glory'; did you mean 'glora'"),
        (lambda m: Server("glora", base=m, ranks=3), "unknown key 'method.ranks' for glora"),
        (lambda m: Server("glora", base=nn.Linear(2, 2)), "base = a Linear: expected a PEFT model with an adapter"),
        (lambda m: Server("glora", base=m, adapter_name="x"), r"base = adapters \['default'\]: .* named 'x'"),
        (lambda m: Server("glora", base="nowhere"), "nowhere does not exist"),
        (lambda m: Server("glora", base={"q": (3, 4)}), "base is shapes by module: expected max_rank="),
        (lambda m: Server("glora", base=m, max_rank=0), "max_rank = 0: expected a whole number of at least 1"),
        (lambda m: Server("fedit", base=m).adapter(4), "rank = 4: fedit expected rank 8 for every client"),
        (lambda m: Server("hetlora", base=m).adapter(9), "rank = 9: hetlora expected at most 8, the server's max_rank"),
        (lambda m: Server("glora", base=m).adapter(0), "rank = 0: expected a whole number"),
        (lambda m: Server("glora", base=m).adapter(True), "rank = True: expected a whole number"),
        (lambda m: Server("fedsa_lora", base=m).adapter(client_id=1), "client id 1: expected a string"),
        (lambda m: Server("glora", base=m, seed=-1), "seed = -1: expected a whole number of at least 0"),
        (lambda m: Server("glora", base=m, seed="x"), "seed = 'x': expected a whole number of at least 0"),
        (lambda m: Server(create("glora"), base=m), "method = a Method: expected a name"),
        (lambda m: Server("glora", base={"q": (3,)}, max_rank=2), r"base: 'q' has shape \(3,\): expected two whole"),
        (lambda m: Server("glora", base={"q": (0, 4)}, max_rank=2), r"base: 'q' has shape \(0, 4\): expected two"),
        (lambda m: Server("glora", base={"q": torch.ones(3, 4)}, max_rank=2), "base: 'q' has shape a Tensor: expected"),
        (lambda m: Server("glora", base=m).update([{}], num_examples={}), "state_dicts is a list: expected a mapping"),
    ],
)
def test_what_a_server_refuses(call: Any, message: str, models: dict[int, Any]) -> None:
    with pytest.raises(ValueError, match=message) as said:
        call(models[8])
    assert "\n" not in str(said.value)


def test_a_model_is_no_state_dict(models: dict[int, Any]) -> None:
    with pytest.raises(FedspanError, match=r"client a: a PeftModel\w*: expected a state dict, as get_peft_model_"):
        Server("glora", base=models[8]).update({"a": models[8]}, num_examples={"a": 1})


@pytest.mark.parametrize("name", [name for name, options in CASES if not options and name not in ESTIMATE])
def test_what_overflows_changes_nothing(name: str, models: dict[int, Any]) -> None:
    """Factors that are finite, whose product is not."""
    server = Server(name, base=models[8])
    before, start = server.state, server.adapter()
    huge = {key: 0 * value + 3e38 if "lora_B" in key else value for key, value in start.items()}
    with pytest.raises(FedspanError, match=r"client a: .*the change of the weight has norm .* that float32 can hold"):
        server.update({"a": huge, "b": huge}, num_examples={"a": 1, "b": 1})
    assert server.state is before


def test_numbers_of_numpy_can_be_saved(tmp_path: Path) -> None:
    one = {"max_rank": np.int64(4), "seed": np.int32(3), "server_rank": np.int64(6), "tolerance": np.float64(0.5)}
    server = Server("glora", base={"q": (8, 9)}, **one)
    server.update({"a": server.adapter(np.int64(2))}, num_examples={"a": np.float32(2.5)})
    server.save(tmp_path / "server.safetensors")
    tiny.same_state(Server.load(tmp_path / "server.safetensors").state, server.state)


def test_patterns_are_refused(tmp_path: Path) -> None:
    for pattern in ({"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 3}}):
        model = peft_model(8, **pattern)
        with pytest.raises(ValueError, match=r"base: .*q_proj has rank \d and .*expected rank 8 and scaling 1.5"):
            Server("glora", base=model)


def test_pruned_components_stay_given_up(models: dict[int, Any]) -> None:
    """HetLoRA: what a client has pruned comes back as zeros, and may not be trained again."""
    server = Server("hetlora", base=models[8], gamma=0.5)
    full = train(models[8], server.adapter(client_id="a"), server.trains, 1)
    shrunk = {key: value.clone() for key, value in full.items()}
    for key in shrunk:
        if "lora_B" in key:
            shrunk[key][:, 4:] = 0
    assert server.tail_penalty(client_id="a") == (5e-3, 4)
    server.update({"a": full}, num_examples={"a": 1})  # the tail of a first adapter is zero, so it has not shrunk
    server.update({"a": shrunk}, num_examples={"a": 1})
    adapter = server.adapter(client_id="a")
    assert all(not adapter[key][:, 4:].any() for key in adapter if "lora_B" in key)
    assert all(not adapter[key][4:].any() for key in adapter if "lora_A" in key)
    assert server.tail_penalty(client_id="a") == (5e-3, 2)
    with pytest.raises(ValueError, match=r"client a: .*lora_B has components beyond 4, which were pruned"):
        server.update({"a": full}, num_examples={"a": 1})


def damaged(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "foreign":
        save_file({"x": torch.ones(2)}, path)
    elif how == "checkpoint":
        state = create("fedit").init(Template({"q": (3, 4)}, 2), {})
        checkpoint.write(path, checkpoint.Checkpoint(state))
    else:
        server = Server("glora", base={"q": (3, 4)}, max_rank=2)
        server.save(path)
        tensors = load_file(path)
        meta = {"format": 1 if how == "empty" else 99}
        save_file(tensors, path, metadata={"fedspan_server": json.dumps(meta)})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"is damaged \(.*\): expected a saved server"),
        ("foreign", "is no saved server of format 1"),
        ("checkpoint", "is no saved server of format 1"),
        ("format", "is no saved server of format 1"),
        ("empty", "is damaged .incomplete: 'state'"),
    ],
)
def test_load_refuses(how: str, message: str, tmp_path: Path, models: dict[int, Any]) -> None:
    path = tmp_path / "server.safetensors"
    Server("glora", base=models[8]).save(path)
    damaged(path, how)
    with pytest.raises(ValueError, match=message) as said:
        Server.load(path)
    assert str(path) in str(said.value)
    assert "\n" not in str(said.value)


def test_a_saved_server_of_odd_shapes_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "server.safetensors"
    Server("glora", base={"q": (3, 4)}, max_rank=2).save(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["fedspan_server"])
    meta["state"]["template"]["modules"]["q"] = [3, 4, 5]
    save_file(load_file(path), path, metadata={"fedspan_server": json.dumps(meta)})
    with pytest.raises(FedspanError, match=r"is damaged \(incomplete: .*\): expected a saved server"):
        Server.load(path)


def test_a_failed_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("glora", base={"q": (3, 4)}, max_rank=2)
    server.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            server.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
