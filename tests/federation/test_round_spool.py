"""A round whose updates do not fit in memory: in files, with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from fedspan.federation.round_spool import RoundSpool, round_spool
from fedspan.methods import METHODS
from fedspan.wire.sizes import partial_bytes

# FedGaLore's updates hold weights, which are summed, and moments, which stay.
COLLECTED = sorted(
    name
    for name, make in METHODS.items()
    if any(e.fold.kind == "collect" for e in make().exchanges) and name != "fedgalore"
)
MIXED = {name for name, make in METHODS.items() if make().info.hetero_rank}


@pytest.mark.parametrize("name", COLLECTED)
def test_a_spooled_round_has_the_bits_of_one_in_memory(name: str, tmp_path: Path) -> None:
    """All updates in files, or those beyond the first; and none of them is left behind."""
    people = tiny.clients(*((2, 4, 3) if name in MIXED else (4, 4, 4)))
    method = METHODS[name]()
    start = tiny.run_state(method, 4)
    expected, record = tiny.run_round(method, start, people, tiny.fake_work)
    one = 4 * 4 * sum(m + n for m, n in tiny.SHAPES.values())  # bytes of a client of rank 4
    for limit in (0, one):
        with round_spool(tmp_path / "round", limit) as spool:
            found, spooled = tiny.run_round(method, start, people, tiny.fake_work, spool=spool)
            assert spool.num_spooled >= 1
            assert len(list((tmp_path / "round").iterdir())) == spool.num_spooled
        assert not (tmp_path / "round").exists()
        tiny.same_standing(found, expected)
        assert spooled["bytes_up"] == record["bytes_up"]


def test_files_take_no_memory_and_hold_what_is_beyond_the_limit(tmp_path: Path) -> None:
    """Half of it stays in memory with a limit of half; what is in files is counted as no byte of the server's."""
    people = tiny.clients(4, 4, 4, 4)
    method = METHODS["flora"]()
    seen = []

    class Watched(RoundSpool):
        def shed(self, partial: object) -> object:
            kept = super().shed(partial)
            seen.append(partial_bytes(kept))
            return kept

    whole = Watched(tmp_path / "a", 10**9)
    tiny.run_round(method, tiny.run_state(method, 4), people, tiny.fake_work, spool=whole)
    assert whole.num_spooled == 0
    assert not (tmp_path / "a").exists()
    each = seen[1] - seen[0]
    seen.clear()
    half = Watched(tmp_path / "b", 2 * each)
    tiny.run_round(method, tiny.run_state(method, 4), people, tiny.fake_work, spool=half)
    assert half.num_spooled == 2
    assert seen[1] == seen[2] == seen[3]


def test_an_interrupted_round_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    """A killed process cannot tidy up: the next round does."""
    folder = tmp_path / ".round"
    folder.mkdir()
    (folder / "000000001.safetensors").write_bytes(b"old")
    with round_spool(folder, 0):
        assert not folder.exists()
