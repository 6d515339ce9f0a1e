"""Examples as tensors, batched by direct indexing.

Tokens of all rows lie one after the other in a flat tensor; a batch is one gather from it.
Shapes: N rows, b rows of a batch, t the tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspan.data.encoder_decoder import PromptsAndAnswers
from fedspan.data.rows import Kind

IGNORED = -100  # the label that cross_entropy leaves out of the loss

Indices = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Token sequences: row i is ``tokens[starts[i] : starts[i] + lengths[i]]``, its prompt the first part."""

    tokens: Tensor  # (sum of lengths + longest,) int32, the tail being padding so that a gather never leaves it
    types: Tensor | None  # the same shape, int16, for tokenizers with token types
    starts: Tensor  # (N,)
    lengths: Tensor  # (N,)
    prompt_lengths: Tensor | None  # (N,), instruction data
    pad: int
    ends: tuple[int, ...] = ()  # tokens that end an answer, instruction data; the first ends those that are trained on
    num_positions: int | None = None  # the longest sequence that the base takes, where that is known
    answers: Tensor | None = None  # as tokens, true where the loss is; None: at everything after the prompt

    def right_padded(self, rows: Tensor) -> dict[str, Tensor]:
        """Return whole sequences for training, with labels at the answer tokens alone."""
        lengths = self.lengths[rows]
        places = torch.arange(int(lengths.max()))  # (t,)
        mask = places < lengths[:, None]  # (b, t)
        flat = self.starts[rows][:, None] + places
        ids = self.tokens[flat].long().masked_fill_(~mask, self.pad)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if self.types is not None:
            batch["token_type_ids"] = self.types[flat].long().masked_fill_(~mask, 0)
        if self.prompt_lengths is not None:
            later = places >= self.prompt_lengths[rows][:, None]
            answer = mask & (later if self.answers is None else self.answers[flat])
            batch["labels"] = ids.masked_fill(~answer, IGNORED)
        return batch

    def prompts(self, rows: Tensor) -> dict[str, Tensor]:
        """Return prompts that all end at the last position, where generation continues."""
        assert self.prompt_lengths is not None
        lengths = self.prompt_lengths[rows]
        longest = int(lengths.max())
        places = torch.arange(longest) - (longest - lengths)[:, None]  # (b, t), negative in the padding
        mask = places >= 0
        ids = self.tokens[self.starts[rows][:, None] + places.clamp_(min=0)].long()
        return {"input_ids": ids.masked_fill_(~mask, self.pad), "attention_mask": mask.long()}


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Examples as tensors, ready for a model, or a view of some of them. Made by :func:`encode`.

    Attributes
    ----------
    kind
        The kind of all examples.
    rows
        (len,) rows of the shared storage that this view shows.
    all_targets, all_fields
        Targets and fields of every row of the storage, as in :class:`fedspan.data.rows.Rows`.
    texts
        The token sequences of text data.
    pixels
        (N, channels, height, width) float32, of image data.
    labels
        (N,) int64 class ids, or float32 for regression; None for instruction data.
    notes
        Lines on how the data was read where that may surprise.
    """

    kind: Kind
    rows: Tensor
    all_targets: Sequence[Any]
    all_fields: Sequence[str]
    texts: Texts | PromptsAndAnswers | None
    pixels: Tensor | None
    labels: Tensor | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """Return the training batch of the rows at `indices` (at least one), as a model's ``forward`` takes it.

        Returns
        -------
        dict
            Text: ``input_ids``, ``attention_mask`` (and ``token_type_ids`` where the tokenizer has them),
            each (b, t) and padded on the right; images: ``pixel_values`` (b, channels, height, width).
            ``labels`` is (b, t) with -100 outside the answer for instruction data, otherwise (b,). For an
            encoder-decoder the labels have the answers' own length, and there is ``decoder_input_ids``.
        """
        rows = self._rows(indices)
        if self.texts is not None:
            batch = self.texts.right_padded(rows)
        else:
            assert self.pixels is not None
            batch = {"pixel_values": self.pixels[rows]}
        if self.labels is not None:
            batch["labels"] = self.labels[rows]
        return batch

    def prompts(self, indices: Indices) -> dict[str, Tensor]:
        """Return the prompts of instruction data, padded on the left for generation.

        Token by token they are the sequences of :meth:`batch` up to the answer; of a conversation, the last one.

        Returns
        -------
        dict
            ``input_ids`` and ``attention_mask``, each (b, t). For an encoder-decoder these are padded on the right,
            and ``decoder_input_ids`` begin the answer.

        Raises
        ------
        ValueError
            For other data.
        """
        if self.texts is None or self.texts.prompt_lengths is None:
            raise ValueError(f"{self.kind} data has no prompts: expected instruction data")
        return self.texts.prompts(self._rows(indices))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (len,) int64; images count as 1."""
        return torch.ones_like(self.rows) if self.texts is None else self.texts.lengths[self.rows]

    def extent(self) -> tuple[int, int, int | None]:
        """Return the largest token id, the tokens of the longest row and the largest token type of a text data set.

        The type is None where the tokenizer has no types.
        """
        assert self.texts is not None
        types = self.texts.types
        largest_type = None if types is None else int(types.max())
        return max(int(self.texts.tokens.max()), self.texts.pad), int(self.texts.lengths.max()), largest_type

    @property
    def references(self) -> list[Any]:
        """The answers, class ids or numbers that predictions are compared with."""
        return [self.all_targets[row] for row in self.rows.tolist()]

    @property
    def targets(self) -> np.ndarray:
        """The references as an array, as a label-skewed partition takes it."""
        return np.asarray(self.references)

    @property
    def fields(self) -> list[str]:
        """The task, category or source of each row, or ``""``."""
        return [self.all_fields[row] for row in self.rows.tolist()]

    def subset(self, indices: Indices) -> Encoded:
        """Return a view of the rows at `indices` (possibly none); the tensors are shared, not copied."""
        return replace(self, rows=self._rows(indices))

    def _rows(self, indices: Indices) -> Tensor:
        return self.rows[torch.as_tensor(indices, dtype=torch.int64)]
