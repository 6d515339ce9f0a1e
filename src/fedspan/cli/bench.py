"""`fedspan bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedspan.support.errors import FedspanError


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...",
            help="server, clients, rounds, scaling, galore; if not given, all.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            show_default=False,
            help="Folder of the results, by default bench; measurements that are in it are kept.",
        ),
    ] = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: about four minutes in all.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="KEY=VALUE,…", help="Only cases with these values, such as d=4096,2048 or hidden=64."
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", show_default=False, help="Threads of every process; 1 by default.")
    ] = 1,
    redo: Annotated[
        bool, typer.Option("--redo", help="Repeat the measurements that were made while the machine was busy.")
    ] = False,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            metavar="N",
            show_default=False,
            help="Processes of the arms that share their work; 2 by default.",
        ),
    ] = 2,
    repeat: Annotated[
        int,
        typer.Option(
            "--repeat",
            metavar="N",
            show_default=False,
            help="Timings of every arm, alternating with the others; 5 by default.",
        ),
    ] = 5,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", metavar="SECONDS", help="Time for one arm of one case; if not given, 60, or 3 with --quick."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", show_default=False, help="cpu (by default) or cuda.")
    ] = "cpu",
    flower_python: Annotated[
        Path | None,
        typer.Option("--flower-python", metavar="FILE", help="Python of an environment with Flower (rounds)."),
    ] = None,
    nvflare_python: Annotated[
        Path | None,
        typer.Option("--nvflare-python", metavar="FILE", help="Python of an environment with NVFlare (rounds)."),
    ] = None,
    peers: Annotated[
        Path,
        typer.Option(
            "--peers",
            metavar="DIR",
            show_default=False,
            help="The scripts that run the experiment in other frameworks (rounds); by default benchmarks/speed/peers.",
        ),
    ] = Path("benchmarks/speed/peers"),
) -> None:
    """Time every part of a federated run beside alternatives that do the same work, on this machine.

    \b
    Examples:
      fedspan bench --quick              every suite at small sizes, four minutes
      fedspan bench server --out bench   one suite in full, or its continuation
      fedspan bench server --only d=4096 --only r=16
      fedspan bench rounds --flower-python ~/flower/bin/python

    \b
    server   one server step: every method, dense SVD, torch.svd_lowrank,
             PEFT's merge, plain averaging, and the floor (bytes over bandwidth,
             operations over the rate of a product); an hour
    clients  local training: a plain PyTorch loop, transformers.Trainer, one
             client after the other, many in one pass; in one process and in
             two; an hour
    rounds   whole experiments, start-up included: this library, Flower's and
             NVFlare's simulators; minutes
    scaling  time and memory of a server step from 10 to 10,000 clients,
             updates held or streamed; minutes
    galore   GaLore's step, refresh and state, compared with AdamW's; minutes

    The folder gets results.jsonl (one object per measurement, with the machine's description), table.md and
    pictures. An interrupted bench continues where it stopped. Arms take turns; figures are medians; arms that must
    agree are compared before they are timed; a case during which the machine was busy is marked.
    """
    from fedspan.bench.harness import Options
    from fedspan.bench.suites import device_of, run

    options = Options(
        out=out,
        quick=quick,
        only=_choices(only or ()),
        threads=threads,
        repeat=repeat,
        device=device_of(device),
        budget=budget if budget is not None else 3.0 if quick else 60.0,
        redo=redo,
        processes=processes,
        peers=peers,
        flower_python=flower_python,
        nvflare_python=nvflare_python,
    )
    for path in run(suite or (), options, lambda line: print(line, flush=True)):
        print(path)


def _choices(items: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return the values of each key of `d=768,2048`, `r=16`, …; one that is given twice has the values of both."""
    chosen: dict[str, frozenset[str]] = {}
    for item in items:
        key, separator, values = item.partition("=")
        if not (key and separator and values):
            raise FedspanError(f"--only {item!r}: expected KEY=VALUE, such as d=4096")
        if "=" in values:
            raise FedspanError(f"--only {item!r}: expected one key, as in --only d=4096 --only r=16")
        chosen[key] = chosen.get(key, frozenset()) | frozenset(values.split(","))
    return chosen
