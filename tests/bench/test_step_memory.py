"""The computed memory of a training step is near the measured one, term by term and as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fedspan.bench.memory import StepMemory, step_memory
from fedspan.models.build import attach
from fedspan.models.selection import linear_layers

SHAPE = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6}
ROWS, TOKENS, RANK = 4, 96, 4


def peak(work: Callable[[], None]) -> int:
    """The most bytes that torch held at once beside those it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


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
        model.gradient_checkpointing_enable({"use_reentrant": False})
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
