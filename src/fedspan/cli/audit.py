"""`fedspan audit` and `fedspan canaries`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedspan.cli.arguments import AsJson, Settings, parse_count
from fedspan.support.errors import FedspanError


def audit(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, or of a PEFT LoRA adapter.")
    ],
    members: Annotated[
        list[Path] | None,
        typer.Option("--members", metavar="FILE", help="Rows that it was trained on; may be repeated."),
    ] = None,
    nonmembers: Annotated[
        list[Path] | None,
        typer.Option("--nonmembers", metavar="FILE", help="Comparable rows that it was not trained on."),
    ] = None,
    canaries: Annotated[
        Path | None,
        typer.Option("--canaries", metavar="KEY", help="The key of planted canaries (`fedspan canaries`)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the dossier; by default `audit` in the run or adapter."),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Put the findings into the adapter's model card, README.md.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="NAME", help="The base, where the name that the folder gives does not lead to it."
        ),
    ] = None,
    max_rows: Annotated[
        str | None,
        typer.Option(
            "--max-rows",
            metavar="N",
            help="Most members, and most non-members, that are drawn; 2000. Ten of a site at least.",
        ),
    ] = None,
    no_messages: Annotated[
        bool, typer.Option("--no-messages", help="Do not repeat a site's first round to attack its message.")
    ] = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Attack a finished run or an adapter, and write what the attacks find as a dossier.

    \b
    Examples:
      fedspan audit runs/mine
      fedspan audit runs/mine --canaries canaries.key.json --card
      fedspan audit adapter --members train.jsonl --nonmembers other.jsonl

    Membership inference with the untouched base as reference, extraction of planted canaries, and attacks on a site's
    message with and without masks, beside the bound that ε and δ set. A run's own rows are members and its test rows
    are not; an adapter, and a run of real sites, need files of both.
    """
    from fedspan.auditing import dossier, files

    rows = parse_count("--max-rows", max_rows, "audit")
    found = dossier.audit(
        model,
        members=members or (),
        nonmembers=nonmembers or (),
        canaries=canaries,
        settings=settings or (),
        base=base,
        max_rows=dossier.MOST_ROWS if rows is None else rows,
        messages=not no_messages,
    )
    page, record = files.write(found, out if out is not None else model / "audit")
    written = [page, record]
    if card:
        is_run = (model / "config.toml").is_file()
        written.append(files.write_card(found, model / "adapter" if is_run else model))
    if as_json:
        from fedspan.support import standard_json

        print(standard_json.dumps(found.as_json(), indent=2))
        return
    print(f"{found.verdict}\n")
    for one in found.findings:
        print(f"{one.question}\n  {one.answer}\n  Next: {one.next_step}\n")
    for path in written:
        print(path)


def canaries(
    data: Annotated[list[Path], typer.Argument(metavar="FILE...", help="A site's rows: instructions, or texts.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="New JSONL file: the rows with canaries.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="New JSON file by which an audit finds them.")],
    count: Annotated[
        str | None, typer.Option("--count", metavar="N", help="Canaries that are planted; 6.", show_default=False)
    ] = None,
    repeats: Annotated[
        str, typer.Option("--repeats", metavar="N,...", help="How often each is planted, in turns.")
    ] = "1,10,50",
    settings: Settings = None,
) -> None:
    """Plant canaries in a site's data: made-up rows with random secrets, for an audit to look for.

    \b
    Example:
      fedspan canaries site-a.jsonl --out planted.jsonl --key canaries.key.json
      fedspan run --set data.train=planted.jsonl --out runs/trial
      fedspan audit runs/trial --canaries canaries.key.json

    Plant them in the data of a trial run: they are trained on like any other rows. The key holds words of the data and
    stays at the site.
    """
    from fedspan.auditing.canaries import plant

    parts = [part.strip() for part in repeats.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise FedspanError(f"--repeats {repeats!r}: expected numbers of 1 or more, such as 1,10,50")
    number = parse_count("--count", count, "canaries")
    made = plant(
        data, out, key, count=6 if number is None else number, repeats=[*map(int, parts)], settings=settings or ()
    )
    planted = [canary.repeats for canary in made.canaries if canary.repeats]
    print(
        f"{len(planted)} canaries planted ({sum(planted)} rows), {len(made.canaries) - len(planted)} kept as controls"
    )
    print(out)
    print(key)
