"""Federations under differential privacy, and their true ε by the accountant's own library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tiny
import torch
from memory_transport import MemoryTransport, make_sites

from fedspan.config import Config
from fedspan.methods.messages import Update
from fedspan.runs.execution import serve
from fedspan.site.site import Site
from fedspan.wire import protocol

DELTA = 1e-5
EQUAL = {"weighting": "equal"}


def truth(releases: Iterable[tuple[float, float, int]]) -> float:
    """ε by the accountant's own library of (z, q, steps), without any of ours."""
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    for z, q, steps in releases:
        accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), steps)
    return float(accountant.get_epsilon(DELTA))


def settings(base: Path, texts: Path, name: str, /, **sections: Any) -> Config:
    """Two clients, both in every round, plain SGD."""
    return tiny.config(
        base,
        texts,
        name,
        federation={"num_clients": 2, "participation": 1.0, "rounds": 1, **sections.pop("federation", {})},
        local={"steps": 1, "batch_size": 1000, "learning_rate": 0.1, "optimizer": "sgd", **sections.pop("local", {})},
        evaluation={"every": 9, "diagnostics": False, "per_rank": False, "base": False},
        engine={"name": "sequential"},
        deployment={"wait": 20, "deadline": 30},
        **sections,
    )


def private(clip: float = 0.5, z: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"dp": "example", "clip": clip, "noise_multiplier": z, "delta": DELTA, **more}


class Served:
    """A federation over sites in memory, with every update that the sites sent."""

    def __init__(self, config: Config, folder: Path, sites: Path) -> None:
        self.sites = make_sites(config, ["client-0", "client-1"], sites)
        self.updates: list[Update] = []
        self.transport = MemoryTransport({f"node-{i}": self._watched(i, x) for i, x in self.sites.items()})
        self.config, self.folder = config, folder

    def _watched(self, client_id: str, site: Site) -> Callable[[bytes], bytes]:
        def answer(content: bytes) -> bytes:
            head, tensors = protocol.decode(sent := site.answer(content))
            if "update" in head:
                self.updates.append(protocol.get_update(head["update"], tensors, client_id))
            return sent

        return answer

    def run(self) -> list[dict[str, Any]]:
        return serve(self.config, self.folder, lambda event: None, self.transport).history

    def vector(self, client_id: str) -> torch.Tensor:
        """What that client sent last, as one vector."""
        update = [u for u in self.updates if u.client_id == client_id][-1]
        return flat(update)


def flat(update: Update) -> torch.Tensor:
    return torch.cat([t.double().flatten() for _, t in sorted(update.named_tensors().items())])
