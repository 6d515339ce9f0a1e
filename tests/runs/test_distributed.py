"""A run shared between processes has the bits of one process, for any number of them.

The others are forked here and reached through pipes; `tests/distributed/test_torchrun.py` has torchrun start them.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
from run_folders import same_outcome
from torch import Tensor

from fedspan.client.processes import Message, answer_messages
from fedspan.config import Config
from fedspan.distributed.dealer import Dealer
from fedspan.distributed.environment import Place
from fedspan.distributed.leader import Leader
from fedspan.runs.distributed import DistributedProvision, FollowerWork
from fedspan.runs.execution import resume, run
from fedspan.support.errors import FedspanError

Make = Callable[[Place], Any]


class PipedLeader:
    """What stands in for `Leader`: the others are forked and reached through pipes."""

    def __init__(self, size: int, make: Make) -> None:
        self.place, self._make = Place(0, size), make
        self.processes: list[Any] = []
        self.hosts: Mapping[int, str] = {}

    def open(self) -> Dealer:
        context: Any = mp.get_context("fork")
        channels = {}
        for rank in range(1, self.place.size):
            channels[rank], far = context.Pipe()
            work = self._make(Place(rank, self.place.size, rank))
            self.processes.append(context.Process(target=answer_messages, args=(far, work), daemon=True))
            self.processes[-1].start()
            far.close()
        return Dealer(channels, lambda rank, how: RuntimeError(f"process {rank} was lost: {how}"))

    def watch(self, hosts: Mapping[int, str]) -> None:
        self.hosts = hosts


@contextmanager
def shared(size: int, make: Make = FollowerWork) -> Iterator[DistributedProvision]:
    leader = PipedLeader(size, make)
    yield DistributedProvision(cast(Leader, leader))
    for process in leader.processes:
        process.kill()
        process.join()


def settings(base: Path, data: Path, method: str = "glora", /, **sections: Any) -> Config:
    """Dropout on, mixed ranks where the method takes them, everyone takes part."""
    federation = {"participation": 1.0, "ranks": [1, 8, 2, 4]} | sections.pop("federation", {})
    sections = {"adapter": {"dropout": 0.2}, "evaluation": {"batch_size": 3}, "engine": {"workers": "auto"}} | sections
    return tiny.config(base, data, method, federation=federation, **sections)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks": ("glora", {"evaluation": {"batch_size": 3, "local": True}}),
    "penalties": ("fedftg", {}),
    "personal factors": ("fedsa_lora", {"federation": {"ranks": 4}}),
    "control variates": ("scaffold", {}),
    "kept optimizers": ("fedit", {"local": {"keep_optimizer": True}, "federation": {"ranks": 4}}),
    "sums in fixed point": ("glora_sums", {"privacy": {"fixed_point": True}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_processes_ends_with_the_bits_of_one(
    bases: dict[str, Path], texts: Path, tmp_path: Path, case: str
) -> None:
    method, sections = CASES[case]
    local = tiny.config(bases["bert"], texts, method).local.model_dump(include={"steps", "batch_size", "optimizer"})
    sections = {**sections, "local": {**local, **sections.get("local", {})}}
    config = settings(bases["bert"], texts, method, **sections)
    alone = config.model_copy(update={"engine": config.engine.model_copy(update={"workers": 1})})
    run(alone, tmp_path / "one")
    with shared(3 if case == "ranks" else 2) as provision:
        run(config.model_copy(update={"engine": alone.engine}), tmp_path / "more", provision=provision)
    same_outcome(tmp_path / "one", tmp_path / "more")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_another_number_of_processes(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts, "hetlora", federation={"rounds": 3}, engine={"workers": 1})
    run(config, tmp_path / "whole")

    def stop(event: Any) -> None:
        if event.kind == "round":
            raise KeyboardInterrupt

    with shared(3) as provision, pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", stop, provision=provision)
    with shared(2) as provision, pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "stopped", stop, provision=provision)
    resume(tmp_path / "stopped")
    same_outcome(tmp_path / "whole", tmp_path / "stopped")


def test_worker_processes_beside_these_are_refused(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = settings(bases["bert"], texts, engine={"workers": 2})
    with (
        shared(2) as provision,
        pytest.raises(
            FedspanError, match=r"engine\.workers = 2 in a run of 2 processes of torchrun: expected auto or 1"
        ),
    ):
        run(config, tmp_path / "run", provision=provision)
    assert not (tmp_path / "run").exists()


class Altered(FollowerWork):
    """Another process in whose world something differs."""

    change: Callable[[Any], None]
    when = "base"

    def __call__(self, message: Mapping[str, Any], tensors: list[Tensor]) -> Message:
        if message["work"] == self.when == "load":
            type(self).change(message)
        answer, out = super().__call__(message, tensors)
        if message["work"] == self.when == "base":
            type(self).change(answer)
        return answer, out


def altered(when: str, change: Callable[[Any], None]) -> Make:
    return type("AlteredInOne", (Altered,), {"change": staticmethod(change), "when": when})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            altered("base", lambda own: own["identity"].update(base="0")),
            r"process 1 of 2 \(.*, process id \d+\) has a base \(model.name, model.adapter\) with other weights",
        ),
        (
            altered("base", lambda own: own["identity"]["libraries"].update(torch="1.0")),
            "has torch 1.0, where process 0 has",
        ),
        (
            # Each process reads its own files: one that was changed on one machine must not be trained on.
            altered("load", lambda message: message["config"]["data"].update(holdout=0.4)),
            "has train and test data that is not what process 0 has",
        ),
        (
            altered("load", lambda message: message["config"]["data"].update(train=["/nowhere/x.jsonl"])),
            r"process 1 of 2 \(.*\): .*/nowhere/x.jsonl",
        ),
    ],
)
def test_a_process_with_something_else_is_refused_before_any_training(
    bases: dict[str, Path], texts: Path, tmp_path: Path, make: Make, said: str
) -> None:
    with shared(2, make) as provision, pytest.raises(FedspanError, match=said):
        run(settings(bases["bert"], texts, engine={"workers": 1}), tmp_path / "run", provision=provision)
    assert not (tmp_path / "run").exists()
