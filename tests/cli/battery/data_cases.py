"""Files of data: tables, labels, images, templates."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tables import Case, Content, deep, npz, rows


def _data(subject: str, name: str, content: Content, *parts: str, more: str = "") -> Case:
    return Case(subject, f"RUN --set data.train={name} {more}".strip(), parts, {name: content})


def _images(content: Content, *parts: str) -> Case:
    return _data("images", "x.npz", content, *parts, more="--set model.name=vit")


def _folder(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        path.mkdir()
        make(path)

    return build


def _table(path: Path) -> None:
    (path / "a.csv").write_text("text,label\na,x\n")


def _classes(path: Path) -> None:
    for name in ("x", "y"):
        (path / name).mkdir()
        (path / name / "1.png").write_bytes(b"no picture")


GREY = np.zeros((12, 16, 16), dtype=np.uint8)
LABELS = np.arange(12) % 2
GOOD = [{"text": f"word {i}", "label": "xy"[i % 2]} for i in range(12)]
TASKS = [{"instruction": "copy", "input": str(i), "output": str(i)} for i in range(12)]
LLAMA = "--set model.name=llama"

DATA = [
    # Paths
    Case("paths", "RUN --set data.train=none.csv", ("none.csv",)),
    Case("paths", "RUN --set data.train=none/at/all.jsonl", ("none/at/all.jsonl",)),
    Case("paths", "RUN --set 'data.train=[]'", ("data.train",)),
    Case("paths", 'RUN --set \'data.train=["texts.jsonl", "none.jsonl"]\'', ("none.jsonl",)),
    Case("paths", 'RUN --set \'data.train=["texts.jsonl", "texts.jsonl"]\'', ("texts.jsonl twice", "each file once")),
    Case("paths", "RUN --set data.test=none.csv", ("none.csv",)),
    Case("paths", "RUN --set data.unseen=none.csv", ("none.csv",)),
    Case("paths", "RUN --set data.train=", ("data.train", "at least 1 character")),
    Case("paths", "RUN --set data.train=bert", ("bert",)),
    Case("paths", "RUN --set data.train=finished/config.toml", ("config.toml",)),
    Case("paths", "RUN --set data.train=x.jsonl", ("x.jsonl",), {"x.jsonl": lambda path: path.symlink_to("nowhere")}),
    Case("paths", "RUN --set data.train=x.jsonl", ("x.jsonl",), {"x.jsonl": lambda path: path.symlink_to(path)}),
    Case("paths", "RUN --set data.train=x.jsonl", ("x.jsonl",), {"x.jsonl": os.mkfifo}),
    Case("paths", "RUN --set data.train=x.jsonl", ("x.jsonl",), {"x.jsonl": _folder(lambda path: None)}),
    Case("paths", f"RUN --set data.train={'x' * 300}.csv", ("xxx",)),
    Case("paths", "RUN --out texts.jsonl", ("texts.jsonl exists", "expected a new folder")),
    Case("paths", "RUN --out bert", ("bert exists and is not empty", "expected a new folder")),
    Case("paths", "RUN --out finished", ("fedspan resume finished",)),
    Case("paths", "RUN --out texts.jsonl/new", ("texts.jsonl",)),
    Case("paths", f"RUN --out {'y' * 300}", ("yyy",)),
    # Tables
    _data("tables", "x.csv", "", "x.csv"),
    _data("tables", "x.csv", "text,label\n", "x.csv"),
    _data("tables", "x.csv", "text,label\na,x,9\n", "x.csv"),
    _data("tables", "x.csv", "text,text\na,x\n", "x.csv"),
    _data("tables", "x.csv", "text,label\n" + ",x\n ,y\n" * 6, "'text'", "empty in every row"),
    _data(
        "tables", "x.jsonl", rows(*({**row, "output": ""} for row in TASKS)), "'output'", "empty in every", more=LLAMA
    ),
    _data("tables", "x.jsonl", rows({"prompt": "a", "chosen": "b"}), "prompt, chosen", "'messages'"),
    Case(
        "tables", "RUN --set data.train=tables", ("a.csv lies beside", "listed one by one"), {"tables": _folder(_table)}
    ),
    _data("tables", "x.csv", b"text,label\n\x00\x01,\x02\n", "x.csv"),
    _data("tables", "x.csv", "a;b\n1;2\n", "x.csv"),
    _data("tables", "x.csv", 'text,label\n"never closed,x\n', "x.csv"),
    _data("tables", "x.json", "{", "x.json"),
    _data("tables", "x.json", "[]", "x.json"),
    _data("tables", "x.json", "3", "x.json"),
    _data("tables", "x.json", '"text"', "x.json"),
    _data("tables", "x.json", "[1, 2]", "x.json"),
    _data("tables", "x.json", deep("[", "]"), "x.json"),
    _data("tables", "x.json", '{"a": ' + deep('{"a": ', "}"), "x.json"),
    _data("tables", "x.jsonl", "", "x.jsonl"),
    _data("tables", "x.jsonl", "\n\n", "x.jsonl"),
    _data("tables", "x.jsonl", "{}\n", "x.jsonl"),
    _data("tables", "x.jsonl", "[1]\n", "x.jsonl"),
    _data("tables", "x.jsonl", "null\n", "x.jsonl"),
    _data("tables", "x.jsonl", rows(*GOOD) + "{broken\n", "x.jsonl"),
    _data("tables", "x.jsonl", rows(*GOOD) + deep("[") + "\n", "x.jsonl"),
    _data("tables", "x.jsonl", rows(*GOOD, {"text": "a"}), "label"),
    _data("tables", "x.jsonl", rows(*GOOD, {"label": "x"}), "text"),
    _data("tables", "x.jsonl", rows(*GOOD, {"text": 3.5, "label": []}), "x.jsonl"),
    _data("tables", "x.jsonl", rows(GOOD[0]), "single label 'x'", "expected two or more"),
    _data("tables", "x.jsonl", b"\xff\xfe{\x00", "x.jsonl"),
    _data("tables", "x.parquet", b"PAR1 no table PAR1", "x.parquet"),
    _data("tables", "x.gz", b"\x1f\x8b broken", "x.gz"),
    _data("tables", "x.jsonl.gz", b"no archive at all", "x.jsonl.gz"),
    _data("tables", "x.txt", "hello", "x.txt"),
    _data("tables", "x.xlsx", b"PK", "x.xlsx"),
    _data("tables", "x.bin", b"\x80\x04.", "x.bin"),
    # Labels
    _data("labels", "x.jsonl", rows(*({**row, "label": None} for row in GOOD)), "label"),
    _data("labels", "x.jsonl", rows(*({**row, "label": "x"} for row in GOOD)), "x"),
    _data("labels", "x.jsonl", rows(*({**row, "label": [1, 2]} for row in GOOD)), "label"),
    _data("labels", "x.jsonl", rows(*({**row, "label": {"a": 1}} for row in GOOD)), "label"),
    _data("labels", "x.jsonl", rows(*GOOD, {"text": "a", "label": 3}), "label"),
    _data("labels", "x.jsonl", rows(*({**row, "label": float("nan")} for row in GOOD)), "label"),
    _data("labels", "x.jsonl", rows(*({**row, "label": 1e400} for row in GOOD)), "label"),
    _data("labels", "x.jsonl", rows(*({**row, "label": -1} for row in GOOD)), "-1"),
    _data("labels", "x.jsonl", rows(*({**row, "label": ""} for row in GOOD)), "label"),
    _data("labels", "x.csv", "text,label\n" + "a,1\nb,2\nc,1.0\nd,2.0\n" * 6, "'1' and '1.0'", "one number"),
    _data("labels", "x.csv", "text,label\n" + "a,0.37\nb,nan\n" * 6, "nan"),
    Case("labels", "RUN --set data.test=t.jsonl", ("zebra",), {"t.jsonl": rows({"text": "a", "label": "zebra"})}),
    # Images
    _images(b"no archive", "x.npz"),
    _images(npz(images=GREY), "labels"),
    _images(npz(labels=LABELS), "data.image_column"),
    _images(npz(images=GREY, labels=LABELS[:5]), "5"),
    _images(npz(images=GREY[0], labels=LABELS), "images 16, labels 12"),
    _images(npz(images=np.zeros((12, 16, 16, 5), np.uint8), labels=LABELS), "5"),
    _images(npz(images=np.zeros((12, 0, 16), np.uint8), labels=LABELS), "without a pixel", "(12, 0, 16)"),
    _images(npz(images=np.full((12, 16, 16), np.nan), labels=LABELS), "x.npz"),
    _images(npz(images=np.array(["a"] * 12), labels=LABELS), "x.npz"),
    _images(npz(images=np.array([{"a": 1}] * 12, dtype=object), labels=LABELS), "x.npz"),
    _images(npz(images=GREY, labels=np.zeros((12, 3))), "labels of shape (12, 3)"),
    _images(npz(images=GREY[:0], labels=LABELS[:0]), "x.npz"),
    Case("images", "RUN --set data.train=pictures --set model.name=vit", ("1.png",), {"pictures": _folder(_classes)}),
    Case("images", "RUN --set data.train=pictures", ("pictures",), {"pictures": _folder(lambda path: None)}),
    # Templates
    *(
        Case("templates", f"RUN --set data.train=tasks.jsonl {LLAMA} --set 'data.template={text}'", ("data.template",))
        for text in (
            *("no place", "{name}", "{instruction", "{instruction:>1000000000}", "{instruction:d}", "{instruction.x}"),
            *(
                "{instruction[9]}",
                "{instruction!z}",
                "{0}",
                "{}",
                "{input:{input}}",
                "{instruction:%s}",
                "{input!r:>99}",
            ),
            *("{instruction.__class__}",),
        )
    ),
    Case("templates", f"RUN --set data.train=tasks.jsonl {LLAMA} --set data.template=chat", ("chat template",)),
    Case("templates", f"RUN --set data.train=tasks.jsonl {LLAMA} --set data.max_length=1", ("data.max_length = 1",)),
    Case("templates", f"RUN --set data.train=tasks.jsonl {LLAMA} --set data.output_column=answer", ("answer",)),
    _data("templates", "x.jsonl", rows(*TASKS, {"instruction": "a", "input": "b"}), "output", more=LLAMA),
]
