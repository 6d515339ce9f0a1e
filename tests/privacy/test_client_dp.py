"""The change that one client adds to a sum is bounded, the noise is what it claims to be, and nothing else changes."""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.federations import build
from tiny import fake_work, run_state, same_state

from fedspan.client.training import LocalResult
from fedspan.methods import METHODS
from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Factors, Recipe, Request, Template, Update, Vector
from fedspan.privacy.client_dp import refusal, with_client_dp
from fedspan.privacy.gaussian import normal, uniform
from fedspan.privacy.secret_file import kept_secret

SECRET = 0x5EC12E7
ABLE = [name for name, factory in METHODS.items() if refusal(factory()) is None]
OPTIONS: Mapping[str, Mapping[str, Any]] = {"shared_galore": {"rank": 3}, "fedftg": {"galore_rank": 3}}


def make(name: str, clip: float = 1e9, noise: float = 0.0, expected: float = 3.0, secret: int = SECRET) -> Method:
    return with_client_dp(METHODS[name](**OPTIONS.get(name, {})), clip, noise, expected, lambda: secret)


def plain(name: str) -> Method:
    return METHODS[name](**OPTIONS.get(name, {}))


def play(
    method: Method, state: ServerState, ranks: Sequence[int], first: int = 0
) -> tuple[ServerState, list[list[Update]]]:
    """One round over clients of these ranks, every client counting 1: the state after it, and what was sent."""
    sent_by_exchange: list[list[Update]] = []
    held: dict[int, LocalResult] = {}
    clients = [_Client(f"client-{first + k}") for k in range(len(ranks))]
    for number, exchange in enumerate(method.exchanges):
        if not exchange.due(state.round_num):
            continue
        state, partial, sent_now = replace(state, exchange=number), Partial(), []
        for k, rank in enumerate(ranks):
            sent = method.broadcast(state, Request(rank))
            if exchange.ask != "again":
                asked = replace(sent, recipe=replace(sent.recipe, gradient=exchange.ask == "gradient"))
                held[k] = fake_work(clients[k], asked, state.round_num)
            update, _ = method.encode(held[k].update, sent, None)
            sent_now.append(update)
            partial = exchange.fold.add(partial, replace(update, num_examples=1.0))
        sent_by_exchange.append(sent_now)
        state, _ = method.finish(state, partial)
    return state, sent_by_exchange


class _Client:
    def __init__(self, client_id: str) -> None:
        self.client_id = client_id


def norm(update: Update) -> float:
    """Of everything that was sent, in float64."""
    held = list(update.dense.values())
    for payload in update.modules.values():
        assert isinstance(payload, Vector)
        held += list(payload.values.values())
    return math.sqrt(sum(float(x.double().square().sum()) for x in held))


def vector(state: ServerState) -> torch.Tensor:
    """The server's weights as one vector."""
    tensors = [t for n in sorted(state.modules) for _, t in sorted(state.modules[n].items())]
    return torch.cat([t.double().flatten() for t in (*tensors, *(state.dense[n] for n in sorted(state.dense)))])


def close_states(x: ServerState, y: ServerState, tolerance: float) -> None:
    for held, other in ((x.modules, y.modules), ({"": x.dense}, {"": y.dense})):
        assert held.keys() == other.keys()
        for module in held:
            for name in held[module]:
                torch.testing.assert_close(held[module][name], other[module][name], rtol=tolerance, atol=tolerance)


def test_the_methods_that_can_are_the_exact_ones_in_sums() -> None:
    assert {"ffa_lora", "fed_sb", "fedsvd", "rolora", "fedavg", "fedftg", "shared_galore", "glora_sums"} <= set(ABLE)
    for name in ("fedit", "hetlora", "scaffold", "fedsa_lora", "local", "centralised", "glora", "fedrot_lora"):
        reason = refusal(METHODS[name]())
        assert reason is not None, name
        with pytest.raises(ValueError, match=rf"^client-level privacy: {name}: "):
            make(name)


@pytest.mark.parametrize("name", ABLE)
def test_without_noise_and_with_room_it_is_the_method_itself(name: str) -> None:
    """Clip 1e9, z = 0, everybody expected and there: two rounds end where the plain method with equal weights ends."""
    state, private = (run_state(plain(name), 3).state for _ in range(2))
    for _ in range(2):
        state, _ = play(plain(name), state, [3, 3, 3])
        private, _ = play(make(name), private, [3, 3, 3])
    # In glora_sums a basis is computed from float32 sums that were added up in another order.
    close_states(private, state, 1e-3 if name == "glora_sums" else 2e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_method_is_not_told_how_many_took_part(count: int) -> None:
    """Nothing after the noise may depend on that: the rule sees qN clients of weight 1 in all, whoever came."""
    seen: list[tuple[int, float]] = []
    rule = plain("ffa_lora")

    def finish(state: ServerState, partial: Partial) -> Any:
        seen.append((partial.num_clients, partial.weight))
        return rule.finish(state, partial)

    private = with_client_dp(replace(rule, finish=finish), 1e9, 0.0, 3.0, lambda: SECRET)
    play(private, run_state(rule, 3).state, [3] * count)
    assert seen == [(3, 1.0)]


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("clip", [1e-3, 0.7])
def test_nobody_sends_more_than_the_clip(name: str, clip: float) -> None:
    state = run_state(plain(name), 4).state
    clipped = 0
    for _ in range(2):
        state, sent = play(make(name, clip), state, [4, 4])
        for update in (u for exchange in sent for u in exchange):
            assert norm(update) <= clip, name
            clipped += norm(update) > clip * (1 - 1e-5)
            assert update.num_examples == 1.0
            assert not update.moments
    assert clipped


@pytest.mark.parametrize("name", ABLE)
def test_a_round_without_anybody_is_a_step_of_noise(name: str) -> None:
    """Two rounds with nobody: every state has the method's shapes, is finite, and the noise has moved it."""
    method, state = make(name, 0.5, 1.0), run_state(plain(name), 3).state
    shapes = _shapes(play(plain(name), state, [3])[0])
    for _ in range(2):
        before, (state, _) = state, play(method, state, [])
        assert state.round_num == before.round_num + 1
        assert _shapes(state) == shapes
        assert bool(torch.isfinite(vector(state)).all())
    first = run_state(plain(name), 3).state
    assert not torch.equal(vector(state)[-12:], vector(first)[-12:])  # the head


def _shapes(state: ServerState) -> dict[str, tuple[int, ...]]:
    shapes = {f"{n}/{part}": tuple(t.shape) for n, held in state.modules.items() for part, t in held.items()}
    return shapes | {name: tuple(t.shape) for name, t in state.dense.items()}


def test_mixed_ranks_move_what_they_train_and_nothing_else() -> None:
    """FFA-LoRA at ranks 2 and 4: the mean of the changes of the products, those of rank 2 counting in its two alone."""
    state = play(plain("ffa_lora"), run_state(plain("ffa_lora"), 4).state, [4, 4])[0]
    after, _ = play(make("ffa_lora", expected=2.0), state, [2, 4])
    for name, held in state.modules.items():
        want = held["sb"].double().clone()
        for k, rank in enumerate((2, 4)):
            sent = plain("ffa_lora").broadcast(state, Request(rank))
            trained = fake_work(_Client(f"client-{k}"), sent, 1).update.factors(name)
            change = trained.scaling * (trained.b - sent.adapter[name].b).double()
            want[:, :rank] += change / 2
        torch.testing.assert_close(after.modules[name]["sb"].double(), want, rtol=1e-5, atol=1e-5)


sizes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 5))


@settings(max_examples=40, deadline=None)
@given(size=sizes, seed=st.integers(0, 2**31), condition=st.sampled_from([1.0, 1e3, 1e6]))
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_norm_is_that_of_the_product(size: tuple[int, int, int], seed: int, condition: float, scale: float) -> None:
    """‖v‖ = ‖s·ΔB·A‖_F to 1e-9 relative, in every gauge (condition up to 1e6) and at every scaling, ranks above n too;
    and the clipped product is the same matrix to 1e-9, though the factors are not."""
    m, n, r = size
    rng = np.random.default_rng(seed)
    a, change, g = rng.standard_normal((r, n)), rng.standard_normal((m, r)), _gauge(rng, r, condition)
    truth = np.linalg.norm(change @ a)
    products = []
    for fixed, moved, s in ((a, change, 1.0), (np.linalg.solve(g, a), change @ g / scale, scale)):
        sent = _one_factor(np.zeros((m, r)), fixed, s)
        method = make("ffa_lora", clip=0.5 * truth, expected=1.0)
        answer, _ = method.encode(_trained(moved, fixed, s), sent, None)
        measured, _ = make("ffa_lora").encode(_trained(moved, fixed, s), sent, None)
        assert norm(measured) == pytest.approx(truth, rel=1e-9)
        assert norm(answer) == pytest.approx(0.5 * truth, rel=2e-6)
        assert norm(answer) <= 0.5 * truth
        state = ServerState(
            Template({"x": (m, n)}, r, s * r), {"x": {"a": torch.tensor(fixed), "sb": torch.zeros(m, r).double()}}, {}
        )
        after, _ = method.finish(state, method.exchanges[0].fold.add(Partial(), answer))
        products.append(after.modules["x"]["sb"].numpy() @ fixed)
    for product in products:
        want = change @ a * 0.5 * (1 - 2.0**-20)
        assert np.linalg.norm(product - want) <= 1e-9 * truth


def _one_factor(b: Any, a: Any, s: float) -> Broadcast:
    return Broadcast({"x": Factors(torch.tensor(b), torch.tensor(a), s)}, {}, Recipe(train_a=False))


def _trained(b: Any, a: Any, s: float) -> Update:
    return Update("client-0", 1.0, {"x": Factors(torch.tensor(b), torch.tensor(a), s)}, {})


def _gauge(rng: np.random.Generator, rank: int, condition: float) -> Any:
    left, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    right, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    return left * np.logspace(0, -np.log10(condition), rank) @ right


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num=st.integers(1, 4),
    clip=st.sampled_from([1e-3, 0.3, 5.0]),
    size=st.sampled_from([1e-6, 1.0, 1e12]),
    name=st.sampled_from(["ffa_lora", "rolora", "fedsvd", "fedavg", "fedadam"]),
)
def test_one_client_more_moves_the_sum_by_at_most_the_clip(
    seed: int, num: int, clip: float, size: float, name: str
) -> None:
    """Add/remove sensitivity of the whole un-noised sum, over random updates of any size."""
    base = METHODS[name]()
    fed = build(base, seed=seed, ranks=(3,) * (num + 1), counts=(1.0,) * (num + 1))
    method, fold = with_client_dp(base, clip, 0.0, 1.0, lambda: SECRET), base.exchanges[0].fold
    sent = method.broadcast(fed.state, Request(3))
    partials = [Partial()]
    for update in fed.updates:
        big = replace(
            update,
            dense={n: t * size for n, t in update.dense.items()},
            modules={n: replace(update.factors(n), b=update.factors(n).b * size) for n in update.modules},
        )
        if not sent.recipe.train_b and sent.adapter:
            big = update
        partials.append(fold.add(partials[-1], method.encode(big, sent, None)[0]))
    assert _distance(partials[-1], partials[-2]) <= clip * (1 + 1e-6)


def _distance(x: Partial, y: Partial) -> float:
    def flat(p: Partial) -> dict[str, torch.Tensor]:
        return {**p.dense, **{f"{n}/{part}": t for n, held in p.sums.items() for part, t in held.items()}}

    one, other = flat(x), flat(y)
    gaps = [t.double() - other[n].double() if n in other else t.double() for n, t in one.items()]
    return math.sqrt(sum(float(gap.square().sum()) for gap in gaps))


SHAPES = {"one": (64, 40), "two": (48, 48)}


@pytest.mark.parametrize(("name", "expected"), [("fedavg", 3.0), ("fedftg", 0.25)])
def test_the_noise_on_weights_has_the_variance_it_claims(name: str, expected: float) -> None:
    """n = 4876 entries, N(0, (zC/qN)²) each: mean within 5/√n of 0, variance within 5·√(2/n) of 1, kurtosis 3."""
    clip, z = 0.7, 1.3
    state = run_state(plain(name), 4, SHAPES).state
    bare, noisy = (play(make(name, clip, noise, expected), state, [4, 4])[0] for noise in (0.0, z))
    gap = (vector(noisy) - vector(bare)) / (z * clip / expected)
    n = len(gap)
    assert n == 64 * 40 + 48 * 48 + 12
    assert abs(float(gap.mean())) < 5 / math.sqrt(n)
    assert abs(float(gap.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(gap.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)


def test_the_noise_on_a_factor_is_isotropic_on_products() -> None:
    """On B alone of a badly conditioned A (1e4): the noise of s·B·A has variance (zC)² along every direction of row(A),
    n = 64·6 each within 5σ; on B's own entries it has not."""
    m, n, r, clip, z = 64, 40, 6, 0.5, 2.0
    rng = np.random.default_rng(3)
    a = _gauge(rng, r, 1e4) @ rng.standard_normal((r, n))
    state = ServerState(
        Template({"x": (m, n)}, r, 8.0), {"x": {"a": torch.tensor(a), "sb": torch.zeros(m, r).double()}}, {}
    )
    samples = []
    for secret in range(40):
        method = make("ffa_lora", clip, z, 1.0, secret)
        after, _ = method.finish(state, Partial())
        samples.append(after.modules["x"]["sb"].double().numpy())
    q = np.linalg.qr(a.T)[0]
    along = np.stack([sb @ a @ q for sb in samples]) / (z * clip)  # (40, m, r)
    count = along[..., 0].size
    assert np.abs((along**2).mean(axis=(0, 1)) - 1).max() < 5 * math.sqrt(2 / count)
    together = np.corrcoef(along.reshape(-1, r).T) - np.eye(r)
    assert np.abs(together).max() < 5 / math.sqrt(count)
    spread = np.stack(samples).std(axis=(0, 1))
    assert spread.max() / spread.min() > 3


def test_noise_depends_on_the_secret_and_on_the_sum() -> None:
    """The same sum and secret: the same bits. Another secret, round, or sum: independent noise."""
    state = run_state(plain("ffa_lora"), 4).state
    once, _ = play(make("ffa_lora", 0.5, 1.0), state, [4, 4])
    again, _ = play(make("ffa_lora", 0.5, 1.0), state, [4, 4])
    same_state(once, again)
    noises = []
    for secret, number, first in ((SECRET, 0, 0), (SECRET + 1, 0, 0), (SECRET, 1, 0), (SECRET, 0, 5)):
        start = replace(state, round_num=number)
        bare, noisy = (play(make("ffa_lora", 0.5, z, 3.0, secret), start, [4, 4], first)[0] for z in (0.0, 1.0))
        noises.append(vector(noisy) - vector(bare))
    for number in (0, 1):  # nobody came in either round: the same sum
        after, _ = make("ffa_lora", 0.5, 1.0).finish(replace(state, round_num=number), Partial())
        noises.append(vector(after) - vector(state))
    for i, x in enumerate(noises):
        for y in noises[i + 1 :]:
            assert abs(float(torch.nn.functional.cosine_similarity(x, y, dim=0))) < 5 / math.sqrt(int((x != 0).sum()))


def test_weights_other_than_one_are_refused() -> None:
    method, state = make("fedavg", 1.0, 1.0), run_state(plain("fedavg"), 3).state
    sent = method.broadcast(state, Request(3))
    answer, _ = method.encode(fake_work(_Client("client-0"), sent, 0).update, sent, None)
    partial = method.exchanges[0].fold.add(Partial(), replace(answer, num_examples=40.0))
    with pytest.raises(ValueError, match=r"expected every client to count 1 \(federation.weighting = 'equal'\)"):
        method.finish(state, partial)


def test_a_site_has_no_secret_and_draws_no_noise() -> None:
    state = run_state(plain("fedavg"), 3).state
    site = with_client_dp(plain("fedavg"), 0.5, 1.0, 1.0)
    sent = site.broadcast(state, Request(3))
    update = fake_work(_Client("client-0"), sent, 0).update
    tiny.same(
        site.encode(update, sent, None)[0].dense, make("fedavg", 0.5, 1.0, 1.0).encode(update, sent, None)[0].dense
    )
    with pytest.raises(ValueError, match="the server has no secret"):
        site.finish(state, Partial())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip": 0.0}, "clip = 0.0"),
        ({"noise": -1.0}, "noise_multiplier = -1.0"),
        ({"expected": 0.0}, "expected = 0.0"),
    ],
)
def test_what_is_out_of_range_is_refused(changes: Mapping[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}: expected "):
        make("ffa_lora", **changes)


def test_a_diverged_update_is_seen() -> None:
    """NaN stays NaN, so that the checks on what leaves a site still refuse it."""
    state = run_state(plain("fedavg"), 3).state
    sent = make("fedavg").broadcast(state, Request(3))
    update = fake_work(_Client("client-0"), sent, 0).update
    for bad in (math.nan, math.inf):
        dense = {n: torch.full_like(t, bad) for n, t in update.dense.items()}
        answer, _ = make("fedavg", 1.0).encode(replace(update, dense=dense), sent, None)
        assert not all(bool(torch.isfinite(t).all()) for t in answer.dense.values())


def test_a_secret_is_drawn_once_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "privacy" / "secret"
    ask = kept_secret(path)
    assert not path.exists()
    first = ask()
    assert first == ask() == kept_secret(path)()
    assert first.bit_length() > 200
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["secret"]
    assert kept_secret(tmp_path / "other")() != first
    # The beginning of the secret is a number too, and everyone could guess it.
    for damaged in ("not hexadecimal", path.read_text(encoding="ascii")[:6], ""):
        path.write_text(damaged, encoding="ascii")
        with pytest.raises(ValueError, match="is damaged: expected 64 hexadecimal digits"):
            ask()


def test_the_stream_is_uniform_and_its_transform_normal() -> None:
    """n = 200 000: moments within 5σ, tails as often as they should be, keys independent."""
    n = 200_000
    u = uniform(SECRET, "u", count=n)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    x, y = normal(SECRET, "x", shape=(n,)), normal(SECRET, "y", shape=(n,))
    assert abs(float(x.mean())) < 5 / math.sqrt(n)
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((x * y).mean())) < 5 / math.sqrt(n)
    assert abs(float((x[: n // 2] * x[n // 2 :]).mean())) < 5 / math.sqrt(n / 2)
    for edge in (1.0, 2.0, 3.0):
        p = math.erfc(edge / math.sqrt(2))
        assert abs(float((x.abs() > edge).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert normal(SECRET, "odd", shape=(3, 5)).shape == (3, 5)
