"""The rows of a batch end to end inside the blocks of a transformer, so that nothing is padded there.

The model is called with a padded batch as always. Before the first block the real tokens of the hidden states are
gathered from (b, t, h) into one row (1, n, h), and after the last they are put back, with zeros where rows are padded:
embeddings before and norms, poolers and heads after see what they always see. Everything between that works token by
token needs no change: linear layers, adapters, norms. Rotations and position ids are gathered in the same way.
Attention is the one place where tokens of a row meet; there torch's `scaled_dot_product_attention` is replaced by one
call for all rows of one length, on their own part of the packed row and under their own part of the mask. So attention
costs Σ t_i², as for rows alone, no mask of n² entries is made, and nothing of one row can reach another, NaN included.

No knowledge of an architecture is built in. A trial shows which arguments of a block have a place for each token, that
gradients are those of a padded pass, and that a row of NaN changes no other row. Attention that is computed in another
way, convolutions, recurrences and blocks that count positions by themselves fail it.

Sources: packing rows without one seeing another, Krell et al. 2021 (2107.02027); passes without padding, Warner et al.
2024, ModernBERT (2412.13663). Differences: the rows of one batch are packed, not those of several; attention is
computed row by row instead of under a mask of blocks.

Shapes: b rows of t tokens, padded on the right; t_i of row i; n = Σ t_i; h the width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Recipe
from fedspan.models.blocks import BLOCK_ERRORS, NotApplicable, blocks_of, hidden_of, place_of, with_hidden
from fedspan.models.federated_model import FederatedModel
from fedspan.models.losses import pass_inputs
from fedspan.models.probes import Batch, apart, gradients, of_length, probe, tolerance

_TRIALS = ((2, 7, 2), (3, 9, 3))
"""Rows, tokens and tokens by which the first row is shorter, of the batches of the trial: a dimension of an argument
that has these sizes in both is that of the rows or of the tokens."""
_ROWS, _TOKENS = "rows", "tokens"
Roles = tuple[str | None, ...]
"""For each dimension of an argument: rows, tokens, or neither."""
Place = tuple[Any, ...]
"""A block and the place of an argument among all that it is given."""


@dataclass(slots=True)
class PackedRows:
    """The blocks of one base, which compute the rows of a batch end to end."""

    model: FederatedModel
    blocks: Sequence[nn.Module]
    roles: Mapping[Place, Roles] = field(default_factory=dict)
    """For each argument that is a tensor, what its dimensions are."""

    @contextmanager
    def packing(self, batch: Batch) -> Iterator[_Pass]:
        """Pack the rows of this batch in the pass inside."""
        one = _Pass(batch["attention_mask"], self.roles)
        prefix = self.model.prefix
        first = len(prefix.below) if prefix is not None and prefix.on else 0
        handles = []
        for number, block in enumerate(self.blocks):
            if number < first:
                continue
            enter = partial(one.enter, number, number == first)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(self.blocks[-1].register_forward_hook(one.leave))
        try:
            with _Attention(one):
                yield one
        finally:
            for handle in handles:
                handle.remove()


def find(model: FederatedModel, data: Encoded) -> PackedRows:
    """Return the blocks of a base that were found to compute packed rows as they compute padded ones.

    Adapter and dense weights are afterwards what they were; a patch is gone.

    Parameters
    ----------
    data
        Examples to take the first and the last rows of.

    Raises
    ------
    NotApplicable
        Where they do not.
    """
    if getattr(model.model.config, "is_encoder_decoder", False):
        raise NotApplicable("the base has an encoder and a decoder")
    places = (place_of(name) for name in model.layers)
    blocks = blocks_of(model.model, (place[0] for place in places if place is not None))
    if blocks is None:
        raise NotApplicable("the layers that are trained are not in one list of blocks")
    ends = [0, len(data) - 1]
    batches = []
    for rows, length, shorter in _TRIALS:
        given = data.batch([ends[i % 2] for i in range(rows)])
        batches.append(of_length(given, length, shorter, 1, data))
    before = Broadcast(model.adapter(), dense=model.dense(), recipe=Recipe())
    try:
        packed = model.packed = PackedRows(model, blocks, _roles(model, blocks, batches))
        for batch in batches:
            _check_apart(packed, batch)
            _check_same(model, batch)
    except BLOCK_ERRORS:
        raise NotApplicable("its blocks cannot be given rows end to end") from None
    finally:
        model.packed = None
        model.load(before)
    return packed


def _roles(model: FederatedModel, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> dict[Place, Roles]:
    """Return what the dimensions of the blocks' arguments are, from passes over padded batches of different sizes."""
    shapes: list[dict[Place, torch.Size]] = []

    def note(place: Place, value: Any) -> None:
        if isinstance(value, tuple | list | dict):
            for name, x in value.items() if isinstance(value, dict) else enumerate(value):
                note((*place, name), x)
        elif isinstance(value, Tensor):
            shapes[-1][place] = value.shape

    def hook(number: int, block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        note((number,), dict(enumerate(args)) | options)

    handles = [b.register_forward_pre_hook(partial(hook, i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        for batch in batches:
            shapes.append({})
            _logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    sizes = [batch["input_ids"].shape for batch in batches]
    return {
        place: tuple(
            _ROWS
            if all(s[0] == n for s, n in zip(sizes, each, strict=True))
            else _TOKENS
            if all(s[1] == n for s, n in zip(sizes, each, strict=True))
            else None
            for each in zip(*(own[place] for own in shapes), strict=True)
        )
        for place in shapes[0].keys() & shapes[1].keys()
    }


def _check_apart(packed: PackedRows, batch: Batch) -> None:
    """Check that a row of NaN changes no other row to NaN: whatever is computed from it alone, of whatever size."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    packed.model.model.eval()
    for spoiled in range(len(lengths)):
        with packed.packing(batch) as one:
            one.spoiled = spoiled
            logits = _logits(packed.model, batch)
        if not one.calls:
            raise NotApplicable("its attention is not torch's scaled_dot_product_attention")
        for row, (own, length) in enumerate(zip(logits, lengths, strict=True)):
            own = own[:length] if packed.model.kind == "instruction" else own
            if bool(own.isfinite().all()) == (row == spoiled):
                raise NotApplicable("its blocks mix the tokens of rows that lie end to end")


def _check_same(model: FederatedModel, batch: Batch) -> None:
    """Check that loss and gradients of packed rows are those of padded ones."""
    sent = probe(model, 0)
    alone, together = (gradients(model, sent, batch, packed=packed) for packed in (False, True))
    worst = apart(alone, together)
    if not worst <= tolerance(model):
        raise NotApplicable(f"gradients of rows that lie end to end differ by {100 * worst:.2g} % from padded ones")


@torch.no_grad()
def _logits(model: FederatedModel, batch: Batch) -> Tensor:
    """Return the logits of a batch, from a pass like the one that the loss is computed by."""
    logits: Tensor = model.model(**pass_inputs(model, batch)).logits
    return logits


class _Pass:
    """One pass over the packed rows of a batch, the longest first, so that rows of one length lie beside each other."""

    def __init__(self, mask: Tensor, roles: Mapping[Place, Roles]) -> None:
        self.roles = roles
        self.shape = mask.shape  # (b, t)
        lengths, order = mask.sum(dim=1).sort(descending=True, stable=True)
        places = (torch.arange(mask.shape[1]) < lengths[:, None]).flatten().nonzero().flatten()
        self.positions = places % mask.shape[1]  # (n,) of each token in its row
        self.rows = order[places // mask.shape[1]]  # (n,)
        self.flat = self.rows * mask.shape[1] + self.positions  # (n,)
        self.alike = _alike(lengths.tolist(), order)
        """Each length, the longest first, with the rows that have it."""
        self.active = False
        """Blocks are being computed."""
        self.calls = 0
        """Calls of attention."""
        self.masks: dict[int, list[tuple[Tensor | None, bool]]] = {}
        """By the memory of what stands for a mask: for each length the mask of its rows, and whether it is causal."""
        self.gathered: dict[int, tuple[Tensor, Tensor]] = {}
        """By identity of a tensor that was given to a block: itself, and what is given in its place."""
        self.spoiled: int | None = None
        """A row whose hidden states are replaced by NaN, in a trial."""

    def enter(
        self, number: int, first: bool, block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a block packed arguments in place of padded ones; a forward pre-hook."""
        hidden = hidden_of(args, options)
        if first:
            self.active = True
            hidden = hidden.flatten(0, 1).index_select(0, self.flat)[None]
            if self.spoiled is not None:
                hidden = hidden.masked_fill((self.rows == self.spoiled)[:, None], torch.nan)
        args, options = with_hidden(args, options, torch.empty(0))  # which is packed already, so not looked at
        args = tuple(self._packed((number, i), value) for i, value in enumerate(args))
        options = {name: self._packed((number, name), value) for name, value in options.items()}
        return with_hidden(args, options, hidden)

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the padded hidden states in place of the last block's; a forward hook."""
        self.active = False
        packed = output if isinstance(output, Tensor) else output[0]
        b, t = self.shape
        padded = packed.new_zeros(b * t, packed.shape[-1]).index_copy(0, self.flat, packed[0]).unflatten(0, (b, t))
        return padded if isinstance(output, Tensor) else (padded, *output[1:])

    def _packed(self, place: Place, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._packed((*place, i), x) for i, x in enumerate(value))
        if isinstance(value, dict):
            return {name: self._packed((*place, name), x) for name, x in value.items()}
        if not isinstance(value, Tensor) or not value.numel():
            return value
        held = self.gathered.get(id(value))
        if held is None:
            held = self.gathered[id(value)] = (value, self._gathered(place, value))
        return held[1]

    def _gathered(self, place: Place, value: Tensor) -> Tensor:
        """Return a tensor that a block is given for a padded batch as it is for a packed row."""
        roles = self.roles.get(place)
        if _is_mask(value, self.shape) and (roles is None or roles[-1] == _TOKENS):
            return self._mask(value)
        if roles is None:
            raise ValueError(f"an argument of a block that the trial did not have: {place[1:]}")
        dims = [dim for dim, role in enumerate(roles) if role == _TOKENS]
        if not dims and _ROWS not in roles:
            return value
        if len(dims) != 1 or (_ROWS in roles and roles[:2] != (_ROWS, _TOKENS)):
            raise ValueError(f"an argument of a block of the shape {tuple(value.shape)}")
        if _ROWS in roles:
            return value.flatten(0, 1).index_select(0, self.flat)[None]
        return value.index_select(dims[0], self.positions)

    def _mask(self, mask: Tensor) -> Tensor:
        """Return a tensor of the shape of a packed mask that stands for it and takes no room; attention knows it."""
        stand_in = torch.zeros(1, dtype=mask.dtype).expand(1, 1, len(self.flat), len(self.flat))
        own = [_own_mask(mask, rows, length) for length, rows in self.alike]
        self.masks[_memory(stand_in)] = own
        return stand_in

    def check_count(self, given: Sequence[Any]) -> None:
        """Refuse a block that counts the tokens of its row in a trial: those of several rows would get high positions.

        Such positions may count only beyond more tokens than a trial has, as where attention is sharpened with length.
        """
        if self.spoiled is not None and any(type(end) is int and end == len(self.flat) for end in given):
            raise NotApplicable("its blocks count positions by themselves")

    def attention(
        self,
        query: Tensor,  # (1, heads, n, d)
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Return the attention of every row within itself, (1, heads, n, d)."""
        self.calls += 1
        if any(x.shape[0] != 1 or x.shape[-2] != len(self.flat) for x in (query, key, value)):
            raise ValueError(f"attention over {tuple(query.shape)}: expected (1, heads, {len(self.flat)}, width)")
        masks = [(None, is_causal)] * len(self.alike) if attn_mask is None else self.masks[_memory(attn_mask)]
        sizes = [len(rows) * length for length, rows in self.alike]
        each: Any = zip(*(x.split(sizes, dim=2) for x in cast(Any, (query, key, value))), strict=True)
        parts = []
        for (length, rows), (mask, causal), qkv in zip(self.alike, masks, each, strict=True):
            alone = len(rows) == 1
            q, k, v = qkv if alone else (x.unflatten(2, (-1, length)).squeeze(0).transpose(0, 1) for x in qkv)
            part = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, **options)  # (rows, heads, …)
            parts.append(part if alone else part.transpose(0, 1).flatten(1, 2)[None])
        return torch.cat(parts, dim=2)


class _Attention(TorchFunctionMode):
    """A context in which attention inside the blocks is computed row by row."""

    def __init__(self, one: _Pass) -> None:
        super().__init__()
        self.one = one

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func is F.scaled_dot_product_attention and self.one.active:
            return self.one.attention(*args, **options)
        if func is torch.arange and self.one.active:
            self.one.check_count((*args, *options.values()))
        return func(*args, **options)


def _alike(lengths: Sequence[int], order: Tensor) -> list[tuple[int, Tensor]]:
    """Return each of the lengths, which are in order, with the rows that have it."""
    found: list[tuple[int, Tensor]] = []
    for length, own in groupby(zip(lengths, order.tolist(), strict=True), key=itemgetter(0)):
        found.append((length, torch.tensor([row for _, row in own])))
    return found


def _memory(tensor: Tensor) -> int:
    """Return the place of a tensor's memory, which is also that of its views."""
    return tensor.untyped_storage().data_ptr()


def _is_mask(value: Tensor, shape: torch.Size) -> bool:
    """Return whether an argument has the shape of a mask, (1 or b, 1 or heads, 1 or t, t)."""
    b, t = shape
    return value.ndim == 4 and value.shape[0] in (1, b) and value.shape[2] in (1, t) and value.shape[3] == t


def _own_mask(mask: Tensor, rows: Tensor, length: int) -> tuple[Tensor | None, bool]:
    """Return the part of a mask that is about these rows of one length, and whether it is that of causal attention.

    There is none where it hides nothing, and none where it hides later tokens alone: torch has faster kernels for that.
    """
    own = (mask if len(mask) == 1 else mask[rows])[:, :, :length, :length]
    visible = own if own.dtype == torch.bool else own == 0
    if visible.all():
        return None, False
    if visible.shape[2] == length and torch.equal(visible, torch.ones_like(visible).tril()):
        hides = True if own.dtype == torch.bool else bool((own[~visible] <= torch.finfo(own.dtype).min).all())
        if hides:
            return None, True
    return own, False
