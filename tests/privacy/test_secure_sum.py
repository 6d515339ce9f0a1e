"""Secure sums: the server gets the sum and nothing else, and clients that cheat or fail are noticed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from honest_sums import NAMES, SESSION, Run, plain, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.privacy import primitives
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.secure_sum import (
    Aggregator,
    Participant,
    RoundAggregator,
    RoundParticipant,
    SumFailed,
    sum_in_process,
)


def test_the_sum_is_the_plain_sum_to_the_bit() -> None:
    """Over words of any size, more of them than one piece of mask, and an odd number."""
    values = vectors(4, (1 << 15) + 3)
    assert np.array_equal(sum_in_process(values, 3, SESSION), plain(values))


def test_real_numbers_come_out_as_without_masks() -> None:
    point = FixedPoint()
    numbers = torch.randn((5, 100), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = {name: point.encode(row, 5) for name, row in zip(NAMES, numbers, strict=False)}
    total = point.decode(sum_in_process(values, 3, SESSION))
    assert torch.equal(total, point.decode(plain(values)))
    torch.testing.assert_close(total, numbers.sum(0), rtol=0, atol=5 * 2.0**-33 + 1e-12)


def test_what_a_client_brought_is_left_as_it_is() -> None:
    values = vectors(3, 10)
    before = {name: vector.copy() for name, vector in values.items()}
    sum_in_process(values, 2, SESSION)
    assert all(np.array_equal(values[name], before[name]) for name in values)


STAGES = ("advertise", "share", "mask", "unmask", "never")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_drop_outs_that_leave_enough_are_recovered_and_one_more_ends_the_sum(data: st.DataObject) -> None:
    """Any clients drop out, before any of the four round trips; n up to 7 and every threshold that is a majority."""
    n = data.draw(st.integers(2, 7))
    t = data.draw(st.integers(max(2, n // 2 + 1), n))
    drops = {name: data.draw(st.sampled_from(STAGES)) for name in NAMES[:n]}
    values = vectors(n, 3, seed=n)
    server = Aggregator(SESSION, t, 3)
    clients = {name: Participant(SESSION, name, 3) for name in values}

    def still(stage: str) -> list[str]:
        return [name for name in values if STAGES.index(drops[name]) > STAGES.index(stage)]

    def run() -> Words:
        keys = server.keys({name: clients[name].advertise() for name in still("advertise")})
        handed = server.route({name: clients[name].share(keys, t) for name in still("share")})
        for name in still("mask"):
            server.add(name, clients[name].mask(values[name], handed[name]))
        survivors = server.survivors()
        return server.total({name: clients[name].unmask(survivors) for name in still("unmask")})

    if len(still("unmask")) >= t:
        assert np.array_equal(run(), plain({name: values[name] for name in still("mask")}))
    else:
        stage = next(stage for stage in STAGES if len(still(stage)) < t)
        with pytest.raises(SumFailed, match=rf"^{len(still(stage))} clients .*, {t} were needed"):
            run()


@pytest.mark.parametrize(("num_clients", "threshold"), [(3, 2), (5, 3), (7, 5)])
def test_exactly_n_minus_t_may_be_lost_in_any_mixture(num_clients: int, threshold: int) -> None:
    values, spare = vectors(num_clients, 4), num_clients - threshold
    for num_lost in range(spare + 1):
        lost, late = NAMES[:num_lost], NAMES[num_lost:spare]
        total = sum_in_process(values, threshold, SESSION, lost=lost, late=late)
        assert np.array_equal(total, plain({name: v for name, v in values.items() if name not in lost}))
        with pytest.raises(SumFailed, match=f"{threshold - 1} clients .*, {threshold} were needed"):
            sum_in_process(values, threshold, SESSION, lost=lost, late=(*late, NAMES[spare]))


def test_too_few_survivors_reveal_nothing() -> None:
    """The server cannot ask, and if it asks nevertheless, no client answers."""
    run = Run()
    run.masked(lost=NAMES[:2])
    with pytest.raises(SumFailed, match="2 clients sent their vectors, 3 were needed"):
        run.server.survivors()
    for name in NAMES[2:4]:
        with pytest.raises(ValueError, match="2 survivors: expected at least 3"):
            run.clients[name].unmask(NAMES[2:4])
    with pytest.raises(SumFailed):
        run.server.total({})


# What the server sees.


def chi_square(words: Words) -> float:
    """Σ (observed - expected)²/expected over the 256 byte values: 255 ± √510 for uniform bytes."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("value", [0, 1, 2**64 - 1])
def test_masked_vectors_are_uniform_whatever_is_in_them(value: int) -> None:
    """n = 800,000 bytes a client; χ² over the byte values, and in each of the 8 places; 5σ: |χ² - 255| < 113.

    So is the difference of any two clients' vectors, and the sum of all but one: no two share a mask that cancels.
    """
    seen: dict[str, Words] = {}
    values = {name: np.full(100_000, value, np.uint64) for name in NAMES[:4]}
    sum_in_process(values, 3, SESSION, watch=lambda name, masked: seen.update({name: masked}))
    looks = list(seen.values())
    looks += [seen[x] - seen[y] for x, y in combinations(seen, 2)] + [
        seen[x] + seen[y] for x, y in combinations(seen, 2)
    ]
    looks += [plain({n: v for n, v in seen.items() if n != name}) for name in seen]
    bound = 5 * 510**0.5
    assert chi_square(np.full(100_000, value, np.uint64)) > 255 + bound  # the test can fail
    for words in looks:
        assert abs(chi_square(words) - 255) < bound
        for place in range(8):
            column = np.ascontiguousarray(words.view(np.uint8)[place::8])
            assert abs(chi_square(column) - 255) < bound
        assert len(np.unique(words)) == len(words)  # 64-bit words: two equal ones have probability below 1e-9


def test_two_runs_with_the_same_input_share_nothing() -> None:
    """Not one word of 8 bytes, in the vectors or in the messages; the session may even be the same."""
    words: list[set[bytes]] = []
    for _ in range(2):
        run = Run(values={name: np.zeros(1000, np.uint64) for name in NAMES[:4]}, num_words=1000)
        masked = run.masked()
        survivors = run.server.survivors()
        answers = [run.clients[name].unmask(survivors)[32:] for name in survivors]
        adverts = [one.advertise()[32:] for one in run.clients.values()]
        content = b"".join([*(v.tobytes() for v in masked.values()), *answers, *adverts])
        words.append({content[i : i + 8] for i in range(0, len(content), 8)})
    assert not words[0] & words[1]


def test_a_client_cannot_be_unmasked_from_fewer_shares_than_the_threshold() -> None:
    """No t-1 shares of the seed give it; any t do, and then only the masks shared with others still cover it."""
    run = Run(5, 3)
    masked = run.masked()
    target, session, roster = run.names[0], run.session, run.server._roster
    assert roster is not None
    survivors = run.server.survivors()
    shares = {name: run.clients[name].unmask(survivors)[32 : 32 + 32] for name in survivors}
    places = {roster.share_index(name): share for name, share in shares.items()}

    def own_mask(some: tuple[int, ...]) -> Words:
        seed = primitives.combine({place: places[place] for place in some})
        fits.append(
            primitives.derive(seed, b"commitment", session, target.encode()) == roster.adverts[target].commitment
        )
        mask = np.zeros(run.num_words, np.uint64)
        primitives.add_masks(mask, [roster.self_mask_key(seed, target, roster.binding(b"", run.names))], [])
        return mask

    fits: list[bool] = []
    for size in (1, 2):
        for some in combinations(places, size):
            own_mask(some)
    assert not any(fits)
    fits.clear()
    masks = [own_mask(some) for some in combinations(places, 3)]
    assert all(fits)
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    assert not np.array_equal(masked[target] - masks[0], run.values[target])


def test_t_minus_one_shares_fit_every_secret() -> None:
    """The other share can be chosen so that any secret comes out: they hold no information on the true one."""
    for secret in (bytes(32), primitives.new_secret()):
        shares = primitives.split(secret, 3, 5)
        other = primitives.split(primitives.new_secret(), 3, 5)
        seen = {primitives.combine({0: shares[0], 1: shares[1], 2: other[i]}) for i in range(5)}
        assert len(seen) == 5
        assert secret not in seen
        assert all(primitives.combine({i: shares[i] for i in some}) == secret for some in combinations(range(5), 3))


def test_the_private_key_of_a_client_that_left_uncovers_nothing_of_what_comes_late() -> None:
    """The reason for double masks: a slow client's vector keeps its own mask when its pairwise masks are known."""
    run = Run()
    slow = run.names[1]
    handed = run.handed()
    vectors = {name: run.clients[name].mask(run.values[name], handed[name]) for name in run.names}
    for name in run.names:
        if name != slow:
            run.server.add(name, vectors[name])
    survivors = run.server.survivors()
    answers = {name: run.clients[name].unmask(survivors) for name in survivors}
    with pytest.raises(ValueError, match=f"the vector of '{slow}' is late"):
        run.server.add(slow, vectors[slow])
    assert np.array_equal(run.server.total(answers), plain({n: v for n, v in run.values.items() if n != slow}))

    roster = run.server._roster
    assert roster is not None
    private = primitives.combine({roster.share_index(n): answers[n][64:96] for n in survivors})
    assert primitives.public_key(private) == roster.adverts[slow].mask_key
    bare = vectors[slow].copy()
    binding = roster.binding(b"", run.names)
    keys = {v: roster.pair_mask_key(private, slow, v, binding) for v in survivors}
    primitives.add_masks(bare, [k for v, k in keys.items() if v < slow], [k for v, k in keys.items() if v > slow])
    assert not (bare == run.values[slow]).any()


# Never both secrets of one client.


def test_a_client_unmasks_for_one_list_of_survivors_only() -> None:
    run = Run(5, 3)
    run.masked()
    survivors = run.server.survivors()
    first = run.clients["basel"].unmask(survivors)
    assert run.clients["basel"].unmask(survivors[::-1]) == first
    for other in (survivors[:3], survivors[:4]):
        with pytest.raises(ValueError, match="'basel' has unmasked for other survivors"):
            run.clients["basel"].unmask(other)
    # Those who answered another list hold shares of the other secret; they are fewer than the threshold.
    assert 2 * run.threshold > run.num_clients


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        (("amiens", "basel"), "2 survivors: expected at least 3"),
        (("amiens", "basel", "oslo"), "expected some of"),
        (("amiens", "basel", "basel"), "each once"),
        (("basel", "cadiz", "delft"), "expected 'amiens', which is asked, among them"),
        ((), "among them"),
    ],
)
def test_bad_lists_of_survivors_are_refused(survivors: tuple[str, ...], message: str) -> None:
    run = Run()
    run.masked()
    with pytest.raises(ValueError, match=message):
        run.clients["amiens"].unmask(survivors)
    assert run.clients["amiens"].unmask(run.server.survivors())  # a refused list binds to nothing


@pytest.mark.parametrize(("num_clients", "threshold"), [(4, 2), (4, 1), (4, 5), (1, 1), (3, 0)])
def test_a_threshold_is_a_majority_of_at_least_two(num_clients: int, threshold: int) -> None:
    """Clients see to it themselves: with half, two halves could be told of different survivors."""
    clients = {name: Participant(SESSION, name) for name in NAMES[:num_clients]}
    keys = {name: one.advertise() for name, one in clients.items()}
    with pytest.raises(ValueError, match=f"threshold = {threshold} of {num_clients} clients"):
        clients["amiens"].share(keys, threshold)


def test_every_step_is_taken_once_and_in_order() -> None:
    run = Run()
    one = run.clients["amiens"]
    with pytest.raises(ValueError, match="has shared no secrets yet"):
        one.mask(run.values["amiens"], {})
    with pytest.raises(ValueError, match="has masked nothing yet"):
        one.unmask(run.names)
    keys = run.keys()
    sent = {name: c.share(keys, 3) for name, c in run.clients.items()}
    with pytest.raises(ValueError, match="has shared its secrets already"):
        one.share(keys, 3)
    with pytest.raises(ValueError, match="has no shares of the others"):
        one.mask(run.values["amiens"])
    handed = run.server.route(sent)
    one.mask(run.values["amiens"], handed["amiens"])
    for shares in (None, handed["amiens"]):
        with pytest.raises(ValueError, match="has masked its vector already"):
            one.mask(run.values["amiens"], shares)
    with pytest.raises(ValueError, match="has received its shares already"):
        one.receive(handed["amiens"])


def test_the_same_secrets_give_other_masks_in_every_session_and_for_every_pair() -> None:
    """Secrets are never used twice; if they were, by a broken source of randomness, sessions would still differ."""
    one, other = primitives.new_secret(), primitives.new_secret()
    keys = []
    for session in (b"a", b"b"):
        run = Run(session=session)
        run.keys()
        roster = run.server._roster
        assert roster is not None
        same = {name: replace(a, mask_key=primitives.public_key(other)) for name, a in roster.adverts.items()}
        for fingerprint in (roster.fingerprint, bytes(32)):
            shown = replace(roster, fingerprint=fingerprint, adverts=same)
            for binding in (shown.binding(b"", run.names), shown.binding(b"x", run.names), shown.binding(b"", "a")):
                keys += [shown.self_mask_key(one, "amiens", binding), shown.self_mask_key(one, "basel", binding)]
                keys += [shown.pair_mask_key(one, "amiens", other, binding) for other in ("basel", "cadiz")]
    assert len(set(keys)) == 48


# Several sums after one set-up.


def test_several_sums_of_a_round_share_the_set_up_and_no_secret() -> None:
    """Of two sums of different lengths, one client misses the first and takes part in the second."""
    server = RoundAggregator(b"run 7/round 3", 3, 2)
    clients = {name: RoundParticipant(b"run 7/round 3", name, 2) for name in NAMES[:4]}
    adverts = {name: one.advertise() for name, one in clients.items()}
    with pytest.raises(ValueError, match="the message of 'basel' for 2 sums"):
        server.keys(adverts | {"basel": adverts["basel"][:-1]})
    first, second = primitives.unpack(adverts["basel"], 2)
    for bad in ((first, b""), (second, first), (first, first)):  # one sum's keys are of no use in another
        with pytest.raises(ValueError, match="the advert of 'basel'"):
            server.keys(adverts | {"basel": primitives.pack(*bad)})
        with pytest.raises(ValueError, match="the advert of 'basel'"):
            server.check_advert("basel", primitives.pack(*bad))
    server.check_advert("basel", adverts["basel"])
    keys = server.keys(adverts)  # a bad client leaves none of the sums half set up
    sent = {name: one.share(keys, 3) for name, one in clients.items()}
    server.check_shares("basel", sent["basel"])
    with pytest.raises(ValueError, match="shares from 'cadiz'"):
        server.check_shares("cadiz", sent["basel"])
    for name, shares in server.route(sent).items():
        clients[name].receive(shares)
    secrets = [s for one in clients.values() for p in one.sums for s in (p._seed, p._private, p._channel)]
    assert len(set(secrets)) == 3 * 2 * 4

    for index, num_words, lost in ((0, 4, ("cadiz",)), (1, 9, ())):
        values = vectors(4, num_words, seed=index)
        one_sum = server.sum(index, num_words)
        for name in values:
            if name not in lost:
                one_sum.add(name, clients[name].mask(index, values[name]))
        survivors = one_sum.survivors()
        total = one_sum.total({name: clients[name].unmask(index, survivors) for name in survivors})
        assert np.array_equal(total, plain({name: v for name, v in values.items() if name not in lost}))
    with pytest.raises(ValueError, match="once"):
        server.sum(1, 9)
    with pytest.raises(ValueError, match="sum 2 of 2"):
        clients["basel"].mask(2, values["basel"])


def test_a_round_must_hold_the_sums_that_were_agreed() -> None:
    three = RoundParticipant(b"r", "basel", 3).advertise()
    clients = {name: RoundParticipant(b"r", name, 2) for name in NAMES[:3]}
    with pytest.raises(ValueError, match="the message of 'basel' for 2 sums"):
        clients["amiens"].share({n: c.advertise() for n, c in clients.items()} | {"basel": three}, 2)
    with pytest.raises(ValueError, match="num_sums = 0"):
        RoundAggregator(b"r", 2, 0)


def test_in_process_wants_names_that_it_knows_and_vectors_of_one_length() -> None:
    with pytest.raises(ValueError, match=r"lost or late clients \['oslo'\]"):
        sum_in_process(vectors(3, 2), 2, SESSION, lost=["oslo"])
    with pytest.raises(ValueError, match="vector of 'basel'"):
        sum_in_process(vectors(3, 2) | {"basel": np.zeros(3, np.uint64)}, 2, SESSION)
    with pytest.raises(SumFailed, match="1 clients advertised keys, 2 were needed"):
        sum_in_process(vectors(1, 2), 2, SESSION)


@pytest.mark.parametrize("package", ["cryptography", "Crypto"])
def test_a_missing_package_is_one_clear_line(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import fedspan.privacy.secure_sum"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("pip install 'fedspan[secure]'")
