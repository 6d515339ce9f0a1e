"""A run whose clients are shared between the processes of torchrun: the parts of it that every process makes.

Process 0 runs the federation as one process would; it alone has a run folder. The others hold the same data and the
same base, and do what process 0 deals: local work and evaluation, whose results depend on the task alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedspan.client.executors import ProcessExecutor, Worker, place_of
from fedspan.client.processes import Message
from fedspan.client.setup import Prepared, device_of
from fedspan.config import Config, from_mapping
from fedspan.data import Corpus
from fedspan.distributed.dealer import Dealer
from fedspan.distributed.environment import Place
from fedspan.distributed.leader import Leader
from fedspan.runs.identity import identity
from fedspan.runs.provision import Provided, Provision, Wanted
from fedspan.support.errors import FedspanError


class DistributedProvision(Provision):
    """Makes the costly parts of a run here, and has every other process make them too."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._dealer: Dealer | None = None

    def corpus(self, config: Config) -> Corpus:
        """Return a run's rows.

        Raises
        ------
        FedspanError
            For settings that are about worker processes of one machine.
        """
        _check(config, self._leader.place)
        self._dealer = self._leader.open()
        self._dealer.tell({"work": "load", "config": config.model_dump(mode="json")})
        return super().corpus(config)

    def work(self, wanted: Wanted) -> Provided:
        """Return a run's base in memory, and the executor of its work."""
        assert self._dealer is not None  # the corpus comes first
        parts = {"trains": wanted.trains, "max_rank": wanted.max_rank, "galore_rank": wanted.galore_rank}
        self._dealer.tell({"work": "base", **parts})
        device = _own_device(wanted.device, self._leader.place)
        context = wanted.context(device)
        self._dealer.own = Worker(context, device, False)
        executor = ProcessExecutor(context, self._dealer, device)
        model = context.model
        return Provided(model, model.dense(), model.digest(), executor, self._leader.place.size)

    def ready(self, described: Mapping[str, Any]) -> None:
        """Return when every process is ready and has the same data, base and libraries.

        Raises
        ------
        FedspanError
            For a process that could not load them, or has others.
        """
        assert self._dealer is not None
        answers = {rank: own[-1] for rank, own in self._dealer.replies(2).items()}
        for rank, own in answers.items():
            others = list(_differences(described, own["identity"]))
            if others:
                raise FedspanError(
                    f"process {rank} of {self._leader.place.size} ({own['host']}) has {'; '.join(others)}: expected "
                    "the same on every machine"
                )
        self._leader.watch({rank: own["host"] for rank, own in answers.items()})


def _own_device(device: torch.device, place: Place) -> torch.device:
    """Return the device of this process, which is then the current one: GPUs in turn on every machine."""
    own = place_of(device, place.local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)  # otherwise every process would hold some of the first GPU's memory
    return own


def _check(config: Config, place: Place) -> None:
    if config.engine.device_map != "none":
        raise FedspanError(
            f"engine.device_map in a run of {place.size} processes of torchrun: each has a base of its own on "
            "one device; expected 'none', or fedspan run without torchrun"
        )
    if config.engine.workers not in ("auto", 1):
        raise FedspanError(
            f"engine.workers = {config.engine.workers} in a run of {place.size} processes of torchrun: expected auto "
            "or 1 (--nproc-per-node says how many processes work on each machine)"
        )


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Yield what another process has that is not what process 0 has."""
    if here["base"] != there["base"]:
        yield "a base (model.name, model.adapter) with other weights than process 0"
    splits = [split for split in here["data"] if here["data"][split] != there["data"].get(split)]
    if splits:
        yield f"{' and '.join(splits)} data that is not what process 0 has, or another tokenizer or image processor"
    for name, version in here["libraries"].items():
        if there["libraries"].get(name) != version:
            yield f"{name} {there['libraries'].get(name)}, where process 0 has {version}"


class FollowerWork:
    """The answers of a process that does not lead: it loads what it is told to, then works as a worker process does."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._loaded: tuple[Config, Prepared] | None = None
        self._worker: Worker | None = None

    def __call__(self, message: Mapping[str, Any], tensors: list[Tensor]) -> Message:
        """Return the answer to one message."""
        if message["work"] in ("load", "base"):
            try:
                return (self._load(message) if message["work"] == "load" else self._make(message)), ()
            except (FedspanError, OSError) as error:
                raise FedspanError(f"process {self._place.rank} of {self._place.size} ({_host()}): {error}") from None
        assert self._worker is not None  # process 0 deals no work before the base is there
        return self._worker(message, tensors)

    def _load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        config = from_mapping(message["config"])
        torch.set_num_threads(config.threads)
        provision = Provision()
        self._loaded = config, provision.prepared(config, provision.corpus(config))
        return {}

    def _make(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if self._loaded is None:
            return {}  # the error of loading was the answer before
        config, prepared = self._loaded
        device = _own_device(device_of(config.device), self._place)
        trains, max_rank, galore_rank = (message[name] for name in ("trains", "max_rank", "galore_rank"))
        context = Wanted(config, prepared, trains, max_rank, galore_rank, device, 0).context(device)
        described = identity(config, context.model.digest(), prepared.data)
        self._worker = Worker(context, device, False)
        return {"identity": described, "host": _host()}


def _host() -> str:
    return f"{socket.gethostname()}, process id {os.getpid()}"
