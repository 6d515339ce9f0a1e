"""The computed memory of a training step is near the measured one, term by term and as a whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedspan.bench.memory import StepMemory, step_memory
from fedspan.models.build import attach
from fedspan.models.federated_model import activation_checkpointing
from fedspan.models.selection import linear_layers

SHAPE = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6}
ROWS, TOKENS, RANK = 4, 96, 4


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that operations returned and that are still alive, and the most there were at once.

    A profile's memory events were no help: a process's first profile lacked the allocations of its beginning now and
    then, and the peak with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                if storage._cdata not in self.held | given:
                    self.held.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return results

    def release(self, storage: int, size: int) -> None:
        self.held.discard(storage)
        self.now -= size


def peak(work: Callable[[], None]) -> int:
    """The most bytes that tensors held at once beside those that were there before."""
    with LiveBytes() as live:
        work()
    return live.most


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_what_is_computed(checkpointing: bool) -> None:
    """Activations, gradients and the optimizer's state of a Llama, within a sixth of what torch allocates."""
    base = tiny.make("llama", **SHAPE)
    computed = step_memory(base.config, rank=RANK, batch_size=ROWS, tokens=TOKENS, checkpointing=checkpointing)
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    assert computed.base == weights
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    model, _ = attach(base, linear_layers(base, ()), RANK, False, 0.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    if checkpointing:
        activation_checkpointing(model, "enable")({"use_reentrant": False})
    ids = torch.randint(4, 60, (ROWS, TOKENS))
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    numbers = sum(p.numel() for p in trained)
    measured = peak(step)  # beside weights and moments, which were there before
    assert computed.adapters == 16 * numbers
    assert measured == pytest.approx(computed.total - computed.base - 3 * 4 * numbers, rel=1 / 6)


def seven_billion(**changes: Any) -> StepMemory:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    options: dict[str, Any] = {
        "rank": 16,
        "batch_size": 1,
        "tokens": 2048,
        "dtype": "bfloat16",
        "quantise": "nf4",
        **changes,
    }
    return step_memory(config, **options)


def test_seven_billion_parameters_in_four_bits_fit_24_gb_with_checkpointing() -> None:
    """2,048 tokens, rank 16 on all linear layers, with room for three times as much; without it, hardly."""
    found = seven_billion(checkpointing=True)
    assert 3.5e9 < found.base < 4.5e9
    assert found.total < 8e9
    assert 20e9 < seven_billion().total < 26e9
