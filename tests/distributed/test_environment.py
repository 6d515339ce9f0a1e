"""The place of a process, as torchrun's variables say it."""

from __future__ import annotations

import pytest

from fedspan.distributed.environment import Place, place
from fedspan.support.errors import FedspanError

FULL = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_the_place_is_read_from_the_environment() -> None:
    assert place({**FULL, "TORCHELASTIC_USE_AGENT_STORE": "True"}) == Place(3, 8, 1, True)
    assert place(FULL) == Place(3, 8, 1, False)
    without = {key: value for key, value in FULL.items() if key != "LOCAL_RANK"}
    assert place(without) == Place(3, 8, 3, False)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_process_that_torchrun_did_not_start_works_alone(missing: str) -> None:
    assert place({key: value for key, value in FULL.items() if key != missing}) is None


def test_the_only_process_works_alone() -> None:
    assert place({**FULL, "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "x"}, "RANK = 'x'"),
        ({"RANK": "-1"}, "RANK = '-1'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE = '2.0'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK = ''"),
        ({"RANK": "8"}, "expected 0 to 7"),
    ],
)
def test_variables_that_make_no_sense_are_refused(changed: dict[str, str], said: str) -> None:
    with pytest.raises(FedspanError, match=said):
        place({**FULL, **changed})


def test_one_process_of_every_machine_says_that_the_leading_one_is_gone() -> None:
    """Two machines of three processes: the first of the second machine, and the second of the first."""
    speakers = [rank for rank in range(6) if Place(rank, 6, rank % 3).speaks]
    assert speakers == [1, 3]
