"""Canaries: made-up rows with a random secret, which a site plants in its data to see later what a model keeps of them.

A secret is a sequence of words drawn at random from the words of the site's own data, so that every tokenizer knows
them and no secret is likelier than another before training. Beside the rows to be planted the key holds as many that
are not: what an audit finds of those is what chance finds.

Source: Carlini et al. 2019, "The Secret Sharer" (1802.08232).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedspan.config import DataConfig
from fedspan.config import load as load_config
from fedspan.data import Rows
from fedspan.data.columns import infer_kind, to_rows
from fedspan.data.conversations import column_of
from fedspan.data.files import read_files
from fedspan.data.predictions_file import original_rows
from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.files import StrPath, write_bytes
from fedspan.support.standard_json import standard

FORMAT = 1
"""Of the key file; raised whenever its layout changes."""
_VOCABULARY = 256
_PROMPT_WORDS, _SECRET_WORDS, _TEXT_WORDS = 6, 5, 8
_FEWEST_WORDS = 16
_WORD = re.compile(r"[^\W_]{2,24}")


@dataclass(frozen=True, slots=True)
class Canary:
    """One made-up row."""

    prompt: str
    """Instruction data: the instruction, with an empty input; otherwise empty."""
    secret: str
    """The answer, or the text of a classifier's row."""
    label: Any
    """The label of a classifier's row as the file has it; None for instruction data."""
    repeats: int
    """Times that it was planted; 0: it was not, and shows what chance finds."""


@dataclass(frozen=True, slots=True)
class CanaryKey:
    """The canaries of one site, and the words that their secrets were drawn from."""

    kind: Literal["instruction", "classification"]
    canaries: tuple[Canary, ...]
    vocabulary: tuple[str, ...]

    def candidates(self, canary: Canary, count: int, rng: np.random.Generator) -> list[str]:
        """Return other secrets that were as likely to be drawn, all different."""
        length = len(canary.secret.split(" "))
        found: dict[str, None] = {}
        while len(found) < count:
            secret = _secret(self.vocabulary, length, rng)
            if secret != canary.secret:
                found[secret] = None
        return list(found)

    def rows(self, canary: Canary, secrets: Sequence[str], label: int) -> Rows:
        """Return the canary's row with each of these secrets in its place.

        Parameters
        ----------
        label
            The id of its label.
        """
        if self.kind == "instruction":
            pairs = [(canary.prompt, "")] * len(secrets)
            return Rows("instruction", pairs, list(secrets), [""] * len(secrets))
        return Rows("classification", [(s,) for s in secrets], [label] * len(secrets), [""] * len(secrets))


def plant(
    data: Sequence[StrPath],
    out: StrPath,
    key: StrPath,
    *,
    count: int = 6,
    repeats: Sequence[int] = (1, 10, 50),
    seed: int | None = None,
    settings: Sequence[str] = (),
) -> CanaryKey:
    """Write a site's rows with canaries among them, and the key by which an audit finds them again.

    Parameters
    ----------
    data
        The site's files of rows: instructions with answers, or texts with labels.
    out
        A new JSONL file: the rows of `data` in their columns, then every canary as often as it is planted.
    key
        A new JSON file. It holds words of the data, and stays at the site.
    count
        Canaries to be planted; as many are made that are not.
    repeats
        How often the first, the second and so on is planted, in turns.
    seed
        None: from the system's randomness, as it must be where somebody else could guess it.
    settings
        `KEY=VALUE` of the settings on data, such as ``data.text_columns=note``.

    Raises
    ------
    FedspanError
        For files that exist, for conversations and images, and for data of too few words.
    """
    target, key_file = Path(out), Path(key)
    _check_files(target, key_file, count, repeats)
    config = load_config(None, list(settings)).data
    tables = list(read_files([str(name) for name in data], "train", config))
    if not tables:
        raise FedspanError("no data is given: expected at least one file of rows")
    made = _make(tables, config, count, repeats, np.random.default_rng(seed))
    lines = [json.dumps(standard(row), ensure_ascii=False) for row in _all_rows(tables, made, config)]
    content = {"format": FORMAT, **asdict(made)}
    write_bytes(key_file, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())
    write_bytes(target, ("\n".join(lines) + "\n").encode())
    return made


def _check_files(out: Path, key: Path, count: int, repeats: Sequence[int]) -> None:
    if out.suffix.lower() != ".jsonl":
        raise FedspanError(f"--out {out}: expected a file that ends in .jsonl")
    for option, path in (("--out", out), ("--key", key)):
        if path.exists():
            raise FedspanError(f"{option} {path} exists: expected a new file")
    if out.resolve() == key.resolve():
        raise FedspanError(f"--key {key}: expected another file than --out")
    if count < 1 or not repeats or min(repeats) < 1:
        raise FedspanError(f"count = {count}, repeats = {list(repeats)}: expected 1 or more")


def _make(
    tables: Sequence[Table], config: DataConfig, count: int, repeats: Sequence[int], rng: np.random.Generator
) -> CanaryKey:
    kind = infer_kind(tables[0], config)
    if kind == "image":
        raise FedspanError(f"{tables[0].source} holds images: expected texts, since secrets are made of words")
    if column_of(tables[0], config) is not None and kind == "instruction":
        raise FedspanError(f"{tables[0].source} holds conversations: expected instructions with answers")
    rows = [to_rows(table, kind, config) for table in tables]
    texts = [str(x) for part in rows for x in (part.targets if kind == "instruction" else _first(part))]
    vocabulary = _vocabulary(texts, rng)
    asked = _vocabulary([" ".join(map(str, x)) for part in rows for x in part.inputs], rng)
    labels = sorted({str(x) for part in rows for x in part.targets}) if kind == "classification" else []
    by_name = {str(x): x for part in rows for x in part.targets} if labels else {}
    canaries = []
    for place in range(2 * count):
        times = repeats[place % len(repeats)] if place < count else 0
        prompt = _secret(asked, _PROMPT_WORDS, rng) if kind == "instruction" else ""
        words = _SECRET_WORDS if kind == "instruction" else _TEXT_WORDS
        label = _plain(by_name[labels[int(rng.integers(len(labels)))]]) if labels else None
        canaries.append(Canary(prompt, _secret(vocabulary, words, rng), label, times))
    return CanaryKey(kind, tuple(canaries), vocabulary)


def _first(rows: Rows) -> list[str]:
    return [" ".join(map(str, value)) for value in rows.inputs]


def _vocabulary(texts: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    words = sorted({word for text in texts for word in _WORD.findall(text)})
    if len(words) < _FEWEST_WORDS:
        raise FedspanError(
            f"the texts hold {len(words)} different words: expected at least {_FEWEST_WORDS} to make secrets of"
        )
    chosen = rng.choice(len(words), min(_VOCABULARY, len(words)), replace=False)
    return tuple(words[i] for i in sorted(chosen.tolist()))


def _secret(words: Sequence[str], length: int, rng: np.random.Generator) -> str:
    return " ".join(words[i] for i in rng.integers(len(words), size=length).tolist())


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _all_rows(tables: Sequence[Table], key: CanaryKey, config: DataConfig) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of the tables in their own columns, then the planted canaries."""
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    yield from original_rows(tables, names)
    for canary in key.canaries:
        for _ in range(canary.repeats):
            yield _columns(canary, key.kind, config, names)


def _columns(canary: Canary, kind: str, config: DataConfig, names: Sequence[str]) -> dict[str, Any]:
    """Return a canary in the columns of the data; other columns are left out."""
    if kind == "classification":
        column = next((name for name in (*config.text_columns, "text", "sentence") if name in names), None)
        if column is None or len(config.text_columns) > 1 or "sentence2" in names:
            raise FedspanError("a canary is one text: expected data.text_columns to name one column, or `text`")
        return {column: canary.secret, config.label_column: canary.label}
    row = {config.instruction_column or config.input_column: canary.prompt}
    if config.instruction_column and config.input_column in names:
        row[config.input_column] = ""
    return row | {config.output_column: canary.secret}


def label_id(canary: Canary, names: Sequence[str] | None) -> int:
    """Return the id of a canary's label; 0 for instruction data.

    Raises
    ------
    FedspanError
        For a label that the model does not know.
    """
    text = str(canary.label)
    if canary.label is None:
        return 0
    if names is not None and text in names:
        return list(names).index(text)
    if text.isdecimal() and (names is None or int(text) < len(names)):
        return int(text)
    raise FedspanError(f"the key has the label {text!r}: expected one of {', '.join(names or ())}")


def read_key(path: Path) -> CanaryKey:
    """Read a key file.

    Raises
    ------
    FedspanError
        When it is not one, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise FedspanError(f"{path} is a key of format {content['format']}: expected {FORMAT}")
        canaries = tuple(Canary(c["prompt"], c["secret"], c["label"], int(c["repeats"])) for c in content["canaries"])
        kind = content["kind"]
        if kind not in ("instruction", "classification") or len(content["vocabulary"]) < _FEWEST_WORDS:
            raise ValueError("an unknown kind, or too few words")
        return CanaryKey(kind, canaries, tuple(map(str, content["vocabulary"])))
    except FedspanError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error, 100)
        raise FedspanError(f"{path} is no key of canaries ({reason}): expected the file of --key") from None
