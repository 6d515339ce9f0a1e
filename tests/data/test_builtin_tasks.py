"""Laws of the embedded text task and of the decoder it is tuned on."""

import importlib.util
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.data.builtin import base_path
from fedspan.data.builtin.tasks import TASKS, examples, split_of
from fedspan.data.builtin.words import ANIMALS, COLORS, FOODS, OBJECTS, OPPOSITES, PAST, PLURALS

NAMES = st.sampled_from(sorted(TASKS))
SPLITS = st.sampled_from(["train", "test"])

# A story written for this test: the base never saw it, but it is of the kind the base learned from.
STORY = (
    "One day, a little girl named Lily went to the park with her mom. She saw a big dog by the tree. "
    'The dog was sad because he could not find his ball. Lily said, "Do not be sad. I will help you." '
    "They looked and looked. At last, Lily found the red ball under a bush. The dog was very happy and "
    "wagged his tail. Lily and the dog played together all day, and they were best friends."
)

# Every answer again, by another route than the generators take.
RECOMPUTED: dict[str, Callable[[list[str]], str]] = {
    "reverse_letters": lambda x: " ".join(x)[::-1],
    "first_letter": lambda x: x[0],
    "last_letter": lambda x: x[-1],
    "sort_letters": lambda x: " ".join(c for c in "abcdefghijklmnopqrstuvwxyz" if c in x),
    "uppercase_letters": lambda x: " ".join(x).upper(),
    "next_letters": lambda x: " ".join("bcdefghijklmnopqrstuvwxyz"["abcdefghijklmnopqrstuvwxy".index(c)] for c in x),
    "count_letters": lambda x: str(sum(1 for _ in x)),
    "has_letter": lambda x: "yes" if x.count(x[0]) == 2 else "no",
    "double_letters": lambda x: " ".join(f"{c} {c}" for c in x),
    "add_numbers": lambda x: str(sum(map(int, x))),
    "larger_number": lambda x: sorted(x, key=int)[1],
    "smaller_number": lambda x: sorted(x, key=int)[0],
    "parity": lambda x: "even" if x[0][-1] in "02468" else "odd",
    "next_number": lambda x: str(int(x[0]) - -1),
    "previous_number": lambda x: str(len(range(1, int(x[0])))),
    "find_animal": lambda x: next(w for w in x if w in ANIMALS),
    "find_color": lambda x: next(w for w in x if w in COLORS),
    "find_food": lambda x: next(w for w in x if w in FOODS),
    "reverse_words": lambda x: f"{x[2]} {x[1]} {x[0]}",
    "opposites": lambda x: " ".join(next(a for a, b in OPPOSITES.items() if b == w) for w in x),
    "plurals": lambda x: " ".join(PLURALS[w] for w in x),
    "past_tenses": lambda x: " ".join(PAST[w] for w in x),
}


def weights_dtype(path: Path) -> set[str]:
    """Data types named in a safetensors header."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base() -> tuple[object, object]:
    """The shipped decoder and its tokenizer, loaded from local files alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = base_path("decoder")
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def test_family_is_large_enough_and_has_unseen_tasks() -> None:
    """At least 12 tasks to train on and 4 kept out; names and instructions tell them apart."""
    seen = [task for task in TASKS.values() if task.seen]
    assert len(seen) >= 12
    assert len(TASKS) - len(seen) >= 4
    assert all(name == task.name for name, task in TASKS.items())
    assert len({task.instruction for task in TASKS.values()}) == len(TASKS)


@given(NAMES, st.integers(0, 60), st.integers(0, 2**40), SPLITS)
@settings(max_examples=60, deadline=None)
def test_examples_are_deterministic_distinct_and_prefix_stable(task: str, num: int, seed: int, split: str) -> None:
    """The same arguments give the same examples, no input twice, and a larger number only appends."""
    drawn = examples(task, num, seed, split)
    assert drawn == examples(task, num, seed, split)
    assert len({row["input"] for row in drawn}) == len(drawn) == num
    assert examples(task, num + 5, seed, split)[:num] == drawn
    assert all(set(row) == {"task", "instruction", "input", "output"} for row in drawn)
    assert all(split_of(task, row["input"]) == split for row in drawn)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_train_and_test_are_disjoint_and_seeds_matter(task: str) -> None:
    """No train input is a test input, whatever the seeds; other seeds give other examples."""
    train = {row["input"] for seed in range(3) for row in examples(task, 200, seed, "train")}
    test = {row["input"] for seed in range(3) for row in examples(task, 60, seed, "test")}
    assert not train & test
    assert examples(task, 20, 0) != examples(task, 20, 1)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_answers_are_right(task: str) -> None:
    """Every answer equals an independent computation from its input alone."""
    rows = examples(task, 150, 7, "train") + examples(task, 50, 7, "test")
    for row in rows:
        assert row["output"] == RECOMPUTED[task](row["input"].split()), row
        assert row["instruction"] == TASKS[task].instruction
    assert len({row["output"] for row in rows}) >= 2


@pytest.mark.parametrize("task", ["parity", "has_letter"])
def test_two_way_answers_are_balanced(task: str) -> None:
    """Each of two answers has half of 400 examples, within five standard deviations (n = 400: 50)."""
    answers = [row["output"] for row in examples(task, 400, 3)]
    assert abs(answers.count(answers[0]) - 200) <= 50


def test_word_kinds_do_not_overlap() -> None:
    """A word of two kinds would make 'which word is an animal' ambiguous; so would a repeated opposite."""
    kinds = (ANIMALS, FOODS, COLORS, OBJECTS)
    assert sum(map(len, kinds)) == len(set().union(*kinds))
    assert all(OPPOSITES[OPPOSITES[word]] == word != OPPOSITES[word] for word in OPPOSITES)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("revrse", 1, 0, "train"), "revrse"),
        (("parity", 1, 0, "valid"), "valid"),
        (("parity", -1, 0, "train"), "-1"),
        (("parity", 10_000, 0, "train"), "10000"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, int, int, str], named: str) -> None:
    """An unknown task or split, a negative number or too many examples is refused by its value."""
    with pytest.raises(ValueError, match=named):
        examples(*arguments)


def test_unknown_base_is_named() -> None:
    """A base that does not ship is refused by its name."""
    with pytest.raises(ValueError, match="gpt5"):
        base_path("gpt5")


def test_base_folder_is_small_and_half_precision() -> None:
    """The decoder's folder is below 4 MB, its weights are stored in 16 bits, and nothing in it is pickled."""
    path = base_path("decoder")
    files = [file for file in path.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    assert weights_dtype(path / "model.safetensors") <= {"F16", "BF16"}


def test_base_loads_in_float32_and_ties_its_embeddings(base) -> None:
    """Loaded with no arguments, the decoder is ready for CPU training and predicts through its embeddings."""
    model, tokenizer = base
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@given(NAMES, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_tokenizer_round_trips_and_prompt_and_answer_join(base, task: str, seed: int) -> None:
    """Decoding restores every task's text, and a prompt and answer encoded apart are the encoding of both."""
    _, tokenizer = base
    row = examples(task, 1, seed)[0]
    prompt = f"{row['instruction']}\n{row['input']}\n"
    ids, answer = tokenizer(prompt)["input_ids"], tokenizer(row["output"])["input_ids"]
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.decode(answer) == row["output"]
    assert tokenizer(prompt + row["output"])["input_ids"] == ids + answer
    assert len(ids) + len(answer) < 40


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_tokenizer_is_lossless(base, text: str) -> None:
    """Any text comes back from its tokens, spaces and line breaks included."""
    _, tokenizer = base
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_base_has_learned_english(base) -> None:
    """On a story it never saw, the loss is far below that of a uniform guess over the vocabulary."""
    model, tokenizer = base
    ids = torch.tensor([tokenizer(STORY)["input_ids"]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 0.6 * math.log(model.config.vocab_size)


def test_untouched_base_is_poor_at_the_tasks(base) -> None:
    """The base does not know the instruction format: greedy answers are right in fewer than one of twenty."""
    model, tokenizer = base
    rows = [row for name in sorted(TASKS) for row in examples(name, 4, 11, "test")]
    prompts = [f"{row['instruction']}\n{row['input']}\n" for row in rows]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    made = model.generate(**batch, max_new_tokens=8, do_sample=False)
    texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    hits = sum(text.strip() == row["output"] for text, row in zip(texts, rows, strict=True))
    assert hits / len(rows) < 0.05


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The script that pretrained the decoder, imported from its file."""
    path = Path(__file__).resolve().parents[2] / "recipes" / "pretrain_decoder.py"
    spec = importlib.util.spec_from_file_location("pretrain_decoder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pretraining_saw_neither_the_prompts_nor_held_out_inputs(recipe: ModuleType) -> None:
    """No exercise holds an instruction or a line break, and every input in one is a training input."""
    rng = random.Random(5)
    held_out = {name: {row["input"] for row in examples(name, 40, 0, "test")} for name in TASKS}
    for _ in range(3000):
        name, text, segments = recipe.exercise(rng)
        whole = " ".join(part for part, _ in segments)
        assert text in whole
        assert text not in held_out[name]
        assert split_of(name, text) == "train"
        assert "\n" not in whole
        assert not any(task.instruction.lower() in whole.lower() for task in TASKS.values())
