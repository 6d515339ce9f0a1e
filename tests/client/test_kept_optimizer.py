"""A local optimizer's state that lives through the rounds of its client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from local_training import texts
from run_folders import NAMES
from torch import Tensor

from fedspan.algebra.galore import GaloreAdamW
from fedspan.client.batching import batches
from fedspan.client.cohort import applies
from fedspan.client.learning_rates import rate
from fedspan.client.optimizer_state import put_state, state_by_name
from fedspan.client.shared_payloads import PayloadCache, SharedPayloads, get_result, put_result
from fedspan.client.training import Assignment, LocalResult, TrainingSettings, train
from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.federation import requirements
from fedspan.methods import METHODS
from fedspan.methods.base import Method, aggregate
from fedspan.methods.full_weights import fedftg
from fedspan.methods.kept_optimizer import with_kept_optimizer
from fedspan.methods.messages import ClientState, Recipe, Request, Template, Update
from fedspan.models import FederatedModel, seeded
from fedspan.models.losses import client_losses
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator
from fedspan.wire import packing

__all__ = ["texts"]

LOCAL = LocalConfig(learning_rate=1e-2, batch_size=8, weight_decay=0.1, warmup=0.4, keep_optimizer=True)
STEPS = 4
LASTING = {
    "centralised",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedftg",
    "fedit",
    "fedprox",
    "fedsa_lora",
    "fedyogi",
    "ffa_lora",
    "flora_na",
    "local",
    "lora_fair",
    "lora_fair_ridge",
    "rolora",
    "scaffold",
}


@pytest.fixture(scope="module")
def model(bases: dict[str, Path]) -> FederatedModel:
    return tiny.load(bases["bert"], "classification", trains="targets")


def one_round(
    model: FederatedModel, data: Encoded, method: Method, state: Any, kept: ClientState | None
) -> tuple[Any, ClientState | None, LocalResult]:
    """One client's round, with all of the weight."""
    sent = method.start(method.broadcast(state, Request(None)), kept)
    work = Assignment("client-0", sent, np.arange(len(data)), STEPS, 1.0)
    result = train(model, work, data, TrainingSettings(local=LOCAL), state.round_num)
    answer, kept = method.encode(result.update, sent, kept)
    return aggregate(method, state, [answer])[0], kept, result


def uninterrupted(
    model: FederatedModel, data: Encoded, method: Method, start: Mapping[str, Tensor], galore: dict[str, Any] | None
) -> dict[str, Tensor]:
    """Two rounds' steps with one optimizer object, by hand."""
    model.load(method.broadcast(method.init(model.template(1, 1.0, False, 0), dict(start)), Request(None)))
    chosen = model.trainable(Recipe())
    if galore is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(list(chosen.values()), weight_decay=0.1, fused=True)
    else:
        projected = [p for name, p in chosen.items() if name in model.projected]
        plain = [p for name, p in chosen.items() if name not in model.projected]
        optimizer = GaloreAdamW([{"params": projected, **galore}, {"params": plain}], weight_decay=0.1)
    for round_num in range(2):
        with model.training(False), seeded(0, round_num, "client-0", "dropout"):
            order = batches(len(data), LOCAL.batch_size, STEPS, generator(0, round_num, "client-0", "batches"))
            for step, indices in enumerate(order):
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = rate(LOCAL, step, STEPS)
                client_losses(model, data.batch(indices)).sum().backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(list(chosen.values()), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return {name: value.clone() for name, value in model.dense().items()}


@pytest.mark.parametrize("rank", [None, 4], ids=["AdamW", "GaLore"])
def test_two_rounds_of_one_client_are_one_long_run(model: FederatedModel, texts: Encoded, rank: int | None) -> None:
    """To the bit, decay, warm-up and clipping included; GaLore's projector is refreshed in the second round. Without
    the kept state the second round differs."""
    options: dict[str, Any] = {"galore_rank": rank, "svd": "exact", "update_gap": 6}
    plain = fedftg(**options)
    method, start = with_kept_optimizer(plain), {name: value.clone() for name, value in model.dense().items()}
    ends = []
    for rule in (method, plain):
        state, kept = rule.init(model.template(1, 1.0, False, 0), start), None
        for _ in range(2):
            state, kept, _ = one_round(model, texts, rule, state, kept)
        ends.append({name: value.float() for name, value in state.dense.items()})
    galore = None if rank is None else {"rank": rank, "svd": "exact", "update_gap": 6}
    long = uninterrupted(model, texts, plain, start, galore)
    tiny.same(ends[0], long)
    assert any(not torch.equal(ends[1][name], value) for name, value in long.items())


def test_an_answer_that_was_not_counted_leaves_the_kept_state_alone(model: FederatedModel, texts: Encoded) -> None:
    """Steps work in place, on copies: training twice from one state is training twice alike."""
    method = with_kept_optimizer(fedftg(galore_rank=4))
    state = method.init(model.template(1, 1.0, False, 0), {n: v.clone() for n, v in model.dense().items()})
    state, kept, _ = one_round(model, texts, method, state, None)
    assert kept is not None
    before = {name: value.clone() for name, value in kept.items()}
    _, once, first = one_round(model, texts, method, state, kept)
    _, twice, second = one_round(model, texts, method, state, kept)
    tiny.same(kept, before)
    tiny.same(once, twice)
    tiny.same(first.update.dense, second.update.dense)
    assert any(not torch.equal(once[name], before[name]) for name in before)  # type: ignore[index]


def test_the_state_stays_on_the_site(model: FederatedModel, texts: Encoded) -> None:
    """What leaves is the method's own answer; what is kept has the optimizer's parts and nothing else."""
    method = with_kept_optimizer(fedftg(galore_rank=None))
    state = method.init(model.template(1, 1.0, False, 0), dict(model.dense()))
    sent = method.start(method.broadcast(state, Request(None)), None)
    work = Assignment("client-0", sent, np.arange(len(texts)), 1, 1.0)
    result = train(model, work, texts, TrainingSettings(local=LOCAL), 0)
    answer, kept = method.encode(result.update, sent, None)
    assert not answer.optimizer
    assert not answer.moments
    parts = {"step", "exp_avg", "exp_avg_sq"}
    assert kept is not None
    # A weight without a gradient (the pooler's, where nothing reads it) has no state.
    assert {key.rpartition(":")[2] for key in kept} == parts
    assert {key.split(":")[1] for key in kept} <= set(result.update.dense)
    off = train(model, work, texts, TrainingSettings(local=LOCAL.model_copy(update={"keep_optimizer": False})), 0)
    assert not off.update.optimizer
    tiny.same(off.update.dense, result.update.dense)


def test_the_state_passes_between_processes(model: FederatedModel, texts: Encoded) -> None:
    """To a worker with the broadcast, and back with the result."""
    method = with_kept_optimizer(fedftg(galore_rank=4))
    state = method.init(model.template(1, 1.0, False, 0), {n: v.clone() for n, v in model.dense().items()})
    state, kept, result = one_round(model, texts, method, state, None)
    sent = method.start(method.broadcast(state, Request(None)), kept)
    packed, sender = packing.TensorList(), SharedPayloads()
    sender.expect([sent])
    header = sender.broadcast(packed, set(), sent)
    tiny.same(PayloadCache().broadcast(header, packed.tensors).optimizer, sent.optimizer)
    packed = packing.TensorList()
    tiny.same(get_result(put_result(packed, result), packed.tensors).update.optimizer, result.update.optimizer)
    assert sent.optimizer.keys() == result.update.optimizer.keys()


def test_the_methods_own_state_and_the_optimizers_do_not_meet() -> None:
    """What a method keeps comes back to it untouched, and a tensor that is not trained in a round keeps its moments."""
    seen: list[ClientState | None] = []

    def start(sent: Any, kept: ClientState | None) -> Any:
        seen.append(kept)
        return sent

    def encode(update: Any, sent: Any, kept: ClientState | None) -> Any:
        seen.append(kept)
        return update, {"rank": torch.tensor(3)}

    method = with_kept_optimizer(replace(METHODS["fedit"](), start=start, encode=encode))
    template = Template({"x": (4, 3)}, 2)
    sent = method.broadcast(method.init(template, {}), Request(None))
    update = Update("a", 1.0, dict(sent.adapter), {}, optimizer={"x/a:step": torch.tensor(1.0)})
    _, kept = method.encode(update, sent, None)
    later = method.start(sent, kept)
    assert set(later.optimizer) == {"x/a:step"}
    _, kept = method.encode(replace(update, optimizer={"x/b:step": torch.tensor(2.0)}), later, kept)
    assert kept is not None
    assert set(kept) == {"rank", "optimizer:x/a:step", "optimizer:x/b:step"}
    assert [None if own is None else set(own) for own in seen] == [None, {"rank"}, {"rank"}]


def test_a_state_is_put_back_where_it_was() -> None:
    """By name and part, in copies, the untrained left out."""
    p, q = (torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2))
    optimizer = torch.optim.AdamW([p, q], fused=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = state_by_name(optimizer, {"p": p, "q": q})
    assert set(kept) == {"p:step", "p:exp_avg", "p:exp_avg_sq"}
    fresh = torch.optim.AdamW([p], fused=True)
    put_state(fresh, {"p": p}, {**kept, "gone:step": torch.tensor(1.0)})
    tiny.same(state_by_name(fresh, {"p": p}), kept)
    p.grad = torch.ones_like(p)
    fresh.step()
    assert float(kept["p:step"]) == 1.0


def test_clients_with_optimizers_of_their_own_share_no_pass(bases: dict[str, Path], texts: Encoded) -> None:
    model = tiny.load(bases["bert"], "classification")
    reason = applies(model, texts, Recipe(), TrainingSettings(local=LOCAL))
    assert reason == "each client goes on with an optimizer of its own (local.keep_optimizer)"


def test_methods_whose_clients_train_the_same_coordinates_in_every_round() -> None:
    """Readouts, patches with fresh adapters, turned pairs, scales that restart and moments of the server's are out."""
    assert {name for name in NAMES if METHODS[name]().lasting} == LASTING


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("glora", {}, "local.keep_optimizer = true: glora has its clients train other coordinates in every round"),
        ("fedgalore", {}, "fedgalore has its clients .* or start from moments of the server's"),
        ("fedrot_lora", {}, "methods that can: .*ffa_lora.*fedit"),
        ("fedavg", {"local": {"optimizer": "sgd"}}, "local.optimizer = 'sgd' has no state to keep; expected 'adamw'"),
        ("ffa_lora", {"privacy": {"dp": "example"}}, "with privacy.dp = 'example': nothing is proven here"),
        (
            "ffa_lora",
            {"privacy": {"dp": "client"}, "federation": {"weighting": "equal"}},
            "with privacy.dp = 'client': nothing is proven here about what a client keeps",
        ),
    ],
)
def test_what_has_no_state_to_keep_is_refused(
    bases: dict[str, Path], name: str, sections: dict[str, Any], message: str
) -> None:
    """In one line, before any data is read."""
    local = {"keep_optimizer": True, **sections.get("local", {})}
    config = tiny.config(bases["bert"], Path("none.csv"), name, **{**sections, "local": local})
    with pytest.raises(FedspanError, match=message) as caught:
        requirements.chosen(config)
    assert "\n" not in str(caught.value)
