"""A Flower strategy over our methods: the very bits of `fedspan.aggregate`, and nothing unchecked gets to it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from grids import Field, field

import fedspan
from fedspan.flower.strategy import FedspanStrategy, figures, received, reply
from fedspan.methods import METHODS
from fedspan.methods.base import Method, ServerState
from fedspan.methods.messages import Broadcast, Factors, Request, Template, Update
from fedspan.support.seeding import generator
from fedspan.wire.refusals import Code

SHAPES = {"layers.0.q": (7, 5), "layers.1.v": (4, 9)}
TEMPLATE = Template(SHAPES, rank=4, alpha=8.0, seed=3)
HEAD = {"head.weight": torch.arange(6.0).reshape(2, 3)}
NAMES = ("clinic-b", "clinic-a", "clinic-c")
RANKS = (2, 4, 3)

PLAIN = (
    "glora flexlora raflora fedsvd ffa_lora rolora lora_fair lora_fair_ridge flora_na fedrot_lora fedit "
    "fedavg fedprox fedavgm fedadagrad fedadam fedyogi"
)
"""Methods whose clients get factors and weights, give some back, and keep nothing."""


def trained(sent: Broadcast, name: str, round_num: int) -> Update:
    """Return a stand-in for a trained update: noise that depends on the client and the round alone."""
    rng = generator(name, round_num, "training")

    def moved(x: torch.Tensor, trains: bool = True) -> torch.Tensor:
        return x + torch.randn(x.shape, generator=rng) if trains else x

    modules = {
        module: Factors(moved(f.b, sent.recipe.train_b), moved(f.a, sent.recipe.train_a), f.scaling)
        for module, f in sent.adapter.items()
    }
    return Update(
        name, float(10 + len(name) + NAMES.index(name)), modules, {k: moved(x) for k, x in sent.dense.items()}
    )


Spoil = Callable[[Message, Message], Message | None]
"""(what was asked, what would be answered) -> what is answered instead."""


def site(method: Method, name: str, spoil: Spoil | None = None) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        server_round = int(message.content["config"]["server-round"])
        answer = reply(message, method, trained(received(message), name, server_round - 1), {"loss": len(name)})
        return answer if spoil is None else spoil(message, answer) or answer

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        sent = received(message)
        size = sum(float(f.delta().dense().abs().sum()) for f in sent.adapter.values())
        return figures(message, name, 10.0 + NAMES.index(name), {"size": size, "index": NAMES.index(name)})

    return app


def expected(method: Method, ranks: Mapping[str, int], rounds: int, dense: Mapping[str, torch.Tensor]) -> ServerState:
    """The same federation by the library's own functions."""
    state = method.init(TEMPLATE, dense)
    for round_num in range(rounds):
        updates = []
        for name, rank in ranks.items():
            sent = method.broadcast(state, Request(rank))
            updates.append(method.encode(trained(sent, name, round_num), sent, None)[0])
        state, _ = fedspan.aggregate(method, state, updates)
    return state


def same(x: ServerState, y: ServerState) -> None:
    assert x.round_num == y.round_num
    assert x.modules.keys() == y.modules.keys()
    for name in x.modules:
        for part, value in x.modules[name].items():
            torch.testing.assert_close(value, y.modules[name][part], rtol=0, atol=0)
    for mine, other in ((x.dense, y.dense), (x.extra, y.extra)):
        assert mine.keys() == other.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=0)


def made(name: str, made_field: Field, **settings: Any) -> FedspanStrategy:
    method = METHODS[name]()
    ranks = dict(zip(made_field.nodes, RANKS, strict=False)) if method.info.hetero_rank else None
    settings = {"dense": HEAD, "ranks": ranks, "min_nodes": len(made_field.nodes), "lifetime": 60.0} | settings
    return FedspanStrategy(method, TEMPLATE, **settings)


@pytest.mark.parametrize("name", PLAIN.split())
def test_a_run_on_flower_has_the_bits_of_aggregate(name: str) -> None:
    """Three clients of different ranks where the method has them, two rounds, Flower's own `start`."""
    method = METHODS[name]()
    with field(*(site(method, client) for client in NAMES)) as f:
        strategy = made(name, f)
        assert isinstance(strategy, Strategy)
        result = strategy.start(f.grid, strategy.arrays(), num_rounds=2, timeout=20)
    ranks = dict(zip(NAMES, RANKS, strict=True)) if method.info.hetero_rank else dict.fromkeys(NAMES, TEMPLATE.rank)
    whole = expected(method, ranks, 2, HEAD)
    same(strategy.state, whole)
    assert not strategy.rejected
    final = method.broadcast(whole, Request(None))
    for module, factors in final.adapter.items():
        np.testing.assert_array_equal(result.arrays[f"{module}/a"].numpy(), factors.a.numpy())
        np.testing.assert_array_equal(result.arrays[f"{module}/b"].numpy(), factors.b.numpy())
    weights = {name: 10.0 + len(name) + NAMES.index(name) for name in NAMES}
    loss = sum(w * len(name) for name, w in weights.items()) / sum(weights.values())
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(loss)
    assert result.evaluate_metrics_clientapp[2]["index"] == pytest.approx((11 + 2 * 12) / 33)
    assert result.evaluate_metrics_clientapp[2]["num-clients"] == 3


def test_every_method_either_runs_or_is_refused_in_one_line() -> None:
    for name, factory in METHODS.items():
        if name in PLAIN.split():
            continue
        ranks = {1: 2, 2: 4} if factory().info.hetero_rank else None
        with pytest.raises(ValueError, match=r"expected .*fedspan flower init") as refused:
            FedspanStrategy(factory(), TEMPLATE, dense=HEAD, ranks=ranks)
        assert "\n" not in str(refused.value)


def test_a_patch_that_only_some_ranks_get_is_refused_too() -> None:
    """A client of rank 2 would train Fed-PLoRA without the modules that are folded away, GLoRA+ without its rest."""
    for name, ranks in (("fed_plora", {1: 2, 2: 4}), ("glora_plus", {1: 2, 2: 4}), ("glora_plus", None)):
        with pytest.raises(ValueError, match=rf"{name} changes its clients' base: expected only factors"):
            FedspanStrategy(METHODS[name](), TEMPLATE, dense=HEAD, ranks=ranks)
    FedspanStrategy(METHODS["fed_plora"](), TEMPLATE, dense=HEAD)


def changed(part: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Spoil:
    def spoil(asked: Message, answer: Message) -> None:
        arrays = answer.content["arrays"]
        arrays[part] = Array(np.ascontiguousarray(change(arrays[part].numpy().copy())))

    return spoil


def with_config(key: str, value: Any) -> Spoil:
    def spoil(asked: Message, answer: Message) -> None:
        answer.content["fedspan"][key] = value

    return spoil


def put(i: float) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    def change(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        x.flat[0] = i
        return x

    return change


def without(part: str) -> Spoil:
    def spoil(asked: Message, answer: Message) -> None:
        del answer.content["arrays"][part]

    return spoil


def header(data: Callable[[bytes], bytes]) -> Spoil:
    def spoil(asked: Message, answer: Message) -> None:
        array = answer.content["arrays"]["head.weight"]
        array.data = data(array.data)

    return spoil


A = "layers.0.q/a"
SPOILT: Mapping[str, tuple[Spoil, str]] = {
    "nan": (changed(A, put(float("nan"))), f"{A} holds NaN or infinity"),
    "infinity": (changed("head.weight", put(float("inf"))), "head.weight holds NaN or infinity"),
    "rank 1": (changed(A, lambda x: x[:1]), rf"{A} is \(1, 5\) float32: expected \(4, 5\) float32"),
    "transposed": (changed(A, lambda x: x.T), rf"{A} is \(5, 4\) float32: expected \(4, 5\) float32"),
    "float64": (changed(A, lambda x: x.astype(np.float64)), rf"{A} is \(4, 5\) float64: expected \(4, 5\) float32"),
    "missing": (without(A), f"it lacks the array {A}"),
    "cut short": (header(lambda x: x[:-4]), "head.weight cannot be read"),
    "huge": (header(lambda x: x.replace(b"(2, 3)", b"(2000000000, 3000000000)")), "head.weight cannot be read"),
    "no array": (header(lambda x: b"garbage"), "head.weight cannot be read"),
    "half a literal": (header(lambda x: x.replace(b"{", b"(", 1)), "head.weight cannot be read"),
    "old round": (with_config("round", 0), "it is for round 0: expected 1"),
    "no examples": (with_config("num-examples", 0.0), "num-examples = 0.0"),
    "nan examples": (with_config("num-examples", float("nan")), "num-examples = nan"),
    "no name": (with_config("client-id", ""), "client-id = ''"),
    "another's name": (with_config("client-id", "clinic-a"), "belongs to another node"),
}


@pytest.mark.parametrize("problem", SPOILT)
def test_a_spoilt_reply_is_left_out_and_the_others_count(problem: str) -> None:
    """The result has the bits of a round without that client."""
    spoil, why = SPOILT[problem]
    method = METHODS["glora"]()
    # The spoilt one has the largest node id, so that of two with one name the honest one is believed.
    apps = [site(method, "clinic-b"), site(method, "clinic-a"), site(method, "clinic-c", spoil)]
    with field(*apps) as f:
        strategy = made("glora", f, ranks=4)
        bad = _node_of(f, apps[2])
        strategy.start(f.grid, strategy.arrays(), num_rounds=1, timeout=20)
    assert list(strategy.rejected) == [str(bad)]
    assert re.search(why, strategy.rejected[str(bad)])
    same(strategy.state, expected(method, {"clinic-a": 4, "clinic-b": 4}, 1, HEAD))


def _node_of(f: Field, app: ClientApp) -> int:
    return f.served[id(app)]


def test_a_client_that_raises_or_stays_silent_is_left_out() -> None:
    method = METHODS["fedit"]()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from fedspan.flower.client_app import refusal

        return refusal(message, Code.NO_MEMORY, "no\nmemory")

    mute = site(method, "clinic-c")
    with field(site(method, "clinic-b"), app, mute) as f:
        f.silent.add(_node_of(f, mute))
        strategy = made("fedit", f, min_success=1, evaluation=0.0)
        strategy.start(f.grid, strategy.arrays(), num_rounds=1, timeout=1)
        refused, silent = (strategy.rejected.pop(str(_node_of(f, node))) for node in (app, mute))
        assert refused.startswith("it has not enough memory (incident ")
        assert silent == "no reply"
        assert strategy.rejected == {}
        same(strategy.state, expected(method, {"clinic-b": 4}, 1, HEAD))

        before = strategy.state
        strategy.min_success = 2
        with pytest.raises(ValueError, match=r"round 1: 1 valid replies, min_success = 2: \d+: it has not enough"):
            strategy.start(f.grid, strategy.arrays(), num_rounds=1, timeout=1)
        same(strategy.state, before)


def test_the_order_of_the_replies_changes_nothing() -> None:
    method = METHODS["glora"]()
    with field(*(site(method, name) for name in NAMES)) as f:
        strategy = made("glora", f)
        replies = list(
            f.grid.send_and_receive(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), f.grid), timeout=20)
        )
        asked = dict(strategy._pending)
        states = []
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            strategy.state = method.init(TEMPLATE, HEAD)
            strategy._pending = dict(asked)
            strategy.aggregate_train(1, [replies[i] for i in order])
            states.append(strategy.state)
        same(states[0], states[1])
        same(states[0], states[2])


def test_the_same_seed_draws_the_same_nodes_and_others_another_time() -> None:
    method = METHODS["fedit"]()
    with field(*(site(method, "clinic-a") for _ in range(12))) as f:
        drawn = {}
        for seed in (0, 0, 1):
            strategy = FedspanStrategy(
                method, replace(TEMPLATE, seed=seed), dense=HEAD, participation=0.25, min_nodes=2
            )
            rounds = [
                sorted(
                    m.metadata.dst_node_id
                    for m in strategy.configure_train(r, strategy.arrays(), ConfigRecord(), f.grid)
                )
                for r in (1, 2, 3)
            ]
            assert all(len(nodes) == 3 for nodes in rounds)
            assert drawn.setdefault(seed, rounds) == rounds
        assert drawn[0] != drawn[1]
        assert len({tuple(nodes) for nodes in drawn[0]}) > 1


def test_waiting_for_nodes_ends() -> None:
    with field(site(METHODS["fedit"](), "clinic-a")) as f:
        strategy = FedspanStrategy(METHODS["fedit"](), TEMPLATE, dense=HEAD, min_nodes=2, wait=0.3)
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"1 nodes are connected after 0\.3 s: expected at least 2"):
            strategy.configure_train(1, strategy.arrays(), ConfigRecord(), f.grid)
        assert time.monotonic() - began < 5


def test_arrays_that_are_not_the_strategys_are_refused() -> None:
    with field(site(METHODS["fedit"](), "clinic-a")) as f:
        strategy = FedspanStrategy(METHODS["fedit"](), TEMPLATE, dense=HEAD)
        other = strategy.arrays()
        other["head.weight"] = Array(other["head.weight"].numpy() + 1)
        with pytest.raises(ValueError, match=r"expected strategy.arrays\(\)"):
            strategy.configure_train(1, other, ConfigRecord(), f.grid)


def test_a_node_without_a_rank_is_refused() -> None:
    with field(site(METHODS["glora"](), "clinic-a")) as f:
        strategy = FedspanStrategy(METHODS["glora"](), TEMPLATE, dense=HEAD, ranks={1: 2, 2: 4})
        with pytest.raises(ValueError, match=r"has no rank: expected one of \[1, 2\]"):
            strategy.configure_train(1, strategy.arrays(), ConfigRecord(), f.grid)


def test_from_pefts_names_comes_the_same_strategy() -> None:
    arrays = ArrayRecord()
    for module, (m, n) in SHAPES.items():
        arrays[f"{module}.lora_A.weight"] = Array(np.ones((4, n), np.float32))
        arrays[f"{module}.lora_B.weight"] = Array(np.zeros((m, 4), np.float32))
    arrays["head.weight"] = Array(HEAD["head.weight"].numpy())
    method = METHODS["glora"]()
    strategy = FedspanStrategy.from_arrays(method, arrays, alpha=8.0, seed=3)
    assert strategy.state.template == TEMPLATE
    same(strategy.state, method.init(TEMPLATE, HEAD))

    arrays["layers.0.q.lora_B.weight"] = Array(np.ones((7, 4), np.float32))
    with pytest.raises(ValueError, match="B is not zero"):
        FedspanStrategy.from_arrays(method, arrays)
    del arrays["layers.0.q.lora_B.weight"]
    with pytest.raises(ValueError, match=r"lora_B.weight is missing"):
        FedspanStrategy.from_arrays(method, arrays)
    arrays["layers.0.q.lora_B.weight"] = Array(np.zeros((7, 2), np.float32))
    arrays["layers.0.q.lora_A.weight"] = Array(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"ranks \[2, 4\]: expected one"):
        FedspanStrategy.from_arrays(method, arrays)


def test_a_client_with_another_method_or_scaling_sends_nothing() -> None:
    """The scaling does not travel back, so another one than the server's must not be used."""
    method = METHODS["glora"]()
    problems: list[str] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sent = received(message)
        update = trained(sent, "clinic-a", 0)
        for other, change in (
            (METHODS["fedit"](), update),
            (method, replace(update, modules={k: replace(x, scaling=1.0) for k, x in update.modules.items()})),
        ):
            try:
                reply(message, other, change)
            except ValueError as error:
                problems.append(str(error))
        return reply(message, method, update)

    with field(app) as f:
        strategy = FedspanStrategy(method, TEMPLATE, dense=HEAD, evaluation=0.0)
        strategy.start(f.grid, strategy.arrays(), num_rounds=1, timeout=20)
    assert problems == [
        "the server runs 'glora': expected 'fedit' as here",
        "layers.0.q has scaling 1.0: expected 2.0, as sent",
    ]


def test_what_a_client_does_to_its_tensors_does_not_reach_the_server() -> None:
    """Flower hands out views of live arrays."""
    method = METHODS["fedit"]()
    with field(site(method, "clinic-a")) as f:
        strategy = FedspanStrategy(method, TEMPLATE, dense={k: x.clone() for k, x in HEAD.items()})
        (message,) = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), f.grid)
        sent = received(message)
        for value in (*sent.dense.values(), *(x.a for x in sent.adapter.values())):
            value.zero_()
        same(strategy.state, method.init(TEMPLATE, HEAD))


def test_a_figure_that_is_no_number_is_left_out() -> None:
    def spoil(asked: Message, answer: Message) -> None:
        answer.content["metrics"] = MetricRecord({"loss": float("nan")})

    method = METHODS["fedit"]()
    with field(site(method, "clinic-a"), site(method, "clinic-b", spoil)) as f:
        strategy = made("fedit", f)
        strategy.start(f.grid, strategy.arrays(), num_rounds=1, timeout=20)
        assert list(strategy.rejected.values()) == ["loss = nan: expected a finite number"]
