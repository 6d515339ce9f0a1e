"""The embedded text task: a family of small instruction tasks with checkable answers.

Each task has the shape of Super-NaturalInstructions (Wang et al. 2022, arXiv:2204.07705): one instruction,
an input, a short answer. Letters are written with spaces between them, so that a tokenizer of word pieces
sees one token per letter. Nothing is stored: an example is drawn from an explicit generator.

Train and test never share an input: a hash of (task, input) decides the split an example belongs to, so
any two calls of :func:`examples` with different ``split`` are disjoint, whatever their seeds and sizes.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_lowercase

from fedspan.data.builtin.words import ANIMALS, COLORS, FOODS, OBJECTS, OPPOSITES, PAST, PLURALS

Sample = tuple[str, str]
Generate = Callable[[random.Random], Sample]

_TEST_SHARE = 4  # one input in four is held out
_MAX_MISSES = 2000  # draws in a row without a new input after which the space counts as used up


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction task; ``seen`` is false for tasks kept out of training to measure generalisation."""

    name: str
    instruction: str
    seen: bool
    generate: Generate


def _letters(rng: random.Random, low: int, high: int, alphabet: str = ascii_lowercase) -> list[str]:
    """Draw between `low` and `high` distinct letters in random order."""
    return rng.sample(alphabet, rng.randint(low, high))


def _on_letters(answer: Callable[[list[str]], list[str]], low: int, high: int) -> Generate:
    """Return a task whose input is a list of letters and whose answer is a list of letters."""

    def generate(rng: random.Random) -> Sample:
        letters = _letters(rng, low, high)
        return " ".join(letters), " ".join(answer(letters))

    return generate


def _next_letters(rng: random.Random) -> Sample:
    letters = _letters(rng, 2, 3, ascii_lowercase[:-1])  # z has no next letter
    return " ".join(letters), " ".join(chr(ord(letter) + 1) for letter in letters)


def _count_letters(rng: random.Random) -> Sample:
    letters = _letters(rng, 2, 9)
    return " ".join(letters), str(len(letters))


def _has_letter(rng: random.Random) -> Sample:
    letters = _letters(rng, 3, 5)
    present = rng.random() < 0.5
    others = [letter for letter in ascii_lowercase if letter not in letters]
    wanted = rng.choice(letters if present else others)
    return f"{wanted} : {' '.join(letters)}", "yes" if present else "no"


def _add(rng: random.Random) -> Sample:
    a, b = rng.randint(0, 59), rng.randint(0, 19)
    return f"{a} {b}", str(a + b)


def _choose_number(choose: Callable[[int, int], int]) -> Generate:
    """Return a task that picks one of two different numbers below 100."""

    def generate(rng: random.Random) -> Sample:
        a, b = rng.sample(range(100), 2)
        return f"{a} {b}", str(choose(a, b))

    return generate


def _on_number(answer: Callable[[int], str]) -> Generate:
    """Return a task on one number between 1 and 998."""

    def generate(rng: random.Random) -> Sample:
        number = rng.randint(1, 998)
        return str(number), answer(number)

    return generate


def _on_words(table: Mapping[str, str]) -> Generate:
    """Return a task that looks up each of two different words in `table`."""
    words = sorted(table)

    def generate(rng: random.Random) -> Sample:
        chosen = rng.sample(words, 2)
        return " ".join(chosen), " ".join(table[word] for word in chosen)

    return generate


def _find(kind: tuple[str, ...], others: tuple[tuple[str, ...], ...]) -> Generate:
    """Return a task that names the one word of a kind among three; the other two come from `others`."""

    def generate(rng: random.Random) -> Sample:
        answer = rng.choice(kind)
        words = [answer, *(rng.choice(rng.choice(others)) for _ in range(2))]
        rng.shuffle(words)
        return " ".join(words), answer

    return generate


def _reverse_words(rng: random.Random) -> Sample:
    words = rng.sample(ANIMALS + FOODS + COLORS + OBJECTS, 3)
    return " ".join(words), " ".join(reversed(words))


_ALL = (
    Task("reverse_letters", "Write the letters backwards.", True, _on_letters(lambda x: x[::-1], 3, 5)),
    Task("first_letter", "Give the first letter.", True, _on_letters(lambda x: x[:1], 3, 5)),
    Task("sort_letters", "Put the letters in order.", True, _on_letters(sorted, 3, 4)),
    Task(
        "uppercase_letters",
        "Write the letters as capitals.",
        True,
        _on_letters(lambda x: [letter.upper() for letter in x], 3, 5),
    ),
    Task("next_letters", "Write the letter after each letter.", True, _next_letters),
    Task("count_letters", "How many letters are there?", True, _count_letters),
    Task("has_letter", "Is the letter in the list?", True, _has_letter),
    Task(
        "double_letters",
        "Write each letter twice.",
        True,
        _on_letters(lambda x: [letter for letter in x for _ in range(2)], 2, 3),
    ),
    Task("add_numbers", "Add the numbers.", True, _add),
    Task("larger_number", "Which number is larger?", True, _choose_number(max)),
    Task("parity", "Is the number even or odd?", True, _on_number(lambda n: "odd" if n % 2 else "even")),
    Task("next_number", "What number comes next?", True, _on_number(lambda n: str(n + 1))),
    Task("opposites", "Write the opposite of each word.", True, _on_words(OPPOSITES)),
    Task("plurals", "Write the plural of each word.", True, _on_words(PLURALS)),
    Task("find_animal", "Which word is an animal?", True, _find(ANIMALS, (COLORS, FOODS, OBJECTS))),
    Task("find_color", "Which word is a color?", True, _find(COLORS, (ANIMALS, FOODS, OBJECTS))),
    Task("last_letter", "Give the last letter.", False, _on_letters(lambda x: x[-1:], 3, 5)),
    Task("smaller_number", "Which number is smaller?", False, _choose_number(min)),
    Task("previous_number", "What number comes before?", False, _on_number(lambda n: str(n - 1))),
    Task("past_tenses", "Write the past of each word.", False, _on_words(PAST)),
    Task("find_food", "Which word is a food?", False, _find(FOODS, (ANIMALS, COLORS, OBJECTS))),
    Task("reverse_words", "Write the words backwards.", False, _reverse_words),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def split_of(task: str, text: str) -> str:
    """Return the split (``"train"`` or ``"test"``) of an input; about one input in four is held out."""
    digest = hashlib.sha256(f"{task}\0{text}".encode()).digest()
    return "test" if digest[0] % _TEST_SHARE == 0 else "train"


def examples(task: str, num: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """Draw `num` examples with different inputs.

    Parameters
    ----------
    task
        A name in :data:`TASKS`.
    num
        Number of examples.
    seed
        The same (task, seed, split) gives the same examples; a larger `num` only appends to them.
    split
        ``"train"`` or ``"test"``: the two never share an input, see :func:`split_of`.

    Returns
    -------
    list of dict
        Keys ``task``, ``instruction``, ``input``, ``output``.

    Raises
    ------
    ValueError
        For an unknown task or split, a negative `num`, or more examples than the task has inputs.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'test'")
    if num < 0:
        raise ValueError(f"num is {num}: expected 0 or more")
    rng = random.Random(f"{task}/{split}/{seed}")
    answers: dict[str, str] = {}
    misses = 0
    while len(answers) < num:
        text, answer = TASKS[task].generate(rng)
        if text in answers or split_of(task, text) != split:
            misses += 1
            if misses > _MAX_MISSES:
                raise ValueError(f"task {task!r} has about {len(answers)} {split} inputs: expected at least {num}")
            continue
        misses = 0
        answers[text] = answer
    instruction = TASKS[task].instruction
    return [
        {"task": task, "instruction": instruction, "input": text, "output": answer} for text, answer in answers.items()
    ]
