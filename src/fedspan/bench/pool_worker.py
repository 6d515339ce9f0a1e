"""`python -m fedspan.bench.pool_worker THREADS DEVICE`: one process of the clients suite.

It reads one JSON request a line and answers each with one line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

import torch

from fedspan.bench import machine
from fedspan.bench.local import Workplace
from fedspan.bench.process_pool import Job


def serve(device: torch.device, lines: Iterable[str], answers: IO[str]) -> None:
    """Answer requests until there are no more."""
    places: dict[str, Workplace] = {}
    for line in lines:
        request = json.loads(line)
        if request["op"] == "calibrate":
            answer: dict[str, Any] = {"seconds": machine.calibration(device)}
        else:
            key = json.dumps(request["job"])
            if key not in places:
                places.clear()  # one case's models at a time
                places[key] = Workplace(Job(**request["job"]), device)
            place = places[key]
            if request["op"] == "prepare":
                place.prepare(request["arm"])
                answer = {}
            else:
                answer = {"losses": place.work(request["arm"], request["clients"])}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main(arguments: Sequence[str]) -> None:
    """`THREADS DEVICE`, requests on the standard input."""
    torch.set_num_threads(int(arguments[0]))
    # Whatever a library prints goes to stderr: the standard output is for the answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(torch.device(arguments[1]), sys.stdin, answers)
    except ValueError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
