"""The facts that the files of a base state beside its weights, as far as data and evaluation depend on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The facts that a base states; the defaults are those of a base that states nothing."""

    end_tokens: tuple[int, ...] = ()
    """Ids of the tokens that end a generated text, the usual one first."""
    vocabulary: int | None = None
    """Rows of its embedding: token ids are below it."""
    num_positions: int | None = None
    """Longest sequence in tokens; None where there is no limit, or none is stated."""
    num_labels: int | None = None
    """Number of classes of its head."""
    label_names: tuple[str, ...] | None = None
    """Name of every class of its head, in the order of their ids, or those that transformers makes up (`LABEL_0`)."""
    encoder: str | None = None
    """Type of a model that reads a text in both directions and writes none, such as `bert`; None for any other."""
    classifies_at: int | None = None
    """Id of the token from whose last occurrence an encoder-decoder classifies."""


NOTHING_STATED = BaseFacts()
