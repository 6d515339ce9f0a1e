"""Processes of a fixed number of threads each, in which the client arms run: started once, asked one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from fedspan.bench.harness import Options
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Job:
    """What all arms of a case train."""

    base: str
    """The model's folder."""
    batch: int
    steps: int
    length: int
    """Tokens of a sequence."""
    num_clients: int
    ranks: tuple[int, ...]
    """In turn."""

    def rank(self, client: int) -> int:
        """A client's rank."""
        return self.ranks[client % len(self.ranks)]


class Seats:
    """The processes, from the first request to the end of the `with` block."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._seats: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Seats:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for seat in self._seats:
            if kind is not None:
                seat.kill()
            if seat.stdin is not None:
                seat.stdin.close()
            seat.wait()

    def prepare(self, job: Job, arm: str, processes: int) -> None:
        """Load the models and take a first step, so that nothing of it is timed."""
        self._ask(processes, [{"op": "prepare", "job": asdict(job), "arm": arm}] * processes)

    def work(self, job: Job, arm: str, processes: int, clients: int) -> tuple[float, list[float]]:
        """Seconds until the last process is done, and every client's mean training loss."""
        shares = [list(range(i, clients, processes)) for i in range(processes)]
        began = time.perf_counter()
        asked = [{"op": "work", "job": asdict(job), "arm": arm, "clients": share} for share in shares]
        answers = self._ask(processes, asked)
        seconds = time.perf_counter() - began
        losses: list[float] = [0.0] * clients
        for share, answer in zip(shares, answers, strict=True):
            for client, loss in zip(share, answer["losses"], strict=True):
                losses[client] = loss
        return seconds, losses

    def calibrate(self) -> float:
        """The fixed piece of work in all processes at once: the slowest of them."""
        many = self._options.processes
        return max(float(answer["seconds"]) for answer in self._ask(many, [{"op": "calibrate"}] * many))

    def _ask(self, processes: int, requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        while len(self._seats) < processes:
            self._seats.append(self._start())
        seats = self._seats[:processes]
        for seat, request in zip(seats, requests, strict=True):
            assert seat.stdin is not None
            seat.stdin.write(json.dumps(request) + "\n")
            seat.stdin.flush()
        return [_answer(seat) for seat in seats]

    def _start(self) -> subprocess.Popen[str]:
        threads = str(self._options.threads)
        command = [sys.executable, "-m", "fedspan.bench.pool_worker", threads, str(self._options.device)]
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        # The libraries' advice is for their callers, not for whoever reads the figures.
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, encoding="utf-8"
        )


def _answer(seat: subprocess.Popen[str]) -> dict[str, Any]:
    assert seat.stdout is not None
    line = seat.stdout.readline()
    if not line:
        raise FedspanError(f"a benchmark process ended with code {seat.wait()}: its own message is above")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise FedspanError(f"a benchmark process failed: {answer['error']}")
    return answer
