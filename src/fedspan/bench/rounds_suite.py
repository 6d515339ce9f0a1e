"""The rounds suite: whole experiments, from the command to the final adapter, each in processes of its own.

One definition (model, data, initial adapter, local steps, plain average of the factors) is written to SPEC.json and
run by every arm as `PROGRAM --spec SPEC.json --out OUT.json`. Afterwards the same code evaluates all final adapters,
so that an arm that trained differently shows in `train_loss`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fedspan.adapters import peft_folder
from fedspan.bench import tiny
from fedspan.bench.harness import Arm, Bench, CaseKey, Options, Timed
from fedspan.bench.local import encoded, load_model
from fedspan.bench.process_pool import TrainingCase
from fedspan.methods.messages import Broadcast, Factors
from fedspan.methods.readout import fresh_adapter
from fedspan.support.errors import FedspanError

SUITE = "rounds"
LENGTH = 32
LAYERS = 4
HIDDEN = 64
_PREFIX = "base_model.model."
_TOLERANCE = 0.1
"""Arms draw different batches: a final loss may differ by this share of the improvement over the initial adapter."""


@dataclass(frozen=True, slots=True)
class Program:
    """An arm's name and the beginning of its command."""

    name: str
    command: tuple[str, ...]


def run(bench: Bench) -> None:
    """Measure one experiment with every arm that can be started here."""
    case = _case(bench.options.quick)
    programs = _programs(bench, case)
    if not bench.missing(SUITE, case, [program.name for program in programs]):
        return
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        experiment = Experiment(folder, case)
        experiment.write()
        arms = []
        for program in programs:
            outputs: list[Mapping[str, Any]] = []
            work = partial(_execute, program, folder, bench.options, outputs)
            arms.append(Arm(program.name, work, details=partial(_details, outputs)))
        # No warm-up: every run starts new processes.
        bench.measure(SUITE, case, arms, check=experiment.agreement, warm_up=False)


def _case(quick: bool) -> CaseKey:
    clients, rounds, steps = (6, 3, 2) if quick else (20, 20, 5)
    return {"clients": clients, "rounds": rounds, "steps": steps, "batch": 4, "hidden": HIDDEN, "r": 8}


def _programs(bench: Bench, case: CaseKey) -> list[Program]:
    options, programs = bench.options, []
    for engine, workers in _engines(options):
        more = ("--engine", engine, "--workers", str(workers))
        programs.append(
            Program(f"fedspan {engine} x{workers}", (sys.executable, "-m", "fedspan.bench.fedspan_arm", *more))
        )
    many = ("--parallel", str(options.processes))
    for name, python, script in (
        ("plain loop", Path(sys.executable), "plain.py"),
        ("flower", options.flower_python, "flower_peer.py"),
        ("nvflare", options.nvflare_python, "nvflare_peer.py"),
    ):
        path = options.peers / script
        if python is None:
            bench.skip(SUITE, case, f"{name} x{options.processes}", f"no --{name}-python was given")
        elif not path.exists():
            bench.skip(SUITE, case, f"{name} x{options.processes}", f"{script} is not in --peers")
        else:
            programs.append(Program(f"{name} x{options.processes}", (str(python), str(path.resolve()), *many)))
    return programs


def _engines(options: Options) -> list[tuple[str, int]]:
    """Return (engine, workers) of the library's own arms."""
    return [(engine, workers) for engine in ("sequential", "cohort") for workers in sorted({1, options.processes})]


def _execute(program: Program, folder: Path, options: Options, outputs: list[Mapping[str, Any]]) -> Timed:
    """Run an arm once; return the seconds from start to end, and the report that it wrote."""
    out = folder / f"{program.name.replace(' ', '-')}.json"
    command = [*program.command, "--spec", str(folder / "SPEC.json"), "--out", str(out)]
    threads = str(options.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    out.unlink(missing_ok=True)
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode != 0 or not out.exists():
        last = (done.stderr.strip().splitlines() or ["it printed no message"])[-1]
        raise FedspanError(f"{program.name} ended with code {done.returncode}: {last}")
    outputs.append(json.loads(out.read_text(encoding="utf-8")))
    return Timed(seconds, outputs[-1])


def _details(outputs: list[Mapping[str, Any]], _: Any) -> Mapping[str, Any]:
    """Return medians over the runs of an arm."""
    return {
        "startup_seconds": median(output["startup_seconds"] for output in outputs),
        "rounds_seconds": median(sum(output["round_seconds"]) for output in outputs),
        "round_seconds": median(median(output["round_seconds"]) for output in outputs),
        "peak_rss_bytes": max(output["peak_rss_bytes"] for output in outputs),
        "versions": outputs[0].get("versions", {}),
    }


class Experiment:
    """The definition on disk, and the evaluation of the final adapters."""

    def __init__(self, folder: Path, case: CaseKey) -> None:
        self.folder, self.case = folder, case
        self.clients, self.rank = int(case["clients"]), int(case["r"])
        self._training = TrainingCase(
            str(folder / "model"), int(case["batch"]), int(case["steps"]), LENGTH, 1, (self.rank,)
        )
        self._data = [tiny.tokens(64, LENGTH, "rounds", client % 4) for client in range(self.clients)]

    def write(self) -> None:
        """Write the base, the clients' sequences, the initial adapter and SPEC.json."""
        tiny.llama(self.folder / "model", HIDDEN, LAYERS, 2 * LENGTH)
        arrays: dict[str, Any] = {f"client_{i:03d}": tokens.numpy() for i, tokens in enumerate(self._data)}
        np.savez(self.folder / "data.npz", **arrays)
        spec = {
            "model": str(self.folder / "model"),
            "data": str(self.folder / "data.npz"),
            "num_clients": self.clients,
            "rounds": int(self.case["rounds"]),
            "participation": 1.0,
            "local_steps": self._training.steps,
            "batch_size": self._training.batch,
            "learning_rate": 3e-3,
            "rank": self.rank,
            "alpha": 16.0,
            "target_modules": list(tiny.TARGETS),
            "seed": 0,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "initial_adapter": str(self.folder / "initial.safetensors"),
        }
        (self.folder / "SPEC.json").write_text(json.dumps(spec, indent=2), encoding="utf-8")
        self.model = load_model(self._training, torch.device("cpu"))
        # FedIT's own initial adapter, so that every arm starts from the same one.
        start = fresh_adapter(self.model.template(self.rank, 16.0, False, 0), self.rank)
        parts = [(name, part, t) for name, f in start.items() for part, t in (("A", f.a), ("B", f.b))]
        named = {f"{_PREFIX}{name}.lora_{part}.default.weight": t for name, part, t in parts}
        save_file(named, self.folder / "initial.safetensors")

    def agreement(self, outputs: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
        """Return every final adapter's loss and its distance from the first arm's, as a share of the improvement."""
        losses = {name: self.loss(Path(output["final_adapter"])) for name, output in outputs.items()}
        before, reference = self.loss(self.folder / "initial.safetensors"), next(iter(losses.values()))
        agreement: dict[str, Mapping[str, float]] = {}
        for name, loss in losses.items():
            distance = abs(loss - reference) / abs(before - reference)
            agreement[name] = {"train_loss": loss, "distance": distance, "agrees": distance <= _TOLERANCE}
        return agreement

    def loss(self, path: Path) -> float:
        """Return an adapter's mean loss on all clients' sequences; `path` is a PEFT folder or a safetensors file."""
        factors = peft_folder.load(path).factors if path.is_dir() else _read(path, 16.0 / self.rank)
        self.model.load(Broadcast(factors, {}))
        data = encoded(self._training.base, torch.cat(self._data))
        losses = []
        with torch.no_grad():
            for start in range(0, len(data), 64):
                batch = data.batch(range(start, min(start + 64, len(data))))
                losses.append(float(self.model.model(**batch).loss))
        return sum(losses) / len(losses)


def _read(path: Path, scaling: float) -> dict[str, Factors]:
    tensors = load_file(path)
    names = {key.removeprefix(_PREFIX).partition(".lora_")[0] for key in tensors}

    def find(name: str, part: str) -> torch.Tensor:
        return next(t for key, t in tensors.items() if key.startswith(f"{_PREFIX}{name}.lora_{part}."))

    return {name: Factors(find(name, "B"), find(name, "A"), scaling) for name in names}
