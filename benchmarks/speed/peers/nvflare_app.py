"""The NVFlare apps on its Collab API: one published function on each site, federated averaging on the server.

Adapters travel as safetensors bytes within the call: as a dict of arrays NVFlare moves them in a transaction of their
own beside it, which costs more for messages of this size.
"""

from __future__ import annotations

import json
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import measure
import numpy as np
from nvflare.collab import collab
from safetensors.numpy import load, save

CALL_TIMEOUT = 3600.0
"""Seconds for a client's call."""


class Client:
    """One site: its process lives as long as the job, and the base in it."""

    def __init__(self, spec_path: str) -> None:
        self.spec_path = spec_path

    @collab.init
    def prepare(self) -> None:
        """Load the base before the first round."""
        common.trainer(self.spec_path)

    @collab.publish
    def train(self, adapter: bytes, client: int, round_num: int) -> dict[str, Any]:
        """A client's local work of one round."""
        result = common.trainer(self.spec_path).train(client, round_num, load(adapter))
        return {
            "adapter": save(result.adapter),
            "num_examples": result.num_examples,
            "train_loss": result.train_loss,
            "started": result.started,
            "seconds": result.seconds,
        }


class Server:
    """Federated averaging over calls: as many in flight as asked for, each saying which client's data it is for."""

    def __init__(self, spec_path: str, parallel: int, result_path: str) -> None:
        self.spec_path = spec_path
        self.parallel = parallel
        self.result_path = result_path

    @collab.main
    def run(self) -> None:
        """All rounds; what came of them goes to `result_path`."""
        spec = common.Spec.read(self.spec_path)
        log = measure.Log()
        adapter = common.initial_adapter(self.spec_path)
        sites = {int(site.name.rpartition("-")[2]) - 1: site(timeout=CALL_TIMEOUT) for site in collab.clients}
        for round_num in range(1, spec.rounds + 1):
            chosen = spec.participants(round_num)
            replies = self._call(sites, chosen, round_num, save(adapter), own=len(sites) == spec.num_clients)
            weights = [float(r["num_examples"]) for r in replies]
            adapter = common.weighted_average([load(r["adapter"]) for r in replies], weights)
            log.add(
                [r["train_loss"] for r in replies],
                weights,
                [r["started"] for r in replies],
                sum(r["seconds"] for r in replies),
            )
        np.savez(self.result_path + ".npz", **adapter)
        Path(self.result_path).write_text(json.dumps(log.as_dict()), encoding="utf-8")

    def _call(self, sites, chosen: list[int], round_num: int, adapter: bytes, own: bool) -> list[dict[str, Any]]:
        """Every client's reply, in the clients' order: from its own site, or from whichever site is free."""
        waiting = queue.SimpleQueue()
        for client in chosen:
            waiting.put(client)

        def serve(slot: int) -> dict[int, dict[str, Any]]:
            done = {}
            while True:
                try:
                    client = waiting.get_nowait()
                except queue.Empty:
                    return done
                site = sites[client if own else slot]
                done[client] = site.train(adapter=adapter, client=client, round_num=round_num)

        replies: dict[int, dict[str, Any]] = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            for part in pool.map(serve, range(self.parallel)):
                replies |= part
        return [replies[client] for client in chosen]
