"""Ledgers of privacy: what counts as a new release, what survives a crash, and what noise and coins are keyed by."""

from __future__ import annotations

import math
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

pytest.importorskip("dp_accounting")

from fedspan.algebra.lowrank import LowRank
from fedspan.config import DataConfig, PrivacyConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods.base import ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Factors, GaloreOptions, Recipe, Subspace, Template, Update
from fedspan.privacy.accountant import DPEvent
from fedspan.privacy.accounting import epsilon
from fedspan.privacy.asks import Ask
from fedspan.privacy.budget import BudgetSpent
from fedspan.privacy.client_dp import with_client_dp
from fedspan.privacy.gaussian import keyed_digest, uniform
from fedspan.privacy.ledgers import ClientLedger, ExampleLedgers, Ledger
from fedspan.privacy.releases import Release, joint_noise
from fedspan.privacy.secret_file import kept_secret
from fedspan.support.files import write_bytes, write_new

PRIVACY = PrivacyConfig(dp="example", noise_multiplier=2.0)
HALF = DPEvent(2.0, 0.5)


def rows(count: int, first: int = 0) -> Encoded:
    words = tiny.words(24)[first : first + count]
    labels = ["xyz".index(r["label"]) for r in words]
    data = Rows("classification", [(r["text"],) for r in words], labels, [""] * count)
    return encode(data, tiny.tokenizer(), DataConfig())


def sent() -> Broadcast:
    one = torch.ones(2, 2)
    return Broadcast(
        {"x": Factors(one, one, 1.0)},
        {"head": one},
        patch={"x": LowRank(one, one)},
        correction={"head": one},
        subspaces={"x/a": Subspace(one)},
        moments={"head": one},
    )


TWO = 2 * torch.ones(2, 2)
OTHER: dict[str, Callable[[Broadcast], Broadcast]] = {
    "A": lambda b: replace(b, adapter={"x": replace(b.adapter["x"], a=TWO)}),
    "B": lambda b: replace(b, adapter={"x": replace(b.adapter["x"], b=TWO)}),
    "scaling": lambda b: replace(b, adapter={"x": replace(b.adapter["x"], scaling=2.0)}),
    "name": lambda b: replace(b, adapter={"y": b.adapter["x"]}),
    "dense": lambda b: replace(b, dense={"head": TWO}),
    "type": lambda b: replace(b, dense={"head": torch.ones(2, 2).double()}),
    "patch": lambda b: replace(b, patch={"x": LowRank(TWO, torch.ones(2, 2))}),
    "dense patch": lambda b: replace(b, patch={"x": TWO}),
    "correction": lambda b: replace(b, correction={"head": TWO}),
    "subspace": lambda b: replace(b, subspaces={"x/a": Subspace(TWO)}),
    "side": lambda b: replace(b, subspaces={"x/a": Subspace(torch.ones(2, 2), "right")}),
    "moments": lambda b: replace(b, moments={"head": TWO}),
    "train_a": lambda b: replace(b, recipe=Recipe(train_a=False)),
    "penalty": lambda b: replace(b, recipe=Recipe(tail_penalty=(0.1, 1))),
    "galore": lambda b: replace(b, recipe=Recipe(galore=GaloreOptions())),
}


def test_every_part_of_a_question_draws_anew(tmp_path: Path) -> None:
    """Run, client, round, steps, data (a row more, another row), settings and every tensor of the broadcast: no two of
    them share a secret, hence coins or noise; what does not matter to training changes nothing."""
    ledgers = ExampleLedgers(PRIVACY, 4, tmp_path, "settings")
    base, data = sent(), rows(5)

    def secret(
        run: str = "run",
        who: str = "a",
        number: int = 0,
        steps: int = 3,
        broadcast: Broadcast = base,
        examples: Encoded = data,
        settings: str = "settings",
    ) -> int:
        # A new process for every question: a site's data may change between two starts.
        asked = ExampleLedgers(PRIVACY, 4, tmp_path, settings)
        return asked.secret(asked.ask(run, who, number, steps, broadcast, examples))

    secrets = [secret(), secret(run="other"), secret(who="b"), secret(number=1), secret(steps=4)]
    secrets += [secret(examples=rows(6)), secret(examples=rows(5, 1)), secret(settings="others")]
    secrets += [secret(broadcast=change(base)) for change in OTHER.values()]
    assert len(set(secrets)) == len(secrets)
    assert secret() == secrets[0]
    assert secret(broadcast=replace(base, news=(base.patch,), seeded=frozenset({"a"}))) == secrets[0]
    assert ledgers.spent() == 0.0


def test_a_copied_folder_with_other_data_shares_nothing(tmp_path: Path) -> None:
    """Two sites with one secret, by a copy: other data, other draws. With the same data it is the same site."""
    for name in ("one", "two"):
        write_bytes(tmp_path / name / "privacy" / "secret", b"1234abcd" * 8)
    one, two = (ExampleLedgers(PRIVACY, 4, tmp_path / name, "settings") for name in ("one", "two"))
    first = one.secret(one.ask("run", "a", 0, 1, sent(), rows(5)))
    assert two.secret(two.ask("run", "a", 0, 1, sent(), rows(5, 1))) != first
    fresh = ExampleLedgers(PRIVACY, 4, tmp_path / "two", "settings")
    assert fresh.secret(fresh.ask("run", "a", 0, 1, sent(), rows(5))) == first


def update(value: float) -> Update:
    return Update("a", 1.0, {}, {"x": torch.full((3,), value)})


def test_a_repetition_counts_where_its_result_is_another(tmp_path: Path) -> None:
    """The identical answer costs nothing more. Another answer to the same question, of a machine that rounds
    differently, is about the same coins: the two are one release of noise z/√2, which costs more than two draws."""
    ledgers = ExampleLedgers(PRIVACY, 4, tmp_path, "settings")
    ask = ledgers.ask("run", "a", 0, 3, sent(), rows(8))
    for _ in range(2):
        ledgers.charge(ask, update(1.0))
        assert ledgers.spent() == epsilon(2.0, 0.5, 3, 1e-5)
    ledgers.charge(ask, update(1.0 + 1e-6))
    assert ledgers.spent() == epsilon(2.0 / math.sqrt(2), 0.5, 3, 1e-5) > epsilon(2.0, 0.5, 6, 1e-5)
    again = ExampleLedgers(PRIVACY, 4, tmp_path, "settings")  # a new process knows of clients that worked before
    assert again.spent() == ledgers.spent()


def test_a_spent_budget_stops_new_work_but_not_a_repetition(tmp_path: Path) -> None:
    """A round that was counted may be answered again, to the bit; any other answer is refused before it leaves."""
    limit = epsilon(2.0, 0.5, 3, 1e-5) * 1.01
    ledgers = ExampleLedgers(PRIVACY.model_copy(update={"epsilon": limit}), 4, tmp_path, "settings")
    ask = ledgers.ask("run", "a", 0, 3, sent(), rows(8))
    ledgers.check(ask)
    ledgers.charge(ask, update(1.0))
    assert ledgers.allows("a", "run", 0, 8, 3)
    assert not ledgers.allows("a", "run", 1, 8, 3)
    ledgers.check(ask)
    ledgers.charge(ask, update(1.0))
    with pytest.raises(BudgetSpent, match=r"the privacy budget is spent: this release would bring epsilon to"):
        ledgers.charge(ask, update(2.0))
    with pytest.raises(BudgetSpent, match="the privacy budget is spent"):
        ledgers.check(ledgers.ask("run", "a", 1, 3, sent(), rows(8)))
    assert ledgers.spent() <= limit


def test_joint_noise_is_that_of_all_together() -> None:
    assert joint_noise([3.0]) == 3.0
    assert joint_noise([2.0] * 4) == 1.0
    assert joint_noise([3.0, 4.0]) == pytest.approx(12 / 5)
    assert joint_noise([3.0, 0.0]) == joint_noise([]) == 0.0


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """Eight writers over one file, each with a ledger of its own: every release is in it."""
    path = tmp_path / "privacy" / "ledger-a.json"

    def write(number: int) -> None:
        for k in range(5):
            Ledger(path, 1e-5).charge(Release(f"{number}/{k}", "x", HALF))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Ledger(path, 1e-5).samples()) == 40
    assert Ledger(path, 1e-5).spent == epsilon(2.0, 0.5, 40, 1e-5)


def test_other_coins_under_one_name_are_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json", 1e-5)
    ledger.charge(Release("round 1", "x", HALF))
    with pytest.raises(ValueError, match=r"a release at rate 0.25 over 1 steps: expected 0.5 over 1"):
        ledger.charge(Release("round 1", "y", DPEvent(2.0, 0.25)))


def test_the_sums_of_a_round_are_one_release(tmp_path: Path) -> None:
    """Three different sums of one round and one of the next; the identical sum is none more; a limit is kept."""
    privacy = PrivacyConfig(dp="client", noise_multiplier=2.0)
    ledger = ClientLedger(tmp_path, privacy, 0.5)
    for name in ("a", "b", "a", "c"):
        ledger.charge(0, name)
    ledger.charge(1, "a")
    assert (ledger.num_released(0), ledger.num_released(1), ledger.num_released(2)) == (3, 1, 0)
    from fedspan.privacy.accounting import total_epsilon
    from fedspan.privacy.pld import PLDAccountant

    wanted = total_epsilon([DPEvent(2.0 / math.sqrt(3), 0.5), DPEvent(2.0, 0.5)], 1e-5, PLDAccountant)
    assert ledger.spent == wanted
    tight = ClientLedger(tmp_path, privacy.model_copy(update={"epsilon": wanted * 1.001}), 0.5)
    assert tight.allows(0, 3)
    assert not tight.allows(0, 4)
    assert not tight.allows(2, 1)
    with pytest.raises(BudgetSpent):
        tight.charge(2, "a")
    assert ledger.spent == wanted


@pytest.mark.parametrize(("clip", "z"), [(1.0, 2.0), (2.0, 1.0)])
def test_one_sum_is_never_under_two_multiples_of_one_noise(clip: float, z: float) -> None:
    """An empty round is noise alone: at z and 2z, or C and 2C, it is no multiple of itself."""
    from fedspan.methods import METHODS

    template = Template({"x": (16, 16)}, 4, num_clients=4)
    noises = []
    for c, factor in ((1.0, 1.0), (clip, z)):
        method = with_client_dp(METHODS["ffa_lora"](), c, factor, 1.0, lambda: 0x5EC12E7)
        state: ServerState = method.init(template, {})
        after, _ = method.finish(state, Partial())
        noises.append((after.modules["x"]["sb"] - state.modules["x"]["sb"]).double().flatten())
    cosine = float(torch.nn.functional.cosine_similarity(noises[0], noises[1], dim=0))
    assert abs(cosine) < 5 / math.sqrt(len(noises[0]))


def test_keys_are_apart_whatever_marks_names_hold() -> None:
    assert keyed_digest(1, "a/b", "c") != keyed_digest(1, "a", "b/c")
    assert not torch.equal(uniform(1, "a/b", "c", count=4), uniform(1, "a", "b/c", count=4))


def test_what_is_written_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that is put in place by a new name has its folder flushed after it, and new folders theirs: ledgers,
    secrets, and everything that is written whole."""
    synced: list[tuple[str, frozenset[str]]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            folder = os.readlink(f"/proc/self/fd/{handle}")
            synced.append((folder, frozenset(os.listdir(folder))))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    made = {
        "ledger": lambda path: Ledger(path, 1e-5).charge(Release("a", "b", HALF)),
        "secret": lambda path: kept_secret(path)(),
        "whole": lambda path: write_bytes(path, b"x"),
        "new": lambda path: write_new(path, b"x"),
    }
    for name, make in made.items():
        path = tmp_path / name / "deeper" / "file"
        make(path)
        for folder, child in ((path.parent, "file"), (path.parent.parent, "deeper"), (tmp_path, name)):
            assert any(at == str(folder) and child in names for at, names in synced), (name, folder)


def test_an_ask_is_named_by_its_run_and_round(tmp_path: Path) -> None:
    """So that the people at a site can read in their ledger what was released, and when."""
    ledgers = ExampleLedgers(PRIVACY, 4, tmp_path, "settings")
    ledgers.charge(Ask("f00d", "a", 4, 3, 8, "digest"), update(1.0))
    (name,) = Ledger(tmp_path / "privacy" / "ledger-a.json", 1e-5).samples()
    assert name.startswith("f00d/5/")
