"""Pretrain the small decoder that ships as the embedded text base.

Training text: an excerpt of TinyStories (Eldan and Li 2023, arXiv:2305.07759; CDLA-Sharing-1.0), the works
of Shakespeare (public domain), and exercises generated here. The exercises hold the skills of
``fedspan.builtin.tasks`` in other surface forms: never an instruction of a task, never a line break between
question and answer, never a held-out input. So the base knows the skills and not the instruction format.

Run on one core:
    python recipes/pretrain_decoder.py --stories tinystories_2mb.txt.gz --shakespeare tinyshakespeare.txt.gz \
        --out src/fedspan/builtin/bases/decoder --seed 0
"""

import argparse
import gzip
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedspan.builtin.tasks import TASKS, split_of

END, PAD = "<|end|>", "<pad>"
STORY_SEPARATOR = "<|endoftext|>"
VOCAB_SIZE = 896
CONTEXT = 128

PHRASES: dict[str, tuple[str, ...]] = {
    "reverse_letters": ("backwards letters", "letters in reverse", "letters backwards"),
    "first_letter": ("first letter", "letter at the start", "the first of the letters"),
    "last_letter": ("last letter", "letter at the end", "the last of the letters"),
    "sort_letters": ("sorted letters", "letters in order", "letters put in order"),
    "uppercase_letters": ("capital letters", "letters as capitals", "big letters"),
    "next_letters": ("next letters", "letter after each", "the letter after"),
    "count_letters": ("number of letters", "how many letters", "count the letters"),
    "has_letter": ("is it in the list", "letter in list", "in the list or not"),
    "double_letters": ("doubled letters", "each letter twice", "every letter twice"),
    "add_numbers": ("sum", "add", "numbers added"),
    "larger_number": ("larger", "larger number", "the larger one"),
    "smaller_number": ("smaller", "smaller number", "the smaller one"),
    "parity": ("even or odd", "odd or even", "is it odd or even"),
    "next_number": ("next number", "number after", "what comes next"),
    "previous_number": ("number before", "previous number", "what comes before"),
    "opposites": ("opposites", "opposite words", "the opposite of each"),
    "plurals": ("plurals", "plural words", "the plural of each"),
    "past_tenses": ("past", "past words", "the past of each"),
    "find_animal": ("animal", "the animal here", "find an animal"),
    "find_color": ("color", "the color here", "find a color"),
    "find_food": ("food", "the food here", "find a food"),
    "reverse_words": ("backwards words", "words in reverse", "words backwards"),
}
SURFACES = (
    ("{phrase} : {text} ->", "{answer} ."),
    ("{text} ( {phrase} )", "{answer} ."),
    ("{Phrase} of {text} is", "{answer} ."),
    ("For {text} , {phrase} gives", "{answer} !"),
    ("[ {phrase} ] {text} =", "{answer} ;"),
    ("Which {phrase} ? {text} :", "{answer} ."),
    ("Write the {phrase} , {text} >", "{answer} ."),
)

Segment = tuple[str, bool]  # text, and whether the loss counts it


def exercise(rng: random.Random) -> list[Segment]:
    """One question (not counted: it cannot be predicted) and its answer (counted)."""
    name = rng.choice(list(PHRASES))
    text, answer = TASKS[name].generate(rng)
    while split_of(name, text) == "test":
        text, answer = TASKS[name].generate(rng)
    phrase = rng.choice(PHRASES[name])
    question, reply = rng.choice(SURFACES)
    filled = question.format(phrase=phrase, Phrase=phrase.capitalize(), text=text)
    return [(filled, False), (reply.format(answer=answer), True)]


def read(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a word has one token wherever it stands.

    A space is put before the text and after each line break (and removed when decoding), so that "dog" at
    the start of a line, alone, or after a word is the same token, and a prompt that ends in a line break
    can be tokenised apart from its answer. Digits are separate tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(" "), normalizers.Replace(Regex("\n(?=[^\n])"), "\n ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[0-9]|\n| ?[^\sA-Za-z0-9]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=END,
        eos_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids of the two texts, and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerFast
    texts: tuple[torch.Tensor, ...]  # each (num_tokens,)
    held_out: torch.Tensor  # (num_tokens,) stories never trained on


def make_corpus(stories: str, shakespeare: str, seed: int) -> Corpus:
    rng = random.Random(f"tokenizer/{seed}")
    drills = [" ".join(text for text, _ in exercise(rng)) for _ in range(60_000)]
    tokenizer = train_tokenizer([stories, shakespeare, *drills])
    tales = [tale.strip() for tale in stories.split(STORY_SEPARATOR) if tale.strip()]
    num_train = len(tales) - len(tales) // 50

    def encode(parts: list[str]) -> torch.Tensor:
        ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(parts)["input_ids"]]
        return torch.tensor([token for row in ids for token in row])

    scenes = shakespeare.split("\n\n")
    plays = ["\n\n".join(scenes[start : start + 8]) for start in range(0, len(scenes), 8)]
    return Corpus(tokenizer, (encode(tales[:num_train]), encode(plays)), encode(tales[num_train:]))


def drill_rows(corpus: Corpus, num_rows: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of packed exercises: ids and loss mask, each (num_rows, CONTEXT + 1)."""
    size = CONTEXT + 1
    ids: list[int] = []
    counted: list[bool] = []
    backend = corpus.tokenizer.backend_tokenizer
    while len(ids) < num_rows * size:
        segments = [segment for _ in range(200) for segment in exercise(rng)]
        encodings = backend.encode_batch([text for text, _ in segments], add_special_tokens=False)
        for (_, counts), encoding in zip(segments, encodings, strict=True):
            ids += encoding.ids
            counted += [counts] * len(encoding.ids)
            if counts and rng.random() < 0.2:  # a document holds five exercises on average
                ids.append(corpus.tokenizer.eos_token_id)
                counted.append(True)
    cut = num_rows * size
    return torch.tensor(ids[:cut]).view(-1, size), torch.tensor(counted[:cut]).view(-1, size)


def batches(
    corpus: Corpus, rows: int, text_share: float, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, loss mask) pairs, each (rows, CONTEXT + 1): text rows first, then exercise rows."""
    rng = random.Random(f"batches/{seed}")
    num_text = round(rows * text_share)
    while True:
        drills, masks = drill_rows(corpus, (rows - num_text) * 50, rng)
        for start in range(0, len(drills), rows - num_text):
            picked = [rng.choices(corpus.texts, (0.7, 0.3))[0] for _ in range(num_text)]
            offsets = [rng.randrange(len(text) - CONTEXT) for text in picked]
            text = torch.stack(
                [text[at : at + CONTEXT + 1] for text, at in zip(picked, offsets, strict=True)]
            )
            stop = start + rows - num_text
            ids = torch.cat([text, drills[start:stop]])
            yield ids, torch.cat([torch.ones_like(text, dtype=torch.bool), masks[start:stop]])


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss over the counted positions; the vocabulary is only scored there."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (rows, CONTEXT, hidden)
    targets, counted = ids[:, 1:], mask[:, 1:]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), targets[counted])


@torch.no_grad()
def story_loss(model: LlamaForCausalLM, corpus: Corpus, num_rows: int = 32) -> float:
    size = CONTEXT + 1
    num_rows = min(num_rows, len(corpus.held_out) // size)
    ids = corpus.held_out[: num_rows * size].view(-1, size)
    return float(loss_of(model, ids, torch.ones_like(ids, dtype=torch.bool)))


def build(corpus: Corpus, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(corpus.tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=corpus.tokenizer.pad_token_id,
        bos_token_id=corpus.tokenizer.bos_token_id,
        eos_token_id=corpus.tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the only way to seed the weights that transformers draws
        return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, corpus: Corpus, args: argparse.Namespace) -> None:
    steppers = optimizers(model)
    peaks = [stepper.param_groups[0]["lr"] for stepper in steppers]
    stream = batches(corpus, args.rows, args.text_share, args.seed)
    began, running = time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        scale = min(1.0, step / 50, (args.steps - step + 1) / (0.5 * args.steps))
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * scale
        loss = loss_of(model, *next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        running += float(loss.detach())
        if step % 50 == 0 or step == args.steps:
            took = time.perf_counter() - began
            print(
                f"step {step}/{args.steps} train loss {running / 50:.3f} "
                f"held-out story loss {story_loss(model, corpus):.3f} {took:.0f} s",
                flush=True,
            )
            running = 0.0


def save(model: LlamaForCausalLM, corpus: Corpus, args: argparse.Namespace) -> None:
    """Write half-precision weights under a float32 config, so that they load ready for training on a CPU."""
    args.out.mkdir(parents=True, exist_ok=True)
    corpus.tokenizer.save_pretrained(args.out)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.float32
    model.config.save_pretrained(args.out)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    ).save_pretrained(args.out)
    tied = "lm_head.weight"  # the same tensor as the embedding
    weights = {name: value.half() for name, value in model.state_dict().items() if name != tied}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    figures = {
        "parameters": model.num_parameters(),
        "seed": args.seed,
        "steps": args.steps,
        "tokens": args.steps * args.rows * CONTEXT,
        "held_out_story_loss": round(story_loss(model, corpus), 3),
    }
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help="TinyStories excerpt, .txt.gz")
    parser.add_argument("--shakespeare", type=Path, required=True, help="works of Shakespeare, .txt.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=32, help="sequences a step")
    parser.add_argument("--text-share", type=float, default=0.25, help="share of rows that are text")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    corpus = make_corpus(read(args.stories), read(args.shakespeare), args.seed)
    print(f"{len(corpus.tokenizer)} token types, {[len(text) for text in corpus.texts]} text tokens", flush=True)
    model = build(corpus, args.seed)
    train(model, corpus, args)
    save(model, corpus, args)


if __name__ == "__main__":
    main()
