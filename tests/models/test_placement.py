"""Laws of the map from a base's modules to devices: what `auto` makes, and what is refused of a table."""

from __future__ import annotations

from typing import Any

import lazy_device
import pytest
import tiny
import torch
from lazy_device import LAZY
from torch import nn

from fedspan.models.placement import balanced, described, is_spread, place, places_for
from fedspan.support.errors import FedspanError

CPU = torch.device("cpu")


def num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gpus", [2, 3])
def test_auto_gives_every_gpu_about_as_much_and_splits_no_block(gpus: int, tied: bool) -> None:
    base = tiny.make("llama", num_hidden_layers=9, tie_word_embeddings=tied)
    places = balanced(base, dict.fromkeys(range(gpus), 2**30))
    blocks = [places[f"model.layers.{i}"] for i in range(9)]
    numbers = [device.index for device in blocks]
    assert numbers == sorted(numbers)
    assert set(places.values()) == {torch.device("cuda", i) for i in range(gpus)}
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]
    block = num_bytes(base.get_submodule("model.layers.0"))
    held = [numbers.count(i) * block for i in range(gpus)]
    assert max(held) - min(held) <= 3 * block  # embeddings and output layer weigh about as much as one
    if tied:
        assert places["model.embed_tokens"] == places.get("lm_head", places["model.embed_tokens"])


def test_a_base_that_its_gpus_cannot_hold_is_refused_with_the_sizes() -> None:
    base = tiny.make("llama", num_hidden_layers=9)
    with pytest.raises(
        FedspanError, match=r"does not fit into 0\.0 MiB \+ 0\.0 MiB of free GPU memory, from model\."
    ) as e:
        balanced(base, {0: 40_000, 1: 40_000})
    assert "\n" not in str(e.value)


def test_auto_asks_for_a_table_where_a_base_does_not_say_what_must_not_be_split() -> None:
    base = tiny.make("llama")
    base._no_split_modules = set()
    with pytest.raises(
        FedspanError, match=r"LlamaForCausalLM does not say which of its modules must stay in one piece"
    ):
        balanced(base, {0: 2**30, 1: 2**30})


def test_a_table_that_splits_a_block_is_refused() -> None:
    lazy_device.begin()
    table = {"": "cpu", "model.layers.0.mlp": LAZY}
    with pytest.raises(FedspanError, match=r"puts model\.layers\.0 \(LlamaDecoderLayer\) on cpu and lazy:0: its parts"):
        places_for(tiny.make("llama"), table)


def test_auto_means_none_where_there_are_fewer_than_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, spread in ((0, False), (1, False), (2, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert is_spread("auto") is spread
    assert not is_spread("none")
    assert is_spread({"": "cpu", "lm_head": 0})


def test_where_auto_means_none_a_note_says_so(bases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model = tiny.load(bases["llama"], "instruction", device_map="auto")
    assert not model.places
    assert model.device == CPU
    assert model.notes[-1] == "engine.device_map = 'auto': the whole base lies on cpu (GPUs here: 0)"


BLOCKS = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            {**BLOCKS, "model.layer.0": "cpu"},
            r"the base has no module 'model\.layer\.0'; did you mean 'model\.layers\.0'\?",
        ),
        ({"layers.1": "cpu"}, r"the base has no module 'layers\.1'; did you mean 'model\.layers\.1'\?"),
        ({"model": "cpu", "lm_head": "nowhere"}, r"engine\.device_map = 'nowhere' cannot be used here \("),
        ({"model": "cpu", "lm_head": 99}, r"engine\.device_map = 'cuda:99' cannot be used here \("),
        ({"model": "cpu", "lm_head": "meta"}, r"engine\.device_map = 'meta' cannot be used here \("),
        (
            {"model.layers": "cpu", "lm_head": "cpu"},
            r"has no device for model\.embed_tokens\.weight and 1 more: expected one for every parameter of the base",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_line(table: dict[str, int | str], line: str) -> None:
    with pytest.raises(FedspanError, match=line) as caught:
        places_for(tiny.make("llama"), table)
    assert "\n" not in str(caught.value)


def test_weights_that_are_one_must_lie_on_one_device() -> None:
    base = tiny.make("gpt2")
    places = {"transformer": CPU, "lm_head": torch.device(LAZY)}
    with pytest.raises(
        FedspanError, match=r"transformer\.wte\.weight and lm_head\.weight are one weight, on cpu and on"
    ):
        place(base, places)
    place(base, {"transformer": CPU, "transformer.h.1": CPU})  # the output layer goes with its twin
    assert base.lm_head.weight is base.transformer.wte.weight


def test_of_two_names_the_longer_one_counts() -> None:
    base = tiny.make("llama", num_hidden_layers=4)
    lazy_device.begin()
    places = places_for(base, {"": "cpu", "model.layers.1": LAZY, "model.layers.2": LAZY, "model.norm": "cpu"})
    assert place(base, places) == CPU
    where = [
        "lazy" if n.startswith(("model.layers.1.", "model.layers.2.")) else "cpu" for n, _ in base.named_parameters()
    ]
    assert [p.device.type for p in base.parameters()] == where
    text = described(base, places)
    assert text.startswith("cpu: all else, model.norm (")
    assert "; lazy:0: model.layers.1-2 (" in text
    ids = torch.arange(6)[None]
    plain = tiny.make("llama", num_hidden_layers=4)
    with torch.no_grad():
        torch.testing.assert_close(base(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_map_of_numbers_is_one_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def usable(setting: str, name: str) -> torch.device:
        asked.append(name)
        return torch.device(name)

    monkeypatch.setattr("fedspan.models.placement.usable_device", usable)
    places = places_for(tiny.make("llama"), {"model": 1, "lm_head": "cuda"})
    assert [str(device) for device in places.values()] == asked == ["cuda:1", "cuda:0"]
