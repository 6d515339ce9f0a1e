"""What a server asks of all its clients' updates at once, when it must not hold them at once.

Every server rule here that needs each client's factors needs them only through weighted sums of small products. A
rule written as a conversation (ask, get the sums, ask again, answer) runs unchanged over updates in memory, over a
spool of files read once per pass, over a tree of servers that add up their children's sums, and over 100,000 clients.

Shapes: X_k (m, n) client k's update of one module, of rank r_k; x (n, l), y (m, l) with l small.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedspan.methods.messages import Diagnostics, Tensors


@dataclass(frozen=True, slots=True)
class Question:
    """One weighted sum over the clients of a round.

    ``times``: Σ p_k X_k x (m, l).  ``adjoint``: Σ p_k X_kᵀ y (n, l).  ``columns``: Σ p_k P_k y (m, l) with P_k the
    projector on the column space of X_k.  ``rows``: Σ p_k P_k x (n, l) with P_k the projector on the row space.
    """

    kind: Literal["times", "adjoint", "columns", "rows"]
    x: Tensor


Questions = Mapping[str, tuple[Question, ...]]
"""Module -> what is asked of it in one pass."""
Answers = Mapping[str, tuple[Tensor, ...]]
"""Module -> the sums, in the order of the questions."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a conversation ends with: the modules of the next state, and what the method measured of itself."""

    modules: Mapping[str, Tensors]
    diagnostics: Diagnostics


Conversation = Generator[Questions, Answers, Outcome]
"""Yields one pass's questions, receives their answers; the same answers always lead to the same next questions."""
