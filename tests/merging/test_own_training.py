"""A training loop of one's own for methods that ask for a gradient first and confine what is trained: Fed-SB."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from local_training import tasks
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedspan.client.batching import batches
from fedspan.client.training import Assignment, TrainingSettings, work_on
from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.federation.clients import Client
from fedspan.federation.rounds import RunState
from fedspan.merging.answers import trained_update
from fedspan.merging.server import Server
from fedspan.methods import METHODS, create
from fedspan.methods.base import Method, ServerState
from fedspan.methods.fedit import fedit
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Factors, Recipe, Request, Subspace, Update, Vector
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

__all__ = ["tasks"]  # the fixture
LOCAL = LocalConfig(learning_rate=2e-2, batch_size=4, weight_decay=0.1, clip_norm=1.0)
SEED, RANK, STEPS = 3, 4, 4
ROWS = {"a": np.arange(0, 14), "b": np.arange(14, 24)}
MODULE = "model.layers.0.self_attn.q_proj"
FACTOR = f"base_model.model.{MODULE}.lora_A"


def small_model(**changes: Any) -> Any:
    options = {"r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(tiny.make("llama"), LoraConfig(**options))


def some_batches(data: Encoded, client: str, steps: int, *key: object) -> Iterator[dict[str, Tensor]]:
    """The batches that the engine draws for the client."""
    own = data.subset(ROWS[client])
    for chosen in batches(len(own), LOCAL.batch_size, steps, generator(SEED, *key, "batches")):
        yield dict(own.batch(chosen))


def gradient_of(server: Server, model: Any, given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    set_peft_model_state_dict(model, server.adapter())
    with server.gradient(model) as gradient:
        for batch in given:
            (model(**batch).loss / len(given)).backward()
    return gradient


def trained_by(server: Server, model: Any, given: list[dict[str, Tensor]], inside: bool = True) -> dict[str, Tensor]:
    """AdamW with clipping, written down as anyone would."""
    set_peft_model_state_dict(model, server.adapter())
    model.train()
    with server.training(model) if inside else nullcontext():
        free = [p for p in model.parameters() if p.requires_grad]
        eps = 1e-8 if free[0].dtype == torch.float32 else 1e-4  # which is not zero in 16 bits
        optimizer = torch.optim.AdamW(free, lr=LOCAL.learning_rate, weight_decay=LOCAL.weight_decay, eps=eps)
        for batch in given:
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(free, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def engines_run(method: Method, base: Path, data: Encoded) -> Iterator[tuple[ServerState, dict[str, tuple[int, int]]]]:
    """The engine's own rounds over the same data with the same local settings."""
    model = tiny.load(base, "instruction", max_rank=RANK)
    run_state = RunState(method.init(model.template(RANK, 8.0, False, SEED), model.dense()))
    settings = TrainingSettings(seed=SEED, local=LOCAL)

    def work(client: Client, sent: Broadcast, round_num: int) -> Any:
        given = Assignment(client.client_id, sent, client.indices, STEPS, 1.0)
        return work_on(model, given, data, settings, round_num)

    none = np.zeros(0, dtype=np.int64)
    clients = [Client(name, RANK, rows, none) for name, rows in ROWS.items()]
    while True:
        run_state, _ = tiny.run_round(method, run_state, clients, work)
        yield run_state.state, model.modules()


@pytest.mark.parametrize(("name", "options"), [("llama", {"first_step": 0.05}), ("gpt2", {"probe_batches": 2})])
def test_three_rounds_of_fed_sb_by_hand_are_the_engines(
    name: str, options: dict[str, Any], bases: dict[str, Path], tasks: Encoded, tmp_path: Path
) -> None:
    """The same model after each round, though the server is saved and loaded between any two answers."""
    method = create("fed_sb", **options)
    engine = engines_run(method, bases[name], tasks)
    lora = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(str(bases[name])), lora)
    server = Server("fed_sb", base=model, seed=SEED, **options)
    counts = {client: len(rows) for client, rows in ROWS.items()}

    def again(server: Server) -> Server:
        server.save(tmp_path / "server")
        return Server.load(tmp_path / "server")

    for round_num in range(3):
        if server.asks == "gradient":
            assert round_num == 0
            steps = server.probe_batches
            assert steps == options.get("probe_batches", 4)
            keys = {client: (round_num, client, "gradient") for client in ROWS}
            server.update(
                {c: gradient_of(server, model, list(some_batches(tasks, c, steps, *keys[c]))) for c in ROWS},
                num_examples=counts,
            )
            assert server.round_num == 0
            server = again(server)
        assert server.trains == ("lora_A",)
        given = {c: list(some_batches(tasks, c, STEPS, round_num, c)) for c in ROWS}
        server.update({c: trained_by(server, model, given[c]) for c in ROWS}, num_examples=counts)
        server = again(server)
        assert server.round_num == round_num + 1
        state, modules = next(engine)
        sent, adapter, moved = method.broadcast(state, Request(RANK)), server.adapter(), 0.0
        for module in modules:
            delta = sent.adapter[module].delta()
            expected = delta.b @ delta.a
            b, a = (adapter[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
            torch.testing.assert_close(2.0 * b @ a, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
            moved += float(expected.norm())
        assert moved > 0.1


@pytest.fixture
def asked() -> tuple[Server, Any, list[dict[str, Tensor]]]:
    """Fed-SB before its gradient, a model, and a batch."""
    model = small_model()
    ids = torch.randint(4, 60, (3, 12), generator=generator("ids"))
    return Server("fed_sb", base=model, seed=SEED), model, [{"input_ids": ids, "labels": ids}]


@pytest.fixture
def based(asked: tuple[Server, Any, list[dict[str, Tensor]]]) -> tuple[Server, Any, list[dict[str, Tensor]]]:
    """Fed-SB after its gradient."""
    server, model, given = asked
    server.update({"a": gradient_of(server, model, given)}, num_examples={"a": 1})
    return server, model, given


def test_the_loss_falls_and_the_adapter_stays_between_its_bases(based: Any) -> None:
    server, model, given = based
    first = server.adapter()
    losses = []
    for _ in range(4):
        state_dict = trained_by(server, model, given)
        assert torch.equal(state_dict[f"{FACTOR.replace('lora_A', 'lora_B')}.weight"], first[f"{FACTOR[:-1]}B.weight"])
        server.update({"a": state_dict}, num_examples={"a": 1})
        # One client's training is the next start: nothing was lost on the way.
        torch.testing.assert_close(server.adapter(), state_dict, rtol=1e-5, atol=1e-6)
        model.eval()
        losses.append(model(**given[0]).loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_moves_out_of_the_subspace_is_accepted(based: Any, kind: torch.dtype) -> None:
    server, model, given = based
    for _ in range(2):
        state_dict = trained_by(server, model.to(kind), given)
        assert {t.dtype for t in state_dict.values()} == {kind}
        # Also where someone has stored the half precision as single.
        server.update(
            {"a": state_dict, "b": {k: t.float() for k, t in state_dict.items()}}, num_examples={"a": 1, "b": 2}
        )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_training_without_the_subspace_is_refused(based: Any, kind: torch.dtype) -> None:
    """With the module, the distance and the whole step, in the first round and in a later one; nothing is changed."""
    server, model, given = based
    model.to(kind)
    server.update({"a": trained_by(server, model, given)}, num_examples={"a": 1})
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name)
    state, start = server.state, server.adapter()
    free = trained_by(server, model, given, inside=False)
    v = state.modules[MODULE]["v"].double()
    step = free[f"{FACTOR}.weight"].double() - start[f"{FACTOR}.weight"].double()
    outside = float((step - step @ v @ v.mT).norm())
    with pytest.raises(
        FedspanError, match=rf"client a: {MODULE}: lora_A has moved (\S+) out of .* of (\S+) in all"
    ) as e:
        server.update({"a": free}, num_examples={"a": 1})
    said = str(e.value)
    assert float(said.split(" moved ")[1].split()[0]) == pytest.approx(outside, rel=0.02)
    assert float(said.split(", of ")[1].split()[0]) == pytest.approx(float(step.norm()), rel=0.02)
    assert "inside `server.training(model)`" in said
    assert "\n" not in said
    assert server.state is state


def test_everything_is_as_it_was_after_the_contexts(asked: Any) -> None:
    """Parameters by identity, what is free, gradients that were there, modes, and names; also after an error."""
    server, model, given = asked

    def look() -> list[tuple[object, ...]]:
        named = [(name, id(p), p.requires_grad, p.shape, p.grad is None) for name, p in model.named_parameters()]
        return [*named, *((name, type(m), m.training) for name, m in model.named_modules())]

    model.train()
    model.get_submodule(f"base_model.model.{MODULE}").eval()
    kept = next(p for p in model.parameters() if not p.requires_grad)
    kept.grad = torch.ones_like(kept)
    before = look()
    gradient = gradient_of(server, model, given)
    assert look() == before
    assert torch.equal(kept.grad, torch.ones_like(kept))
    with pytest.raises(RuntimeError, match="stop"), server.gradient(model):
        raise RuntimeError("stop")
    assert look() == before
    server.update({"a": gradient}, num_examples={"a": 1})
    set_peft_model_state_dict(model, server.adapter())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    def interrupted() -> None:
        with server.training(model):
            free = {name.partition(".default.")[2] for name, p in model.named_parameters() if p.requires_grad}
            assert free == {"parametrizations.weight.original"}
            # An optimizer from before holds the coordinates now.
            model(**given[0]).loss.backward()
            optimizer.step()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert look() == before
    assert get_peft_model_state_dict(model)[f"{FACTOR}.weight"].any()
    server.update({"a": get_peft_model_state_dict(model)}, num_examples={"a": 1})


def test_autocast_does_not_round_the_confined_factors(based: Any) -> None:
    server, model, given = based
    set_peft_model_state_dict(model, server.adapter())
    with server.training(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.get_submodule(f"{FACTOR}.default").weight.dtype == torch.float32
            model(**given[0]).loss.backward()
        optimizer.step()
    server.update({"a": get_peft_model_state_dict(model)}, num_examples={"a": 1})


def test_embeddings_give_their_gradient_and_train_within_the_subspace() -> None:
    """Their weights are stored transposed, and their factors are bare parameters."""
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["embed_tokens", "q_proj"])
    model = get_peft_model(tiny.make("llama"), config)
    ids = torch.randint(4, 60, (2, 9), generator=generator("ids"))
    server = Server("fed_sb", base=model)
    gradient = gradient_of(server, model, [{"input_ids": ids, "labels": ids}])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert gradient[name].shape == model.get_parameter(name).shape
    report = server.update({"a": gradient}, num_examples={"a": 1})
    assert report.bytes_up == sum(t.nbytes for t in gradient.values())
    strongest = torch.linalg.svdvals(gradient[name])[:3]
    b = server.adapter()["base_model.model.model.embed_tokens.lora_embedding_B"]
    assert float((b.mT @ gradient[name].mT).norm()) > 0.99 * float(strongest.norm())
    state_dict = trained_by(server, model, [{"input_ids": ids, "labels": ids}] * 3)
    assert state_dict["base_model.model.model.embed_tokens.lora_embedding_A"].any()
    server.update({"a": state_dict}, num_examples={"a": 1})
    for key, value in server.adapter().items():  # PEFT adds the embedding's own weight
        torch.testing.assert_close(value, state_dict[key], rtol=1e-5, atol=1e-6)


def test_training_freezes_what_other_methods_do_not_train() -> None:
    model = small_model()
    server = Server("rolora", base=model)
    for turn in ("lora_B", "lora_A"):
        set_peft_model_state_dict(model, server.adapter())
        with server.training(model):
            assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {turn}
        assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        server.update({"a": get_peft_model_state_dict(model)}, num_examples={"a": 1})


def every_second() -> Method:
    """FedIT that asks for a gradient, and for it again, before every second round, and adds up what it saw."""
    plain = fedit()

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        if any(isinstance(payload, Vector) for payload in update.modules.values()):
            return update, {"times": (kept or {"times": torch.zeros(1)})["times"] + 1}
        return plain.encode(update, sent, kept)

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, dict[str, Any]]:
        if state.exchange < 2:
            seen = sum((v["gradient"].sum() / partial.weight for v in partial.sums.values()), torch.zeros(()))
            return replace(state, extra={"seen": state.extra.get("seen", torch.zeros(())) + seen}), {"asked": 1}
        after, diagnostics = plain.finish(state, partial)
        return replace(after, extra=state.extra), dict(diagnostics)

    exchanges = (Exchange(SUM, "gradient", 2), Exchange(SUM, "again", 2), Exchange(SUM))
    return replace(plain, encode=encode, finish=finish, exchanges=exchanges)


def test_the_stages_follow_from_the_exchanges_of_any_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A gradient is asked for in the rounds where it is due, and its further exchanges ask for nothing more."""
    monkeypatch.setitem(METHODS, "fedit", every_second)
    server = Server("fedit", base={"q": (4, 3)}, max_rank=2)
    asked = []
    for _ in range(6):
        asked.append((server.round_num, server.asks))
        if server.asks == "gradient":
            answer = {"base_model.model.q.base_layer.weight": torch.ones(4, 3)}
            assert server.trains == ()
        else:
            answer = server.adapter()
            assert server.trains == ("lora_A", "lora_B")
        server.update({"a": answer}, num_examples={"a": 5})
        server.save(tmp_path / "server")
        server = Server.load(tmp_path / "server")
    assert asked == [(0, "gradient"), (0, "train"), (1, "train"), (2, "gradient"), (2, "train"), (3, "train")]
    assert float(server.state.extra["seen"]) == 2 * 2 * 12


WEIGHT = f"base_model.model.{MODULE}.base_layer.weight"
Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop(WEIGHT), rf"client a: '{WEIGHT}' is missing: expected gradients of the 4 base weights"),
        (lambda d: d.update({"x": torch.ones(2)}), "client a: 'x' is no gradient that is asked for: expected"),
        (
            lambda d: d.update({WEIGHT: torch.ones(3, 3)}),
            r"client a: the gradient of .* is \(3, 3\) of torch.float32: e",
        ),
        (
            lambda d: d.update({WEIGHT: d[WEIGHT].int()}),
            r"client a: the gradient .* of torch.int32: expected \(32, 32\)",
        ),
        (lambda d: d.update({WEIGHT: d[WEIGHT] * math.nan}), "client a: tensor .*base_layer.weight' holds NaN"),
        (lambda d: d.update({WEIGHT: d[WEIGHT].numpy()}), "client a: .* is a ndarray: expected a tensor"),
        (lambda d: d.update({WEIGHT: d[WEIGHT] * 0 + 3e38}), "client a: sketch of .* overflowed: expected finite"),
    ],
)
def test_a_wrong_gradient_is_refused(change: Change, message: str, asked: Any) -> None:
    server, model, given = asked
    gradient: dict[str, Any] = gradient_of(server, model, given)
    change(gradient)
    state = server.state
    with pytest.raises(FedspanError, match=message) as said:
        server.update({"a": gradient}, num_examples={"a": 1})
    assert "\n" not in str(said.value)
    assert (server.state is state, server.asks) == (True, "gradient")


def test_answers_to_another_question_are_refused(asked: Any) -> None:
    """An adapter where a gradient is asked for, a gradient where training is; each message says what is."""
    server, model, given = asked
    gradient = gradient_of(server, model, given)
    with pytest.raises(FedspanError, match=r"client a: .*: expected gradients of the 4 base weights"):
        server.update({"a": server.adapter()}, num_examples={"a": 1})
    with pytest.raises(FedspanError, match=r"client a: a list: expected gradients by the weights' names"):
        server.update({"a": [1]}, num_examples={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(FedspanError, match=r"round 1 of fed_sb asks for a gradient before training: expected"):
        server.training(model)
    server.update({"a": gradient}, num_examples={"a": 1})
    with pytest.raises(FedspanError, match="client a holds no lora_A and lora_B: expected a LoRA adapter"):
        server.update({"a": gradient}, num_examples={"a": 1})
    with server.training(model):
        inside = get_peft_model_state_dict(model)
        with (
            pytest.raises(FedspanError, match="the model is within `training` already: expected"),
            server.training(model),
        ):
            pass
    with pytest.raises(FedspanError, match=r"client a: .*parametrizations.* is of a model within `training`: expected"):
        server.update({"a": inside}, num_examples={"a": 1})


def test_models_that_have_no_such_gradient(asked: Any) -> None:
    server, model, _ = asked

    def refused(model: Any, message: str) -> None:
        with pytest.raises(FedspanError, match=message), server.gradient(model):
            pass

    refused(model, "base_layer.weight has no gradient: expected a backward pass")
    refused({}, "a dict: expected a PEFT model")
    refused(nn.Linear(2, 2), "the model has no parameter 'base_model.model.model.*: expected a PEFT model with the")
    layer = model.get_submodule(f"base_model.model.{MODULE}.base_layer")
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    refused(model, f"{WEIGHT} is held as torch.int8: expected a floating-point base")


def test_a_huge_core_is_averaged_or_refused(based: Any) -> None:
    """Means are taken in float64, so that a core near the largest number of its type has one."""
    server, model, _ = based
    set_peft_model_state_dict(model, server.adapter())
    with server.training(model), torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("original"):
                p.fill_(3e37)
    server.update({"a": get_peft_model_state_dict(model)}, num_examples={"a": 100})
    values = tiny.state_tensors(server.state).values()
    assert all(bool(value.isfinite().all()) for value in values)
    assert max(float(value.abs().max()) for value in values) > 1e36


@pytest.mark.parametrize("exchange", [1, 3, -1])
def test_a_saved_server_in_the_middle_of_a_stage_is_damaged(exchange: int, asked: Any, tmp_path: Path) -> None:
    path = tmp_path / "server"
    asked[0].save(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["fedspan_server"])
    meta["state"]["exchange"] = exchange
    save_file(load_file(path), path, metadata={"fedspan_server": json.dumps(meta)})
    with pytest.raises(FedspanError, match=r"is damaged \(incomplete: exchange -?\d .*begins no stage\)"):
        Server.load(path)


def test_a_subspace_of_any_kind_is_held_to(based: Any) -> None:
    """Not only orthonormal bases: the columns need only span it, and empty ones span nothing."""
    rng = generator("space")
    basis = torch.randn(9, 3, generator=rng) * torch.tensor([1e-3, 5.0, 0.0])
    then = Factors(torch.randn(6, 2, generator=rng), torch.randn(2, 9, generator=rng), 1.0)
    sent = Broadcast({"q": then}, {}, Recipe(train_b=False), subspaces={"q/a": Subspace(basis, "right")})
    left = Broadcast({"q": then}, {}, Recipe(), subspaces={"q/b": Subspace(torch.eye(6)[:, :2])})

    def given(b: Tensor, a: Tensor, sent: Broadcast) -> Mapping[str, Any]:
        return trained_update("a", {"q": Factors(b, a, 1.0)}, {}, sent, 1.0, "round 1 of x").modules

    within = then.a + torch.randn(2, 3, generator=rng) @ basis.mT
    given(then.b, within, sent)
    given(then.b + torch.eye(6)[:, :2], then.a * 2, left)
    with pytest.raises(FedspanError, match=r"client a: q: lora_A has moved 0.001 out of the subspace"):
        given(then.b, within + 1e-3 * _perpendicular(basis), sent)
    with pytest.raises(FedspanError, match=r"client a: q: lora_B has moved 1 out of the subspace"):
        given(then.b + torch.eye(6)[:, 2:4] * torch.tensor([1.0, 0.0]), then.a, left)


def _perpendicular(basis: Tensor) -> Tensor:
    """A matrix (2, 9) of norm 1 beyond all columns of the basis."""
    u = torch.linalg.svd(basis, full_matrices=True)[0]
    return torch.stack([u[:, -1], torch.zeros(len(basis))])
