"""The suites by name, and a run of some of them."""

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


def run(names: Sequence[str], options: Options, say: Callable[[str], None]) -> list[Path]:
    """Run suites (none named: all) into a folder; what is measured there already is kept.

    Returns
    -------
    list[Path]
        What was written: results.jsonl, table.md and the plots.

    Raises
    ------
    ValueError
        For an unknown suite, a number out of range, a program that fails, or a folder whose results are damaged.
    """
    for name in names:
        if name not in SUITES:
            raise FedspanError(f"unknown suite {name!r}{nearest(name, SUITES)}")
    _check(options)
    torch.set_num_threads(options.threads)
    bench = Bench(options, say)
    say(table.machine_line(bench.machine.record()))
    for name in names or SUITES:
        SUITES[name](bench)
    return [bench.path, *write(options.out, say)]


def write(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """table.md and, where matplotlib is installed, one picture per suite, from the folder's results.jsonl."""
    records = read_results(folder / "results.jsonl")
    path = folder / "table.md"
    path.write_text(table.render(records), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        say("no pictures: matplotlib is not installed (pip install 'fedspan[plots]')")
        return [path]
    from fedspan.bench import plot

    return [path, *plot.draw(records, folder)]


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises
    ------
    ValueError
        When it is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FedspanError(f"--device {name!r}: expected cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FedspanError(f"--device {name}: no GPU can be used here")
    return device


def _check(options: Options) -> None:
    for name in ("threads", "repeat", "processes"):
        if getattr(options, name) < 1:
            raise FedspanError(f"--{name} {getattr(options, name)}: expected at least 1")
    if not options.budget > 0:
        raise FedspanError(f"--budget {options.budget}: expected seconds above 0")
