"""What the package makes of one family: two short federations, held against plain PEFT and transformers.

Rows of eight tokens, batches of four and two clients a pass: a layer that takes the tokens for the rows finds as many
of the one as of the other. Some rows are shorter, so that there is padding too.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import torch.nn.functional as F
from families import Family
from torch import Tensor

from fedspan import config as settings
from fedspan.adapters import peft_folder
from fedspan.data import Encoded, Rows, encode
from fedspan.models import load_processor
from fedspan.models.encoder_decoder import decoder_start
from fedspan.runs import execution
from fedspan.runs.events import Event
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

LENGTH = 8
CLOSE = {"float32": 2e-4, "bfloat16": 3e-2, "float16": 1e-2}
"""Relative error of a loss or of an update."""


@dataclass(frozen=True, slots=True)
class Findings:
    """One row of the table."""

    family: str
    kind: str
    layers: str
    glora: str
    fedftg: str
    cohort: str
    remark: str = ""

    @property
    def wrong(self) -> list[str]:
        """The cells that no row of the table may have."""
        return [cell for cell in (self.glora, self.fedftg, self.cohort) if cell.startswith(("wrong", "crash"))]


def study(family: Family, folder: Path) -> Findings:
    """Run GLoRA twice and FedFTG once over this family, and compare."""
    base = family.save(folder / "base")
    data = _write_data(family, folder)
    notes: list[str] = []
    glora = _attempt(lambda: _glora(family, base, data, folder, notes))
    cohort = _attempt(lambda: _cohort(family, base, data, folder)) if glora == "yes" else "–"
    fedftg = _attempt(lambda: _fedftg(family, base, data, folder))
    return Findings(family.name, family.kind, family.layers, glora, fedftg, cohort, "; ".join(notes))


def _attempt(work: Any) -> str:
    """Return what came of it: what `work` returns, the reason of a refusal, or a crash."""
    try:
        return str(work())
    except Refused as refusal:
        return f"refused: {refusal}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return f"crash: {type(error).__name__}: {first} ({Path(last.filename).name}:{last.lineno})"


class Refused(Exception):
    """A run that was refused before anything was trained, with one line."""


def _run(config: Any, out: Path, events: list[Event] | None = None) -> Any:
    seen: list[Event] = [] if events is None else events
    try:
        return execution.run(config, out, seen.append)
    except FedspanError as error:
        if any(event.kind == "start" for event in seen):
            raise RuntimeError(f"refused after the start: {error}") from error
        if "\n" in str(error):
            raise RuntimeError(f"a refusal of several lines: {error}") from error
        raise Refused(str(error)) from error


def _config(family: Family, base: Path, data: Mapping[str, Path], name: str, /, **sections: Any) -> Any:
    images = family.kind == "image"
    text = {"template": "{instruction}", "input_column": ""} if family.kind == "instruction" else {}
    tree: dict[str, Any] = {
        "model": {"dtype": family.dtype},
        "data": {"train": [str(data["train"])], "test": [str(data["test"])], **text},
        "federation": {"num_clients": 3, "participation": 1.0, "ranks": [1, 2, 4]},
        "local": {"steps": 2, "batch_size": 4, "learning_rate": 0.05, "optimizer": "sgd"},
        "evaluation": {"base": False, "per_rank": False, "max_new_tokens": 1},
        "engine": {"name": "sequential"},
    }
    if images:
        tree["data"]["kind"] = "image"
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    changed = {k: v for k, v in tree.items() if k != "data"}
    made = tiny.config(base, data["train"], name, **changed)
    raw = made.model_dump(mode="python", exclude_unset=True)
    raw["data"] = {"task": "files", "max_length": 32, **tree["data"]}
    return settings.from_mapping(raw)


def _glora(family: Family, base: Path, data: Mapping[str, Path], folder: Path, notes: list[str]) -> str:
    events: list[Event] = []
    result = _run(_config(family, base, data, "glora", adapter=family.adapter), folder / "glora", events)
    lines = [event.data["line"] for event in events if event.kind == "note"]
    notes += [line for line in lines if not line.startswith("a new head is drawn")]
    model = plain(family, base)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(model, str(result.adapter)).eval()
    _check_trained(result.adapter)
    return _compare(family, base, data, result, loaded)


def _check_trained(path: Path) -> None:
    """Check that two rounds moved something."""
    adapter = peft_folder.load(path)
    if not any(bool(f.b.any()) for f in adapter.factors.values()):
        raise AssertionError("no adapter was trained")


def _fedftg(family: Family, base: Path, data: Mapping[str, Path], folder: Path) -> str:
    method = {"name": "fedftg", "galore_rank": 2}
    config = _config(family, base, data, "fedftg", method=method, local={"optimizer": "adamw", "learning_rate": 0.01})
    result = _run(config, folder / "fedftg")
    return _compare(family, base, data, result, plain(family, folder / "fedftg" / "model", "float32"))


def _cohort(family: Family, base: Path, data: Mapping[str, Path], folder: Path) -> str:
    engine = {"name": "cohort", "cohort_size": 2}
    config = _config(family, base, data, "glora", engine=engine, adapter=family.adapter)
    try:
        together = _run(config, folder / "cohort")
    except Refused as refusal:
        reason = str(refusal).removeprefix("engine.name = 'cohort': ")
        return f"one by one: {reason.removesuffix('; expected auto or sequential')}"
    first, second = (_tensors(path) for path in (folder / "glora" / "adapter", together.adapter))
    error = _distance(first, second)
    return "yes" if error < CLOSE[family.dtype] else f"wrong: the updates differ by {error:.1e}"


def _tensors(path: Path) -> dict[str, Tensor]:
    adapter = peft_folder.load(path)
    products = {name: f.scaling * (f.b.float() @ f.a.float()) for name, f in adapter.factors.items()}
    return {**products, **{name: t.float() for name, t in adapter.dense.items()}}


def _distance(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    assert x.keys() == y.keys()
    apart = sum(float((x[name] - y[name]).square().sum()) for name in x)
    whole = sum(float(x[name].square().sum()) for name in x)
    return float((apart / whole) ** 0.5) if whole else 0.0


def _compare(family: Family, base: Path, data: Mapping[str, Path], result: Any, model: Any) -> str:
    """Hold the reported loss against the saved result's, computed one example at a time by plain libraries."""
    summary = json.loads((result.out / "summary.json").read_text())
    reported = summary["metrics"]["server"]["loss"]
    own = plain_loss(model, _encoded(family, base, data["test"]))
    return (
        "yes"
        if abs(reported - own) <= CLOSE[family.dtype] * max(own, 0.1)
        else (f"wrong: reported {reported:.6f}, saved {own:.6f}")
    )


def plain(family: Family, path: Path, dtype: str | None = None) -> Any:
    """Load what is in `path` as a user of transformers does."""
    import transformers as t

    auto = {
        "instruction": t.AutoModelForSeq2SeqLM if family.answers else t.AutoModelForCausalLM,
        "classification": t.AutoModelForSequenceClassification,
        "image": t.AutoModelForImageClassification,
    }[family.kind]
    labels = {} if family.kind == "instruction" else {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = auto.from_pretrained(str(path), dtype=getattr(torch, dtype or family.dtype), **labels).eval()
    model.config.pad_token_id = 0
    return model


@torch.no_grad()
def plain_loss(model: Any, test: Encoded) -> float:
    """Return the mean loss over answer tokens or examples, one example at a time."""
    total, count = 0.0, 0
    for i in range(len(test)):
        batch = test.batch([i])
        labels = batch.pop("labels")
        if model_is_half_with_images(model, batch):
            batch["pixel_values"] = batch["pixel_values"].to(next(model.parameters()).dtype)
        if "decoder_input_ids" in batch:
            del batch["decoder_input_ids"]  # the model makes its own
            total += float(model(**batch, labels=labels).loss) * labels.numel()
            count += labels.numel()
            continue
        logits = model(**batch).logits.float()
        if test.kind == "instruction":
            total += float(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
            count += int((labels[0, 1:] != -100).sum())
        else:
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += 1
    return total / count


def model_is_half_with_images(model: Any, batch: Mapping[str, Tensor]) -> bool:
    return "pixel_values" in batch and next(model.parameters()).dtype != torch.float32


def _encoded(family: Family, base: Path, path: Path) -> Encoded:
    processor = load_processor(str(base), family.kind)
    config = settings.DataConfig(template="{instruction}", max_length=32)
    if family.kind == "image":
        held = np.load(path)
        return encode(
            Rows("image", list(held["images"]), held["labels"].tolist(), [""] * len(held["labels"])), processor, config
        )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if family.kind == "instruction":
        data = Rows(
            "instruction", [(r["instruction"], "") for r in rows], [r["output"] for r in rows], [""] * len(rows)
        )
    else:
        data = Rows(
            "classification", [(r["text"],) for r in rows], ["xyz".index(r["label"]) for r in rows], [""] * len(rows)
        )
    return encode(data, processor, config, decoder=decoder_start(str(base), family.kind, processor))


def _write_data(family: Family, folder: Path) -> dict[str, Path]:
    if family.kind == "image":
        return {name: _images(folder / f"{name}.npz", size, family.side) for name, size in (("train", 18), ("test", 5))}
    write = {"instruction": _instructions, "classification": _texts}[family.kind]
    own = LENGTH - 1 - family.end  # the tokenizer adds a start, and may add an end
    train = write(27, [own] * 3 + [own - 2])
    return {
        "train": tiny.write_jsonl(folder / "train.jsonl", train),
        "test": tiny.write_jsonl(folder / "test.jsonl", write(6, [3, 7, 5, 10])),
    }


def _letters(length: int, *key: object) -> str:
    drawn = torch.randint(0, 26, (length,), generator=generator("families", *key))
    return "".join(tiny.CHARACTERS[11 + int(j)] for j in drawn)


def _texts(count: int, lengths: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        length = lengths[i % len(lengths)]
        rows.append({"text": _letters(length - 2, count, i) + "XYZ"[i % 3] * 2, "label": "xyz"[i % 3]})
    return rows


def _instructions(count: int, lengths: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        prompt = _letters(lengths[i % len(lengths)] - 2, count, i)
        rows.append({"instruction": prompt, "output": prompt[0]})
    return rows


def _images(path: Path, count: int, side: int) -> Path:
    rng = np.random.default_rng(count)
    labels = np.arange(count) % 3
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] //= 3
    np.savez(path, images=images, labels=labels)
    return path


def as_json(findings: Findings) -> str:
    return json.dumps(asdict(findings), ensure_ascii=False)
