"""Convert the benchmark data to files that `fedspan run` reads: python benchmarks/prepare.py --data DATA

superni/{train,test,unseen}.jsonl: each row carries its task's instruction; rows short enough for the small base, one
task of each category in turn. superni50: the same with 50 training tasks. mri/{train,test,official}.npz: a fifth of
the training images held out as test data, and the official test images that are not copies of training images. The
official ones differ from the training images (mean brightness 64 against 46), so they give a second figure, under a
shift, not the main one. dolly, medquad/{train,test}.jsonl: instruction rows with their category or source, a twentieth
held out at random. medquad_types/{train,test}.jsonl: the beginnings of MedQuAD's answers with the kind of question that
they answer, of its eight most frequent kinds, and the institute that wrote them. A link `source` beside them leads to
the data as it was given, where the suites read GLUE and the base of the text suites.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/work/data"))
    parser.add_argument("--clients", type=int, default=20, help="training tasks, one per client")
    parser.add_argument("--unseen", type=int, default=16, help="tasks that no client trains on")
    parser.add_argument("--longest", type=int, default=420, help="longest instruction + input in characters")
    arguments = parser.parse_args()
    for place in (
        "superni/tasks.jsonl.gz",
        "images/brain_mri_64.npz",
        "dolly/dolly15k.jsonl.gz",
        "medquad/medquad.jsonl.gz",
    ):
        if not (arguments.data / place).is_file():
            parser.error(f"--data {arguments.data}: expected a folder with {place}, as benchmarks/README.md lists it")
    superni(arguments.data / "superni", arguments.out / "superni", arguments)
    arguments.clients = 50
    superni(arguments.data / "superni", arguments.out / "superni50", arguments)
    mri(arguments.data / "images" / "brain_mri_64.npz", arguments.out / "mri")
    dolly(arguments.data / "dolly" / "dolly15k.jsonl.gz", arguments.out / "dolly")
    answers = read(arguments.data / "medquad" / "medquad.jsonl.gz")
    medquad(answers, arguments.out / "medquad")
    medquad_types(answers, arguments.out / "medquad_types")
    link(arguments.out.parent / "source", arguments.data)


def link(place: Path, data: Path) -> None:
    if place.is_symlink():
        place.unlink()
    place.symlink_to(data.resolve(), target_is_directory=True)


def mri(source: Path, out: Path) -> None:
    held = np.load(source)
    order = np.random.default_rng(0).permutation(len(held["train_y"]))
    cut = len(order) // 5
    fresh = ~held["test_dup_of_train"]
    out.mkdir(parents=True, exist_ok=True)
    names = {"class_names": held["class_names"]}
    for name, x, y in (
        ("train", held["train_x"][order[cut:]], held["train_y"][order[cut:]]),
        ("test", held["train_x"][order[:cut]], held["train_y"][order[:cut]]),
        ("official", held["test_x"][fresh], held["test_y"][fresh]),
    ):
        np.savez_compressed(out / f"{name}.npz", x=x, y=y, **names)


def dolly(source: Path, out: Path) -> None:
    keys = {"instruction": "instruction", "context": "input", "response": "output", "category": "category"}
    split([{ours: row[theirs] for theirs, ours in keys.items()} for row in read(source)], out)


def medquad(rows: list[Row], out: Path) -> None:
    split(
        [{"instruction": x["question"], "input": "", "output": x["answer"], "source": x["source"]} for x in rows], out
    )


def medquad_types(rows: list[Row], out: Path, kinds: int = 8, characters: int = 200) -> None:
    frequent = {kind for kind, _ in Counter(x["qtype"] for x in rows).most_common(kinds)}
    split(
        [
            {"text": x["answer"][:characters], "label": x["qtype"], "source": x["source"]}
            for x in rows
            if x["qtype"] in frequent
        ],
        out,
    )


def split(rows: list[Row], out: Path) -> None:
    """Write a twentieth of the rows, drawn at random, as test data and the others as training data."""
    order = np.random.default_rng(0).permutation(len(rows))
    cut = len(rows) // 20
    out.mkdir(parents=True, exist_ok=True)
    write(out / "test.jsonl", [rows[i] for i in sorted(order[:cut])])
    write(out / "train.jsonl", [rows[i] for i in sorted(order[cut:])])


def superni(source: Path, out: Path, arguments: argparse.Namespace) -> None:
    tasks = {row["task"]: row for row in read(source / "tasks.jsonl.gz")}
    train = by_task(read(source / "train.jsonl.gz"), tasks, arguments.longest)
    held = by_task(read(source / "train_heldout.jsonl.gz"), tasks, arguments.longest)
    test = by_task(read(source / "test.jsonl.gz"), tasks, arguments.longest)
    seen = pick({t: rows for t, rows in train.items() if len(held.get(t, ())) >= 10}, tasks, arguments.clients, 80)
    apart = pick(test, tasks, arguments.unseen, 30)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "train.jsonl", [row for t in seen for row in train[t][:100]])
    write(out / "test.jsonl", [row for t in seen for row in held[t][:20]])
    write(out / "unseen.jsonl", [row for t in apart for row in test[t][:12]])
    print(f"{len(seen)} training tasks, {len(apart)} unseen tasks: {', '.join(seen)} | {', '.join(apart)}")


def by_task(rows: list[Row], tasks: dict[str, Row], longest: int) -> dict[str, list[Row]]:
    """Return the rows that are short enough, with their task's instruction, by task."""
    short: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        instruction = tasks[row["task"]]["instruction"]
        if len(instruction) + len(row["input"]) <= longest and len(row["target"]) <= 60:
            short[row["task"]].append(
                {"task": row["task"], "instruction": instruction, "input": row["input"], "output": row["target"]}
            )
    return short


def pick(rows: dict[str, list[Row]], tasks: dict[str, Row], num: int, least: int) -> list[str]:
    """Return `num` tasks with at least `least` rows, one of each category in turn, so that the clients differ."""
    categories: dict[str, list[str]] = defaultdict(list)
    for task in sorted(rows):
        if len(rows[task]) >= least:
            categories[tasks[task]["category"]].append(task)
    chosen: list[str] = []
    depth = 0
    while len(chosen) < num and any(len(group) > depth for group in categories.values()):
        chosen += [group[depth] for _, group in sorted(categories.items()) if len(group) > depth]
        depth += 1
    return sorted(chosen[:num])


def read(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
