"""Tiny real models, tokenizers and data files, built from a configuration, offline.

Every base is two layers wide enough for rank 8. `save_bases` writes them once a session; a test reads them as a
user's own local folders are read.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedspan import config as settings
from fedspan.algebra.lowrank import LowRank
from fedspan.client.executors import InlineExecutor
from fedspan.client.training import Assignment, LocalResult
from fedspan.config import Config
from fedspan.federation import rounds
from fedspan.federation.clients import Client
from fedspan.federation.rounds import RunState
from fedspan.methods import METHODS
from fedspan.methods.base import Method, ServerState
from fedspan.methods.messages import Broadcast, Factors, Recipe, Template, Update, Vector
from fedspan.models import FederatedModel, build, load_processor
from fedspan.support.seeding import generator

SIZE = 32
KIND = {"llama": "instruction", "gpt2": "instruction", "bert": "classification", "vit": "image"}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " "
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer(pad: bool = True) -> Any:
    """One token a character, `<s>` before every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **named)


def make(name: str, **changes: Any) -> Any:
    """A randomly initialised transformer of that architecture, the same every time."""
    import transformers as t

    vocab = len(SPECIAL) + len(CHARACTERS)
    common: dict[str, Any] = {"vocab_size": vocab, "initializer_range": 0.15, **ENDS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if name == "llama":
            llama = {
                "hidden_size": SIZE,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "tie_word_embeddings": False,
            }
            return t.LlamaForCausalLM(t.LlamaConfig(**{**common, **llama, **changes}))
        if name == "gpt2":
            gpt2 = {"n_embd": SIZE, "n_layer": 2, "n_head": 4, "n_positions": 128}
            still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return t.GPT2LMHeadModel(t.GPT2Config(**{**common, **gpt2, **still, **changes}))
        layers = {"hidden_size": SIZE, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        if name == "bert":
            bert = {**common, **layers, "max_position_embeddings": 128, "type_vocab_size": 2, **changes}
            return t.BertForMaskedLM(t.BertConfig(**bert))  # so its pooler is new to a classifier
        vit = {**layers, "image_size": 16, "patch_size": 8, "num_channels": 3, "initializer_range": 0.15, **changes}
        return t.ViTForImageClassification(t.ViTConfig(**vit, num_labels=2))


def image_processor() -> Any:
    """For the 16×16 images of the tiny vision model."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 16, "width": 16})


def save(name: str, path: Path, **changes: Any) -> Path:
    """A base and its tokenizer or image processor as a local folder."""
    make(name, **changes).save_pretrained(str(path))
    processor = image_processor() if name == "vit" else tokenizer()
    processor.save_pretrained(str(path))
    return path


def load(path: Path, kind: str, **changes: Any) -> FederatedModel:
    """A base with adapters of rank up to 8 on every linear layer, or as `changes` say."""
    options: dict[str, Any] = {
        "trains": "adapter",
        "num_labels": 0 if kind == "instruction" else 3,
        "target_modules": ("all-linear",),
        "max_rank": 8,
        "rslora": False,
        "dropout": 0.0,
        "dtype": "float32",
        "device": torch.device("cpu"),
        "seed": 0,
    }
    return build(str(path), kind, **{**options, **changes})


def random_adapter(model: FederatedModel, rank: int, *key: object, scaling: float = 0.5) -> dict[str, Factors]:
    """Gaussian factors for every adapted module."""
    rng = generator("adapter", rank, *key)
    return {
        name: Factors(torch.randn(m, rank, generator=rng), torch.randn(rank, n, generator=rng) / n**0.5, scaling)
        for name, (m, n) in sorted(model.modules().items())
    }


def broadcast(model: FederatedModel, adapter: Mapping[str, Factors] | None = None, **changes: Any) -> Broadcast:
    """A broadcast of `adapter` (one of rank 4 where the model has adapters) and the model's own dense weights."""
    if adapter is None:
        adapter = random_adapter(model, 4) if model.trains == "adapter" else {}
    return Broadcast(adapter, **{"dense": model.dense(), "recipe": Recipe(), **changes})


def words(num_rows: int = 48) -> list[dict[str, Any]]:
    """Texts whose label is the letter that they are made of."""
    rng = generator("words")
    rows = []
    for i in range(num_rows):
        length = int(torch.randint(2, 9, (), generator=rng))
        noise = "".join(CHARACTERS[11 + int(j)] for j in torch.randint(0, 26, (length,), generator=rng))
        rows.append({"text": noise + "XYZ"[i % 3] * 3, "label": "xyz"[i % 3], "site": f"s{i % 4}"})
    return rows


def questions(num_rows: int = 40) -> list[dict[str, str]]:
    """Four tasks: answer a digit with itself, twice, the next, or `x`."""
    answers = {"copy": "{0}", "twice": "{0}{0}", "next": "{1}", "cross": "x"}
    rows = []
    for i in range(num_rows):
        task = list(answers)[i % 4]
        digit = (i // 4) % 9
        answer = answers[task].format(digit, digit + 1)
        rows.append({"task": task, "instruction": task, "input": str(digit), "output": answer})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(base: Path, data: Path, method: str = "glora", /, **sections: Mapping[str, Any]) -> Config:
    """Two rounds, four clients, half of them drawn, two steps each; `sections` are merged in, one level deep.

    A section of dotted keys is not needed: `federation={"rounds": 3}` changes that key alone.
    """
    tree: dict[str, Any] = {
        "seed": 3,
        "model": {"name": str(base)},
        "adapter": {"alpha": 8.0},
        "data": {"task": "files", "train": [str(data)], "holdout": 0.2, "max_length": 48},
        "federation": {"num_clients": 4, "rounds": 2, "participation": 0.5, "ranks": 4, "partition": "iid"},
        "local": {"steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"max_new_tokens": 2, "local": False},
        "engine": {"workers": 1},
        "method": {"name": method},
    }
    if method in METHODS and METHODS[method]().info.optimizer == "sgd":
        tree["local"]["optimizer"] = "sgd"
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, Mapping) else values
    return settings.from_mapping(tree)


def processor(path: Path, kind: str) -> Any:
    return load_processor(str(path), kind)


def same(x: Mapping[str, torch.Tensor], y: Mapping[str, torch.Tensor]) -> None:
    """The same names and the same bits, NaN included."""
    assert x.keys() == y.keys()
    for name, value in x.items():
        other = y[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        bits, others = (t.contiguous().reshape(-1).view(torch.uint8) for t in (value, other))
        assert torch.equal(bits, others), name


def same_adapter(x: Mapping[str, Factors], y: Mapping[str, Factors]) -> None:
    """The same modules, scalings and bits."""
    assert x.keys() == y.keys()
    assert {name: f.scaling for name, f in x.items()} == {name: f.scaling for name, f in y.items()}
    same(flat(x), flat(y))


def flat(adapter: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    return {f"{name}/{part}": t for name, f in adapter.items() for part, t in (("a", f.a), ("b", f.b))}


SHAPES = {"one": (40, 30), "two": (24, 24)}
HEAD = (3, 4)


def clients(*ranks: int, sizes: tuple[int, ...] = ()) -> list[Client]:
    """Clients with ids in order, of those ranks, with 10, 20, 30 … examples unless given."""
    counts = sizes or tuple(10 * (k + 1) for k in range(len(ranks)))
    none = np.zeros(0, dtype=np.int64)
    return [Client(f"client-{k}", r, np.arange(n), none) for k, (r, n) in enumerate(zip(ranks, counts, strict=True))]


def run_state(method: Method, rank: int, shapes: Mapping[str, tuple[int, int]] = SHAPES, seed: int = 1) -> RunState:
    """A method before its first round, over two matrices and a head."""
    rng = generator("standing")
    weights = shapes if method.info.trains != "adapter" else {}
    dense = {name: torch.randn(shape, generator=rng) for name, shape in {**weights, "head": HEAD}.items()}
    return RunState(method.init(Template(dict(shapes), rank, 8.0, False, seed), dense))


def fake_work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
    """An update, or a gradient, that depends on the client, the round and what was sent, as training's does."""
    rng = generator("work", client.client_id, round_num)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    if sent.recipe.gradient:
        sizes = {name: (f.b.shape[0], f.a.shape[1]) for name, f in sent.adapter.items()}
        sizes = sizes or {name: t.shape for name, t in sent.dense.items() if name != "head"}
        grads = {name: Vector({"gradient": draw(*size)}) for name, size in sizes.items()}
        return LocalResult(Update(client.client_id, 1.0, grads, {}), 1.0 + round_num, 3)

    def moved(t: torch.Tensor, name: str, free: bool = True) -> torch.Tensor:
        if name in sent.subspaces:
            space = sent.subspaces[name]
            return t + space.expand(space.coordinates(draw(*t.shape)))
        return t + draw(*t.shape) if free else t.clone()

    recipe = sent.recipe
    modules = {
        n: Factors(moved(f.b, f"{n}/b", recipe.train_b), moved(f.a, f"{n}/a", recipe.train_a), f.scaling)
        for n, f in sent.adapter.items()
    }
    dense = {name: moved(t, name) for name, t in sent.dense.items()}
    moments = {} if recipe.galore is None else {n: draw(*t.shape).square() for n, t in dense.items() if n != "head"}
    return LocalResult(Update(client.client_id, 1.0, modules, dense, moments, 0.5), 1.0 + round_num, 3)


Change = Callable[[Assignment, LocalResult, int], LocalResult]


def intercept(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Have `change` look at everything that a client learns, in the order of the clients, and alter it if it likes."""
    train = InlineExecutor.train

    def work(
        self: InlineExecutor, given: Sequence[Assignment], round_num: int, engine: str
    ) -> Iterator[tuple[LocalResult, float]]:
        for assignment, (result, seconds) in zip(given, train(self, given, round_num, engine), strict=True):
            yield change(assignment, result, round_num), seconds

    monkeypatch.setattr(InlineExecutor, "train", work)


One = Callable[[Client, Broadcast, int], LocalResult]


def run_round(
    method: Method, run_state: RunState, cohort: Sequence[Client], work: One, **options: Any
) -> tuple[RunState, dict[str, Any]]:
    """`fedspan.federation.rounds.run_round` with one function for each client's work."""

    def many(window: Sequence[tuple[Client, Broadcast]], round_num: int) -> Iterator[tuple[LocalResult, float]]:
        return ((work(client, sent, round_num), 0.25) for client, sent in window)

    return rounds.run_round(method, run_state, cohort, many, **options)


def state_tensors(state: ServerState) -> dict[str, torch.Tensor]:
    """Every tensor of a server's state, by a name of its own."""
    found = {f"module/{n}/{part}": t for n, held in state.modules.items() for part, t in held.items()}
    found |= {f"dense/{name}": t for name, t in state.dense.items()}
    found |= {f"extra/{name}": t for name, t in state.extra.items()}
    if state.patches is not None:
        for i, patch in enumerate((state.patches.total, *state.patches.increments)):
            for name, p in patch.items():
                found |= {
                    f"patch{i}/{name}/{j}": t for j, t in enumerate((p.b, p.a) if isinstance(p, LowRank) else (p,))
                }
    return found


def same_state(x: ServerState, y: ServerState) -> None:
    assert (x.template, x.round_num, x.exchange) == (y.template, y.round_num, y.exchange)
    versions = [None if s.patches is None else (s.patches.version, len(s.patches.increments)) for s in (x, y)]
    assert versions[0] == versions[1]
    same(state_tensors(x), state_tensors(y))


def same_standing(x: RunState, y: RunState) -> None:
    """The same bits in the server's state and in what every client keeps."""
    same_state(x.state, y.state)
    assert x.seen == y.seen
    assert x.client_states.keys() == y.client_states.keys()
    for client, kept in x.client_states.items():
        same(kept, y.client_states[client])
