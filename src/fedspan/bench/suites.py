"""The suites by name, and the run of several of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fedspan.bench import clients_suite, galore_suite, rounds_suite, scaling_suite, server_suite, table
from fedspan.bench.harness import Bench, Options, read_results
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

SUITES: Mapping[str, Callable[[Bench], None]] = {
    "server": server_suite.run,
    "clients": clients_suite.run,
    "rounds": rounds_suite.run,
    "scaling": scaling_suite.run,
    "galore": galore_suite.run,
}

CASE_KEYS: Mapping[str, tuple[str, ...]] = {
    "server": ("phase", "d", "K", "r"),
    "clients": ("hidden", "batch", "K", "ranks", "steps"),
    "rounds": ("clients", "rounds", "steps", "batch", "hidden", "r"),
    "scaling": ("d", "r", "layers", "K"),
    "galore": ("phase", "m", "n", "r"),
}
"""The keys of every suite's cases, which `Options.only` may name."""


def run(names: Sequence[str], options: Options, notify: Callable[[str], None]) -> list[Path]:
    """Run suites (all if none is named) and write their results to a folder; measurements that it holds are kept.

    Returns
    -------
    list[Path]
        The files written: results.jsonl, table.md and the plots.

    Raises
    ------
    FedspanError
        For an unknown suite, a choice that leaves no case, a number out of range, a program that fails, or a folder
        whose results are damaged.
    """
    for name in names:
        if name not in SUITES:
            raise FedspanError(f"unknown suite {name!r}{nearest(name, SUITES)}")
    _check(options)
    _check_keys(names or tuple(SUITES), options)
    torch.set_num_threads(options.threads)
    bench = Bench(options, notify)
    notify(table.machine_line(bench.machine.record()))
    for name in names or SUITES:
        SUITES[name](bench)
    bench.check_choice()
    return [bench.path, *write(options.out, notify)]


def write(folder: Path, notify: Callable[[str], None]) -> list[Path]:
    """Write table.md and, if matplotlib is installed, one plot per suite, from the folder's results.jsonl."""
    records = read_results(folder / "results.jsonl")
    path = folder / "table.md"
    path.write_text(table.render(records), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        notify("no plots: matplotlib is not installed (pip install 'fedspan[plots]')")
        return [path]
    from fedspan.bench import plot

    return [path, *plot.draw(records, folder)]


def device_of(name: str) -> torch.device:
    """Return the device of that name.

    Raises
    ------
    FedspanError
        When it is unknown or not available.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FedspanError(f"--device {name!r}: expected cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FedspanError(f"--device {name}: expected cpu, since no GPU is available")
    return device


def _check(options: Options) -> None:
    for name in ("threads", "repeat", "processes"):
        if getattr(options, name) < 1:
            raise FedspanError(f"--{name} {getattr(options, name)}: expected at least 1")
    if not options.budget > 0:
        raise FedspanError(f"--budget {options.budget}: expected seconds above 0")


def _check_keys(names: Sequence[str], options: Options) -> None:
    """Refuse a key that no case of these suites has, since cases without a key are measured whatever its value."""
    known = dict.fromkeys(key for name in names for key in CASE_KEYS[name])
    for key, values in options.only.items():
        if key not in known:
            given = f"--only {key}={','.join(sorted(values))}"
            raise FedspanError(f"{given}: no case of {', '.join(names)} has {key!r}{nearest(key, known)}")
