"""The settings that choose layers: PEFT's names and rules, and one line for what matches nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fedspan import config as settings
from fedspan.models import FederatedModel, selection
from fedspan.models.selection import Selection, select
from fedspan.support.errors import FedspanError

Q = "model.layers.{}.self_attn.q_proj"


def chosen(bases: dict[str, Path], name: str = "llama", **options: Any) -> FederatedModel:
    return tiny.load(bases[name], tiny.KIND[name], max_rank=4, selection=Selection(**options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": r".*\.q_proj"}, [Q.format(0), Q.format(1)]),
        ({"target_modules": r"model\.layers\.1\..*(q|z)_proj"}, [Q.format(1)]),
        ({"target_modules": ("q_proj",), "layers": (1,)}, [Q.format(1)]),
        ({"target_modules": ("q_proj", "k_proj"), "exclude_modules": ("k_proj",)}, [Q.format(0), Q.format(1)]),
        ({"target_modules": ("q_proj",), "exclude_modules": r".*\.0\..*"}, [Q.format(1)]),
        ({"target_modules": (Q.format(1),)}, [Q.format(1)]),
    ],
)
def test_layers_are_those_that_peft_would_adapt(
    bases: dict[str, Path], options: dict[str, Any], expected: list[str]
) -> None:
    """PEFT is asked itself: which layers has it adapted under the same names?"""
    from peft import LoraConfig, inject_adapter_in_model

    assert list(chosen(bases, **options).layers) == expected
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    if "layers" in given:
        given["layers_to_transform"] = given.pop("layers")
    adapted = inject_adapter_in_model(LoraConfig(r=4, **given), tiny.make("llama"))
    assert [n.removesuffix(".lora_A") for n, _ in adapted.named_modules() if n.endswith("lora_A")] == expected


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"target_modules": r".*\.w_proj"},
            r"target_modules: '\.\*.*w_proj' matches no linear layer as a whole; .*q_proj",
        ),
        ({"target_modules": (r".*q_proj",)}, "a regular expression is a string, not in a list"),
        ({"target_modules": "(q_proj"}, r"'\(q_proj' is no regular expression"),
        ({"target_modules": "a" * 999 + ".*"}, "1001 characters, expected up to 1000"),
        ({"target_modules": "(?:(?:a{1000}){1000}){1000}.*"}, "repeats too much; expected at most 10000 in all"),
        ({"target_modules": "a{,4294967294}.*"}, "repeats too much"),
        ({"exclude_modules": ("nope",)}, "exclude_modules: 'nope' matches no linear layer"),
        ({"layers": (0, 2)}, "adapter.layers: 2 is no layer of this model, which has 0 to 1"),
        ({"modules_to_save": ("wte",)}, "modules_to_save: 'wte' matches no module with weights; .*embed_tokens"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "no layer is left to adapt"),
    ],
)
def test_a_choice_of_nothing_is_refused_in_one_line(bases: dict[str, Path], options: dict[str, Any], line: str) -> None:
    with pytest.raises(FedspanError, match=line) as caught:
        chosen(bases, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", [r"(\w|\w\w|\w)*[!?]", r"(a|b|_|ab|b_)*[^\w]"])
def test_a_pattern_that_takes_for_ever_is_given_up(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site runs the patterns of whoever leads the federation."""
    monkeypatch.setattr(selection, "_SECONDS", 0.3)
    base = torch.nn.ModuleDict({"_".join("ab" * 40): torch.nn.Linear(4, 4)})
    began = time.monotonic()
    with pytest.raises(FedspanError, match=r"takes over 0\.3 s to match; expected a simpler one"):
        select(base, Selection(pattern), (), 1, {})
    assert time.monotonic() - began < 20


def test_a_string_is_a_pattern_only_where_names_have_no_such_signs() -> None:
    def read(value: object) -> object:
        return settings.from_mapping({"adapter": {"target_modules": value}}).adapter.target_modules

    assert read("q_proj") == ("q_proj",)
    assert read(r".*\.q_proj") == r".*\.q_proj"
    assert read(["q_proj", "v_proj"]) == ("q_proj", "v_proj")
    assert read("all-linear") == ("all-linear",)
    made = settings.from_mapping({"adapter": {"target_modules": r".*\.[qv]_proj", "layers": 1, "exclude_modules": "k"}})
    assert made.adapter.layers == (1,)
    assert "layers = [1]" in settings.to_toml(made)


@pytest.mark.parametrize("value", [[], [-1], "first", [1.5], True])
def test_layers_that_are_no_numbers_are_refused(value: object) -> None:
    with pytest.raises(FedspanError, match=r"adapter\.layers"):
        settings.from_mapping({"adapter": {"layers": value}})


def test_all_linear_leaves_out_what_is_too_small_and_says_so(bases: dict[str, Path]) -> None:
    model = tiny.load(bases["llama"], "instruction", max_rank=17)
    assert {name.rpartition(".")[2] for name in model.layers} == {
        "q_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert model.notes == (
        "all-linear leaves out 4 of the linear layers: model.layers.*.self_attn.k_proj, "
        "model.layers.*.self_attn.v_proj (is 16×32, too small for rank 17)",
    )
