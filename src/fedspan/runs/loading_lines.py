"""Lines of Python that load the result of a run, as they can be pasted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedspan.adapters.peft_folder import LABELS_NAME
from fedspan.models import resolve
from fedspan.runs.context import RunContext

_CLASSES = {
    "instruction": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}


def loading_lines(context: RunContext) -> tuple[str, ...]:
    """Return the lines that load the run's adapter, its first client's adapter, or its model; none: there is nothing.

    A base is freshly loaded with the labels of the run, whose head is in the adapter. Paths of the run are absolute, so
    that the lines work in every working folder.
    """
    name = _CLASSES[context.prepared.corpus.kind]
    config: Any = context.model.model.config
    if context.prepared.corpus.kind == "instruction" and config.is_encoder_decoder:
        name = "AutoModelForSeq2SeqLM"
    out = context.out.absolute()
    if (out / "model").exists():
        return f"from transformers import {name}", f"model = {name}.from_pretrained({str(out / 'model')!r})"
    folder = _adapter(out, context)
    if folder is None:
        return ()
    options, after = ", dtype='float32'", ""
    imports = [f"from transformers import {name}", "from peft import PeftModel"]
    if (folder / LABELS_NAME).exists():
        imports.append("import json")
        options += f", ignore_mismatched_sizes=True, **json.load(open({str(folder / LABELS_NAME)!r}))"
        # Keys of JSON are text, and transformers turns them into numbers in a file of its own alone: without this, its
        # pipelines look up a class by its number in vain.
        after = "; base.config.id2label = dict(enumerate(base.config.label2id))"
    return (
        "; ".join(sorted(imports, key=len, reverse=True)),
        f"base = {name}.from_pretrained({resolve(context.config.model.name)!r}{options}){after}",
        f"model = PeftModel.from_pretrained(base, {str(folder)!r})",
    )


def _adapter(out: Path, context: RunContext) -> Path | None:
    """Return the run's adapter, or its first client's where each has one."""
    folders = (out / "adapters" / client.client_id for client in context.clients)
    return next((folder for folder in (out / "adapter", *folders) if folder.exists()), None)
