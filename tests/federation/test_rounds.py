"""Laws of one round: who is counted, what travels, and that a bad client changes nothing for the others."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from fedspan.algebra.lowrank import LowRank
from fedspan.client.training import LocalResult
from fedspan.federation import rounds, simulated
from fedspan.federation.clients import Client
from fedspan.federation.rounds import RoundFailed, RunState
from fedspan.methods import METHODS
from fedspan.methods.base import Method, ServerState, advance
from fedspan.methods.folds import COLLECT, SUM, Exchange, Partial
from fedspan.methods.messages import Broadcast, Factors, Request, Update, Vector
from fedspan.robust.screening import Screened

NAMES = sorted(METHODS)
MIXED = sorted(name for name, factory in METHODS.items() if factory().info.hetero_rank)
HEAD = math.prod(tiny.HEAD)
WIDTH = sum(m + n for m, n in tiny.SHAPES.values())
Work = Callable[[Client, Broadcast, int], LocalResult]


def go(
    method: Method,
    cohorts: list[list[Client]],
    work: Work = tiny.fake_work,
    start: RunState | None = None,
    **options: Any,
) -> tuple[RunState, list[dict[str, Any]]]:
    rank = max(c.rank for cohort in cohorts for c in cohort)
    run_state, records = start or tiny.run_state(method, rank), []
    for cohort in cohorts:
        run_state, record = tiny.run_round(method, run_state, cohort, work, **options)
        records.append(record)
    return run_state, records


def ranks_for(name: str) -> tuple[int, ...]:
    return (2, 4, 3) if name in MIXED else (4, 4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_clients_changes_no_bit(name: str) -> None:
    people = tiny.clients(*ranks_for(name))
    forward, _ = go(METHODS[name](), [people, people])
    backward, _ = go(METHODS[name](), [people[::-1], [people[1], people[2], people[0]]])
    tiny.same_standing(forward, backward)


@pytest.mark.parametrize("name", NAMES)
def test_two_rounds_are_two_rounds_wherever_they_were_cut(name: str) -> None:
    people = tiny.clients(*ranks_for(name))
    method = METHODS[name]()
    whole, records = go(method, [people[:2], people[1:]])
    half, first = go(method, [people[:2]], start=tiny.run_state(method, 4))
    again, second = go(METHODS[name](), [people[1:]], start=half)
    tiny.same_standing(whole, again)
    assert [r["round_num"] for r in records] == [1, 2]
    for a, b in zip(records, first + second, strict=True):
        timings = {"server_seconds", "client_seconds", "train_wall_seconds", "peak_server_bytes"}
        assert {k: v for k, v in a.items() if k not in timings} == {k: v for k, v in b.items() if k not in timings}


def spoilt(update: Update, how: str) -> Update:
    """One client's update, broken in one place; a gradient, which comes before it, is left as it is."""
    if how.endswith("head") and "head" not in update.dense:
        return update
    if how == "nan head":
        head = update.dense["head"]
        return replace(update, dense={**update.dense, "head": torch.where(head == head.max(), torch.nan, head)})
    if how == "missing head":
        return replace(update, dense={n: t for n, t in update.dense.items() if n != "head"})
    if how == "head shape":
        return replace(update, dense={**update.dense, "head": update.dense["head"].T.contiguous()})
    if how == "unknown head":
        return replace(update, dense={**update.dense, "extra": torch.zeros(2)})
    f = update.factors("two")
    if how == "inf factor":
        f = Factors(f.b, f.a.clone().index_fill_(1, torch.tensor([3]), -torch.inf), f.scaling)
    elif how == "other rank":
        f = Factors(torch.zeros(f.b.shape[0], 7), torch.zeros(7, f.a.shape[1]), f.scaling)
    elif how == "swapped":
        f = Factors(f.a.mT.contiguous(), f.b.mT.contiguous(), f.scaling)
    modules = {**update.modules, "two": f}
    if how == "missing module":
        del modules["two"]
    if how == "unknown module":
        modules["three"] = f
    return replace(update, modules=modules)


DENSE_FAULTS = ("nan head", "missing head", "head shape", "unknown head")
FACTOR_FAULTS = ("inf factor", "other rank", "missing module", "unknown module")
FAULTS = [(name, how) for name in ("fedit", "flora", "fedavg") for how in DENSE_FAULTS] + [
    (name, how) for name in ("glora", "hetlora", "fedex_lora") for how in FACTOR_FAULTS
]


ONE_EXCHANGE = [n for n in NAMES if len(METHODS[n]().exchanges) == 1]
"""Where a client is asked more than once, its good answers have counted before the bad one is seen."""


@pytest.mark.parametrize(("name", "how"), [*FAULTS, *((n, "nan head") for n in ONE_EXCHANGE)])
def test_a_bad_update_is_named_and_the_others_go_on_as_if_it_had_never_been_there(name: str, how: str) -> None:
    people = tiny.clients(*ranks_for(name))
    method = METHODS[name]()
    before, _ = go(method, [people])

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        result = tiny.fake_work(client, sent, round_num)
        return replace(result, update=spoilt(result.update, how)) if client.client_id == "client-1" else result

    after, record = tiny.run_round(method, before, people, work)
    without, clean = tiny.run_round(method, before, [people[0], people[2]], tiny.fake_work)
    assert list(record["rejected"]) == ["client-1"]
    wanted = {
        "nan head": "head holds NaN",
        "inf factor": "two/a holds NaN or infinity",
        "head shape": r"head has shape",
    }
    assert wanted.get(how, "") in record["rejected"]["client-1"]
    assert record["num_clients"] == clean["num_clients"] == 2
    assert record["train_loss"] == clean["train_loss"]
    assert record["bytes_up"] == clean["bytes_up"]
    tiny.same_standing(after, without)


@pytest.mark.parametrize("name", NAMES)
def test_a_rejected_client_keeps_what_it_had(name: str) -> None:
    people = tiny.clients(*ranks_for(name))
    before, _ = go(METHODS[name](), [people])

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        result = tiny.fake_work(client, sent, round_num)
        return replace(result, update=spoilt(result.update, "nan head")) if client.client_id == "client-2" else result

    after, _ = tiny.run_round(METHODS[name](), before, people, work)
    assert after.seen["client-2"] == before.seen["client-2"]
    assert ("client-2" in after.client_states) == ("client-2" in before.client_states)
    if "client-2" in before.client_states:
        tiny.same(after.client_states["client-2"], before.client_states["client-2"])


def test_what_overflows_only_when_it_is_encoded_is_rejected_too() -> None:
    """HetLoRA sends factors times their norm: finite factors of 1e25 become infinite on the way."""
    people = tiny.clients(4, 4)

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        result = tiny.fake_work(client, sent, round_num)
        if client.client_id == "client-1":
            return result
        modules = {n: replace(f, b=f.b * 1e25) for n in sent.adapter if (f := result.update.factors(n))}
        return replace(result, update=replace(result.update, modules=modules))

    method = METHODS["hetlora"]()
    run_state, record = tiny.run_round(method, tiny.run_state(method, 4), people, work)
    assert list(record["rejected"]) == ["client-0"]
    assert set(run_state.client_states) == {"client-1"}
    alone, _ = tiny.run_round(method, tiny.run_state(method, 4), people[1:], tiny.fake_work)
    tiny.same_standing(run_state, alone)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_valid_updates_end_the_round_and_change_nothing(name: str) -> None:
    people = tiny.clients(*ranks_for(name))
    method = METHODS[name]()
    before, _ = go(method, [people])
    kept, _ = go(method, [people])

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        result = tiny.fake_work(client, sent, round_num)
        return replace(result, update=spoilt(result.update, "nan head")) if client.client_id != "client-2" else result

    with pytest.raises(
        RoundFailed, match=r"round 2: 1 valid updates, federation\.min_success = 2; 2 rejected: client-0"
    ):
        tiny.run_round(method, before, people, work, min_success=2)
    tiny.same_standing(before, kept)
    _, record = tiny.run_round(method, before, people, work, min_success=1)
    assert record["num_clients"] == 1
    assert sorted(record["rejected"]) == ["client-0", "client-1"]


def test_a_round_without_anybody_fails_at_once() -> None:
    """No waiting for clients that do not come."""
    method = METHODS["fedit"]()
    with pytest.raises(RoundFailed, match="0 valid updates"):
        tiny.run_round(method, tiny.run_state(method, 4), [], tiny.fake_work)


TRAFFIC: Mapping[str, Callable[[int], tuple[int, int]]] = {
    "fedit": lambda r: (r * WIDTH, r * WIDTH),
    "glora": lambda r: (r * WIDTH, r * WIDTH),
    "flexlora": lambda r: (r * WIDTH, r * WIDTH),
    "ffa_lora": lambda r: (r * (40 + 24), r * (40 + 24)),
    "flora": lambda r: (r * WIDTH, 0),
    "fedex_lora": lambda r: (r * WIDTH, r * WIDTH),
}


@pytest.mark.parametrize("name", sorted(TRAFFIC))
def test_the_bytes_of_a_first_round_are_the_formula(name: str) -> None:
    """Four bytes a number: the method's r(m+n) or less, and the head both ways."""
    ranks = (1, 2, 3) if METHODS[name]().info.hetero_rank else (2, 2, 2)
    _, (record,) = go(METHODS[name](), [tiny.clients(*ranks)])
    up, down = (4 * sum(TRAFFIC[name](r)[i] + HEAD for r in ranks) for i in (0, 1))
    assert (record["bytes_up"], record["bytes_down"]) == (up, down)


def test_full_weights_travel_whole_and_the_controls_not_at_all() -> None:
    numel = sum(m * n for m, n in tiny.SHAPES.values()) + HEAD
    people = tiny.clients(2, 2, 2)
    for name, expected in (("fedavg", 3 * 4 * numel), ("fedftg", 3 * 4 * numel)):
        _, records = go(METHODS[name](), [people, people])
        assert all((r["bytes_up"], r["bytes_down"]) == (expected, expected) for r in records)
    for trains in ("adapter", "all"):
        _, records = go(METHODS["local"](trains=trains), [people, people])
        assert all((r["bytes_up"], r["bytes_down"]) == (0, 0) for r in records)
    _, records = go(METHODS["centralised"](), [people[:1]])
    assert records[0]["bytes_down"] == 0


def test_a_rejected_client_of_the_local_control_sends_nothing_either() -> None:
    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        result = tiny.fake_work(client, sent, round_num)
        return replace(result, update=spoilt(result.update, "nan head")) if client.client_id == "client-0" else result

    _, records = go(METHODS["local"](), [tiny.clients(2, 2)], work)
    assert records[0]["rejected"]
    assert records[0]["bytes_up"] == 0


def test_flora_sends_each_client_what_it_has_missed() -> None:
    """The increment of a round with c summed ranks is c(m+n) numbers; who was away for two rounds fetches two."""
    zero, one, two = tiny.clients(1, 1, 1)
    method = METHODS["flora"]()
    run_state, records = go(method, [[zero, one], [zero, two], [zero, one], [two]])
    head, increment = 4 * HEAD, 4 * 2 * WIDTH
    assert [r["bytes_down"] for r in records] == [
        2 * head,
        2 * head + 2 * increment,  # both know of nothing yet
        2 * head + increment + 2 * increment,  # one was away in the second round
        head + 2 * increment,  # two holds the first round's, and misses two
    ]
    assert run_state.seen == {"client-0": 2, "client-1": 2, "client-2": 3}
    assert run_state.state.patches is not None
    assert run_state.state.patches.version == 4


def test_a_client_away_for_long_fetches_the_whole_patch_once() -> None:
    """Never more than the dense matrices, however many increments it missed."""
    zero, one = tiny.clients(4, 4)
    run_state, _ = go(METHODS["flora"](), [[zero]] * 12)
    _, record = tiny.run_round(METHODS["flora"](), run_state, [one], tiny.fake_work)
    whole = sum(m * n for m, n in tiny.SHAPES.values())
    assert record["bytes_down"] == 4 * (whole + HEAD)


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_what_a_client_adds_up_from_the_news_is_the_whole_patch(name: str) -> None:
    """`seen` is kept by client id: for a client that was away, base + all news received = base + patch."""
    people = tiny.clients(2, 2, 2)
    method = METHODS[name]()
    held: dict[str, dict[str, torch.Tensor]] = {c.client_id: {} for c in people}

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        own = held[client.client_id]
        if len(sent.news) == 1 and sent.news[0] is sent.patch:
            own.clear()  # the whole patch takes the place of what was held
        for patch in sent.news:
            for module, p in patch.items():
                own[module] = own.get(module, 0) + (p.dense() if isinstance(p, LowRank) else p)
        for module, p in sent.patch.items():
            whole = p.dense() if isinstance(p, LowRank) else p
            torch.testing.assert_close(own[module], whole, rtol=1e-4, atol=1e-4)
        return tiny.fake_work(client, sent, round_num)

    zero, one, two = people
    go(
        method,
        [[zero], [one, two], [zero, two], [two], [one], [zero, one, two], [two], [two], [two], [zero], [one]],
        work,
    )


def test_what_a_client_keeps_depends_on_nobody_else() -> None:
    """The unshared weights of clients that are simulated one after another do not leak."""
    people = tiny.clients(2, 4, 3)
    together, _ = go(METHODS["local"](), [people] * 3)
    for client in people:
        alone, _ = go(METHODS["local"](), [[client]] * 3, start=tiny.run_state(METHODS["local"](), 4))
        tiny.same(alone.client_states[client.client_id], together.client_states[client.client_id])
    assert set(together.client_states) == {c.client_id for c in people}


def test_a_client_goes_on_from_its_own_weights() -> None:
    started: dict[tuple[str, int], Broadcast] = {}

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        started[client.client_id, round_num] = sent
        return tiny.fake_work(client, sent, round_num)

    people = tiny.clients(2, 3)
    run_state, _ = go(METHODS["local"](), [people], work)
    go(METHODS["local"](), [people], work, start=run_state)
    for client in people:
        kept = run_state.client_states[client.client_id]
        for module, f in started[client.client_id, 1].adapter.items():
            assert torch.equal(f.a, kept[f"{module}/a"])
            assert torch.equal(f.b, kept[f"{module}/b"])
            assert f.rank == client.rank


def test_hetlora_keeps_a_pruned_rank_for_good() -> None:
    """A client whose tail shrank trains fewer components from then on; the others keep theirs."""
    people = tiny.clients(4, 4)
    ranks: list[tuple[str, int, int]] = []

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        rank = sent.adapter["one"].rank
        ranks.append((client.client_id, round_num, rank))
        result = tiny.fake_work(client, sent, round_num)
        if client.client_id == "client-0" and round_num in (1, 2):  # give the tail up
            modules = {}
            for name, f in sent.adapter.items():
                moved = result.update.factors(name)
                tail = int(0.75 * rank)
                modules[name] = replace(moved, b=torch.cat([moved.b[:, :tail], 0.01 * f.b[:, tail:]], dim=1))
            result = replace(result, update=replace(result.update, modules=modules))
        return result

    method = METHODS["hetlora"](gamma=0.75)
    go(method, [people] * 5, work)
    assert [r for c, _, r in ranks if c == "client-0"] == [4, 4, 3, 2, 2]
    assert [r for c, _, r in ranks if c == "client-1"] == [4] * 5


def test_the_same_question_is_answered_once() -> None:
    """Clients of equal rank that hold the same are sent the same broadcast, worked out once."""
    method = METHODS["glora"]()
    asked: list[Request] = []

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        asked.append(request)
        return method.broadcast(state, request)

    go(replace(method, broadcast=broadcast), [tiny.clients(2, 4, 2, 2, 4)])
    assert sorted(r.rank or 0 for r in asked) == [2, 4]


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_weights_are_by_examples_or_equal(weighting: str) -> None:
    people = tiny.clients(2, 2, sizes=(30, 10))
    method = METHODS["fedit"]()
    start = tiny.run_state(method, 2)
    run_state, record = tiny.run_round(method, start, people, tiny.fake_work, weighting=weighting)
    sent = method.broadcast(start.state, Request(2))
    shares = (0.75, 0.25) if weighting == "examples" else (0.5, 0.5)
    heads = [tiny.fake_work(c, sent, 0).update.dense["head"] for c in people]
    torch.testing.assert_close(run_state.state.dense["head"], shares[0] * heads[0] + shares[1] * heads[1])
    assert record["train_loss"] == 1.0


def test_the_loss_of_a_round_is_weighted_like_its_updates() -> None:
    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        return replace(tiny.fake_work(client, sent, round_num), train_loss=float(client.client_id[-1]))

    _, (record,) = go(METHODS["fedit"](), [tiny.clients(2, 2, sizes=(30, 10))], work)
    assert record["train_loss"] == pytest.approx(0.25)


def test_a_round_of_two_exchanges_trains_once_and_asks_twice() -> None:
    """First the largest entry of everybody's update, then the updates divided by it: what is kept is bounded by 1."""
    base = METHODS["fedit"]()
    calls: list[tuple[str, str, int]] = []

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        calls.append(("broadcast", "", state.exchange))
        sent = base.broadcast(state, request)
        return sent if state.exchange == 0 else replace(sent, dense={"largest": state.dense["largest"]})

    def encode(update: Update, sent: Broadcast, kept: Any) -> tuple[Update, Any]:
        calls.append(("encode", update.client_id, len(sent.adapter)))
        entries = max(float(update.factors(n).a.abs().max()) for n in update.modules)
        if "largest" not in sent.dense:
            return replace(update, modules={}, dense={"largest": torch.tensor([entries])}), kept
        scale = float(sent.dense["largest"])
        return replace(
            update, dense={}, modules={n: Vector({"a": update.factors(n).a / scale}) for n in update.modules}
        ), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, dict[str, float]]:
        if state.exchange == 0:
            largest = torch.stack([u.num_examples * torch.ones(1) for u in partial.collected]).sum()
            assert float(largest) == partial.weight == 30.0
            return replace(state, exchange=1, dense={**state.dense, "largest": 2 * partial.mean_dense()["largest"]}), {}
        means = {name: {**state.modules[name], "a": partial.mean(name)["a"]} for name in state.modules}
        return advance(state, modules=means, dense={"head": state.dense["head"]}), {"second": 1.0}

    method = replace(
        base,
        broadcast=broadcast,
        encode=encode,
        finish=finish,
        exchanges=(Exchange(COLLECT), Exchange(SUM, ask="again")),
    )
    trained: list[str] = []

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        trained.append(client.client_id)
        return tiny.fake_work(client, sent, round_num)

    run_state, (record,) = go(method, [tiny.clients(2, 2)], work)
    assert trained == ["client-0", "client-1"]
    assert [c[2] for c in calls if c[0] == "broadcast"] == [0, 1]
    assert [c[1] for c in calls if c[0] == "encode"] == ["client-0", "client-1"] * 2
    assert all(float(held["a"].abs().max()) <= 1 for held in run_state.state.modules.values())
    assert (run_state.state.round_num, run_state.state.exchange) == (1, 0)
    assert record["second"] == 1.0
    # Up: one number each, then A each. Down: factors and head, then the factors again and one number.
    rank_a, both = 2 * sum(n for _, n in tiny.SHAPES.values()), 2 * WIDTH
    assert record["bytes_up"] == 4 * 2 * (1 + rank_a)
    assert record["bytes_down"] == 4 * 2 * (both + HEAD + both + 1)


def test_progress_is_told_client_by_client() -> None:
    progress: list[tuple[str, int]] = []
    method = METHODS["fedit"]()
    tiny.run_round(
        method,
        tiny.run_state(method, 2),
        tiny.clients(2, 2, 2),
        tiny.fake_work,
        on_client=lambda client, result, done: progress.append((client.client_id, done)),
    )
    assert progress == [("client-0", 1), ("client-1", 2), ("client-2", 3)]


def test_the_server_holds_no_more_than_it_says() -> None:
    """The peak is at least what state and updates weigh, and far below the dense matrices of a factor method."""
    shapes = {f"layer{i}": (2048, 2048) for i in range(4)}
    method = METHODS["glora"]()
    people = tiny.clients(4, 4, 4)
    _, record = tiny.run_round(method, tiny.run_state(method, 4, shapes), people, tiny.fake_work)
    updates = 3 * 4 * 4 * (2048 + 2048) * 4  # clients × layers × rank × (m + n) × bytes
    assert updates < record["peak_server_bytes"] < updates + 2048 * 2048 * 4


@pytest.mark.parametrize("name", ["glora", "hetlora", "local", "fedavg"])
def test_clients_start_in_windows_that_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    people = tiny.clients(*[4] * 7)
    method = METHODS[name]()
    whole, (record,) = go(method, [people])
    windows: list[list[str]] = []

    def work(window: Sequence[tuple[Client, Broadcast]], round_num: int) -> Iterator[tuple[LocalResult, float]]:
        windows.append([client.client_id for client, _ in window])
        for client, sent in window:
            yield tiny.fake_work(client, sent, round_num), 2.0

    monkeypatch.setattr(simulated, "WINDOW", 3)
    cut, again = rounds.run_round(method, tiny.run_state(method, 4), people[::-1], work)
    tiny.same_standing(whole, cut)
    assert [len(window) for window in windows] == [3, 3, 1]
    assert [client for window in windows for client in window] == sorted(c.client_id for c in people)
    assert (again["bytes_up"], again["train_loss"]) == (record["bytes_up"], record["train_loss"])
    assert again["client_seconds"] >= 14.0  # what the workers say, and the encoding
    assert 0 < again["train_wall_seconds"] < 14.0


def test_what_a_client_learnt_is_let_go_once_it_is_folded() -> None:
    """A sum over many clients holds one of them at a time."""
    held: list[weakref.ref[LocalResult]] = []
    most = 0

    def work(window: Sequence[tuple[Client, Broadcast]], round_num: int) -> Iterator[tuple[LocalResult, float]]:
        nonlocal most
        for client, sent in window:
            result = Kept(*astuple_shallow(tiny.fake_work(client, sent, round_num)))
            held.append(weakref.ref(result))
            yield result, 0.0
            del result
            most = max(most, sum(ref() is not None for ref in held))

    rounds.run_round(METHODS["fedit"](), tiny.run_state(METHODS["fedit"](), 4), tiny.clients(*[4] * 6), work)
    assert most <= 2


class Kept(LocalResult):
    """A result that can be referred to weakly."""


def astuple_shallow(result: LocalResult) -> tuple[Any, ...]:
    return result.update, result.train_loss, result.steps


def test_whoever_answers_for_too_few_is_found_out() -> None:
    method = METHODS["fedit"]()
    with pytest.raises(ValueError, match="zip"):
        rounds.run_round(method, tiny.run_state(method, 4), tiny.clients(4, 4), lambda window, number: [])


KEEPING = ("scaffold", "hetlora", "fedsa_lora")
"""Methods whose clients keep something between rounds."""


def screened_round(
    method: Method,
    run_state: RunState,
    people: list[Client],
    rejected: Set[str] = frozenset(),
    unused: Set[str] = frozenset(),
) -> RunState:
    """A round whose filter rejects some clients and does not choose others."""

    def screen(updates: Sequence[Update], sent: Sequence[Broadcast], *, ask: str = "train", bad: int = 0) -> Screened:
        kept = [u for u in updates if u.client_id not in rejected | unused]
        return Screened(kept, dict.fromkeys(rejected, "looks wrong"))

    def work(window: Sequence[tuple[Client, Broadcast]], round_num: int) -> Iterator[tuple[LocalResult, float]]:
        return ((tiny.fake_work(client, sent, round_num), 0.0) for client, sent in window)

    sites = simulated.SimulatedClients(method, work, run_state.client_states, weighting="equal")
    return rounds.conduct(method, run_state, people, sites, screen=screen)[0]


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("way", ["rejected", "unused"])
def test_what_was_not_counted_did_not_happen(name: str, way: str) -> None:
    """A client whose answer a filter rejects, or does not choose, keeps the state it had: in its first round none."""
    method, people = METHODS[name](), tiny.clients(4, 4, 4)
    first = screened_round(method, tiny.run_state(method, 4), people, **{way: {"client-1"}})
    assert sorted(first.client_states) == ["client-0", "client-2"]
    assert sorted(first.counted) == ["client-0", "client-2"]
    second = screened_round(method, first, people)
    third = screened_round(method, second, people, **{way: {"client-1"}})
    assert sorted(third.client_states) == ["client-0", "client-1", "client-2"]
    for client_id, state in second.client_states.items():
        same = all(torch.equal(x, third.client_states[client_id][key]) for key, x in state.items())
        assert same or client_id != "client-1"
        assert not same or client_id == "client-1" or name == "hetlora"
    assert third.counted == {"client-0": 3, "client-1": 2, "client-2": 3}


@pytest.mark.parametrize("way", ["rejected", "unused"])
def test_scaffold_s_control_variate_stays_the_mean_of_the_clients_own(way: str) -> None:
    """Five rounds of all three clients at equal weights, one of them left out now and then: c = Σ c_k / N."""
    method, people = METHODS["scaffold"](), tiny.clients(4, 4, 4)
    start = tiny.run_state(method, 4)
    run_state = replace(start, state=replace(start.state, template=replace(start.state.template, num_clients=3)))
    for number in range(5):
        run_state = screened_round(method, run_state, people, **{way: {"client-2"} if number in (0, 2, 3) else set()})
        for name, c in run_state.state.extra.items():
            own = [kept[name] for kept in run_state.client_states.values() if name in kept]
            torch.testing.assert_close(c, torch.stack(own).sum(dim=0) / 3, rtol=1e-4, atol=1e-5)
