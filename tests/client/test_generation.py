"""Generation that is greedy and ends where the base ends its texts, whatever its folder says of sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bigram
import pytest
import tiny
import torch

from fedspan.client.evaluation import evaluate
from fedspan.client.generation import generate, greedy_settings
from fedspan.config import DataConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.models import FederatedModel, load_processor
from fedspan.models.base_facts import read_facts

END = bigram.TURN_END_ID
LETTERS = [len(tiny.SPECIAL) + tiny.CHARACTERS.index(letter) for letter in "yes"]
# The prompts end in the line break that the chain begins with, and hold the answer's letters for penalties to see.
ROWS = Rows("instruction", [("say yes", "yes"), ("yes or no", ""), ("y", "es")], ["yes"] * 3, [""] * 3)


def opened(path: Path, **data: Any) -> tuple[FederatedModel, Any, Encoded]:
    processor = load_processor(str(path), "instruction")
    return (
        tiny.load(path, "instruction"),
        processor,
        encode(ROWS, processor, DataConfig(**data), read_facts(str(path))),
    )


def figures(path: Path, **data: Any) -> dict[str, float]:
    model, processor, encoded = opened(path, **data)
    return evaluate(model, encoded, ["exact_match"], processor, batch_size=2, max_new_tokens=8)


def test_a_chat_base_that_answers_perfectly_scores_one(tmp_path: Path) -> None:
    """It ends turns with a token that is not the tokenizer's end token: training and generation end there too."""
    base = bigram.save(
        tmp_path / "base", "\nyes", bigram.TURN_END, chat=bigram.CHAT, generation={"eos_token_id": [END, 2]}
    )
    found = figures(base, template="chat")
    assert found["exact_match"] == 1.0
    assert found["loss"] < 0.01  # that of the end token too


@pytest.mark.parametrize("ends", [[2, END], [END, 2], END, [END]])
def test_any_of_the_base_s_end_tokens_ends_an_answer(tmp_path: Path, ends: Any) -> None:
    base = bigram.save(tmp_path / "base", "\nyes", bigram.TURN_END, generation={"eos_token_id": ends})
    model, processor, encoded = opened(base)
    assert generate(model, encoded, [0, 1, 2], processor, 8) == ["yes"] * 3
    learnt = encoded.batch([0])["labels"][0]
    # The tokenizer's own end token where the base has it as one, otherwise the base's first.
    assert int(learnt[learnt != -100][-1]) == (2 if isinstance(ends, list) and 2 in ends else END)


@pytest.mark.parametrize(
    "stated",
    [
        {"do_sample": True, "temperature": 50.0, "top_k": 0},
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 6},
        {"min_length": 60},
        {"forced_bos_token_id": 50, "forced_eos_token_id": 51},
        {"suppress_tokens": LETTERS},
        {"begin_suppress_tokens": LETTERS},
        {"bad_words_ids": [[letter] for letter in LETTERS]},
        {"num_beams": 3, "length_penalty": -9.0},
        {"sequence_bias": [[[50], 100.0]]},
        {"max_length": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"stop_strings": ["e"]},
        {"max_time": 1e-9},
    ],
    ids=lambda stated: next(iter(stated)),
)
def test_settings_in_the_folder_do_not_leak(tmp_path: Path, stated: dict[str, Any]) -> None:
    base = bigram.save(tmp_path / "base", "\nyes", "</s>", generation=stated)
    assert figures(base)["exact_match"] == 1.0


def test_the_base_s_own_settings_are_left_as_they_were(tmp_path: Path) -> None:
    """A whole model that is saved keeps them."""
    base = bigram.save(tmp_path / "base", "\nyes", "</s>", generation={"repetition_penalty": 50.0})
    model, processor, encoded = opened(base)
    generate(model, encoded, [0], processor, 4)
    assert model.model.generation_config.repetition_penalty == 50.0
    assert greedy_settings(encoded.texts, 4) == {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": 4,
        "pad_token_id": 0,
        "eos_token_id": [2],
    }


def test_no_answer_runs_past_the_base_s_positions(tmp_path: Path) -> None:
    """Prompts near the limit, in one batch with a short one whose answer is long: each is what it is alone."""
    base = tiny.save("gpt2", tmp_path / "base", n_positions=32)
    processor, facts = load_processor(str(base), "instruction"), read_facts(str(base))
    inputs = [("a" * 26, ""), ("b", ""), ("c" * 20, "")]
    rows = Rows("instruction", inputs, ["x", "y" * 12, "z"], [""] * 3)
    encoded = encode(rows, processor, DataConfig(max_length=32), facts)
    model = tiny.load(base, "instruction")
    found = generate(model, encoded, [0, 1, 2], processor, 12)
    for i in range(3):
        ids = encoded.prompts([i])["input_ids"]
        length = min(12, 32 - ids.shape[1])
        with torch.no_grad():
            alone = model.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
            )
        assert found[i] == processor.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    assert encoded.prompts([0])["input_ids"].shape[1] + 12 > 32
