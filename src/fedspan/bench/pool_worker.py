"""`python -m fedspan.bench.pool_worker THREADS DEVICE`: one process of the clients suite.

It reads one JSON request per line and answers each with one line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import torch

from fedspan.bench import machine
from fedspan.bench.local import LocalClients
from fedspan.bench.process_pool import TrainingCase
from fedspan.support.errors import FedspanError


class Worker:
    """The answers of one process, which holds the models of one case at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._case: TrainingCase | None = None
        self._clients: LocalClients | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request."""
        if request["op"] == "calibrate":
            return {"seconds": machine.calibration(self._device)}
        clients = self._load(TrainingCase(**{**request["case"], "ranks": tuple(request["case"]["ranks"])}))
        if request["op"] == "prepare":
            clients.prepare(request["arm"])
            return {}
        return {"losses": clients.train(request["arm"], request["clients"])}

    def _load(self, case: TrainingCase) -> LocalClients:
        if self._clients is None or self._case != case:
            self._clients = None  # frees the models of the case before
            self._case, self._clients = case, LocalClients(case, self._device)
        return self._clients


def serve(device: torch.device, lines: Iterable[str], answers: IO[str]) -> None:
    """Answer requests, one per line, until there are no more."""
    worker = Worker(device)
    for line in lines:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


def main(arguments: Sequence[str]) -> None:
    """Serve requests from the standard input; the arguments are THREADS and DEVICE."""
    torch.set_num_threads(int(arguments[0]))
    # The standard output is for answers only: what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(torch.device(arguments[1]), sys.stdin, answers)
    except FedspanError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
