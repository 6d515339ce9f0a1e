"""The record of how a run read its base: labels, ends of answers, the settings of generation."""

from __future__ import annotations

from typing import Any, TypedDict

from fedspan.client.generation import greedy_settings
from fedspan.data.chat import DATE
from fedspan.data.conversations import conversations_of
from fedspan.data.label_names import label_entries
from fedspan.runs.context import RunContext
from fedspan.support import standard_json


class EncodingEntry(TypedDict):
    """The way in which texts became tokens and answers."""

    max_length: int
    """Maximum sequence length that was used."""
    end_token: str | None
    """Token that ends an answer in training; None where nothing is generated."""
    template_date: str | None
    """Date that the chat template was given as today's; None without a chat template."""
    generation: dict[str, Any] | None
    """Settings of the evaluation's generation, by transformers' names; None where nothing is generated."""


def encoding_entry(context: RunContext) -> EncodingEntry:
    """Return how the run's texts became tokens and answers."""
    texts, config = context.data["train"].texts, context.prepared.config
    answers = texts is not None and bool(texts.ends)
    end = context.processor.convert_ids_to_tokens(texts.ends[0]) if texts is not None and answers else None
    settings = greedy_settings(texts, context.config.evaluation.max_new_tokens) if answers else None
    templated = config.template == "chat" or (
        conversations_of(context.prepared.corpus.train) is not None and bool(context.processor.chat_template)
    )
    return {
        "max_length": config.max_length,
        "end_token": end,
        "template_date": f"{DATE:%Y-%m-%d}" if answers and templated else None,
        "generation": settings,
    }


def label_names(context: RunContext) -> list[str] | None:
    """Return the name of every class in the order of their ids; None where there are no classes."""
    corpus = context.prepared.corpus
    if corpus.num_labels < 2:
        return None
    return list(corpus.label_names or (f"LABEL_{i}" for i in range(corpus.num_labels)))


def labels_file(context: RunContext) -> bytes | None:
    """Return the labels as the entries of a configuration of transformers, in JSON; None where there are none."""
    corpus = context.prepared.corpus
    if not corpus.num_labels:
        return None
    entries = label_entries(corpus.num_labels, corpus.label_names)
    return (standard_json.dumps(entries, indent=2) + "\n").encode()
