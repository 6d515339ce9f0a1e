"""A pool of processes with a fixed number of threads each, in which the arms of the clients suite run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from fedspan.bench.harness import Options
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class TrainingCase:
    """The local training that all arms of a case do."""

    base: str
    """The model's folder."""
    batch: int
    steps: int
    length: int
    """Tokens per sequence."""
    num_clients: int
    ranks: tuple[int, ...]
    """Clients take them in turn."""

    def rank(self, client: int) -> int:
        """Return a client's rank."""
        return self.ranks[client % len(self.ranks)]


class ProcessPool:
    """Processes that are started at the first request and end with the `with` block."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
            if process.stdin is not None:
                process.stdin.close()
            process.wait()

    def prepare(self, case: TrainingCase, arm: str, num_processes: int) -> None:
        """Load the models and take a first step, so that neither is timed."""
        self._ask([{"op": "prepare", "case": asdict(case), "arm": arm}] * num_processes)

    def train(self, case: TrainingCase, arm: str, num_processes: int, clients: int) -> tuple[float, list[float]]:
        """Train the first `clients` clients; return the seconds until the last process ends, and each mean loss."""
        shares = [list(range(i, clients, num_processes)) for i in range(num_processes)]
        began = time.perf_counter()
        requests = [{"op": "train", "case": asdict(case), "arm": arm, "clients": share} for share in shares]
        answers = self._ask(requests)
        seconds = time.perf_counter() - began
        losses: list[float] = [0.0] * clients
        for share, answer in zip(shares, answers, strict=True):
            for client, loss in zip(share, answer["losses"], strict=True):
                losses[client] = loss
        return seconds, losses

    def calibrate(self) -> float:
        """Return the seconds of the calibration work in all processes at once, from the slowest of them."""
        answers = self._ask([{"op": "calibrate"}] * self._options.processes)
        return max(float(answer["seconds"]) for answer in answers)

    def _ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        while len(self._processes) < len(requests):
            self._processes.append(self._start())
        processes = self._processes[: len(requests)]
        # All requests are written before the first answer is read, so that the processes work at the same time.
        for process, request in zip(processes, requests, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return [_answer(process) for process in processes]

    def _start(self) -> subprocess.Popen[str]:
        threads = str(self._options.threads)
        command = [sys.executable, "-m", "fedspan.bench.pool_worker", threads, str(self._options.device)]
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        # Without the libraries' warnings, which are of no use to readers of the figures.
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, encoding="utf-8"
        )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise FedspanError(f"a benchmark process ended with code {process.wait()}; its own message is above")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise FedspanError(f"a benchmark process failed: {answer['error']}")
    return answer
