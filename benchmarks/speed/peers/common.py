"""Code that the arms share: the experiment's description, a client's local work, and the average of the adapters.

Nothing here imports fedspan, Flower or NVFlare, so that every environment can load it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402  after the numbers of threads
from measure import now  # noqa: E402  it imports numpy too

Adapter = dict[str, np.ndarray]
"""PEFT's parameter names to float32 arrays: A (r, n), B (m, r)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One experiment, as every arm reads it."""

    model: str
    """Folder of a transformers causal LM."""
    data: str
    """An .npz of int64 arrays client_000, client_001, … of shape (examples, length); the labels are the ids."""
    num_clients: int
    rounds: int
    local_steps: int
    batch_size: int
    learning_rate: float
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    participation: float = 1.0
    seed: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    initial_adapter: str | None = None
    """A safetensors file that the clients start from. Without it PEFT draws one, by the seed; with it a server needs no
    torch, which is to its advantage."""

    @staticmethod
    def read(path: str | Path) -> Spec:
        """Read SPEC.json; paths in it are relative to the file.

        Raises
        ------
        ValueError
            When a key is missing or unknown, or a count is not positive.
        """
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        known = set(Spec.__dataclass_fields__)
        if unknown := sorted(set(held) - known):
            raise ValueError(f"{path}: unknown keys {unknown}; expected some of {sorted(known)}")
        for key in ("model", "data", "initial_adapter"):
            if held.get(key) is not None:
                held[key] = str((Path(path).parent / held[key]).resolve())
        try:
            spec = Spec(**{**held, "target_modules": tuple(held["target_modules"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}; expected the keys that README.md lists") from error
        for key in ("num_clients", "rounds", "local_steps", "batch_size", "rank"):
            if getattr(spec, key) < 1:
                raise ValueError(f"{path}: {key} = {getattr(spec, key)}; expected at least 1")
        if not 0.0 < spec.participation <= 1.0:
            raise ValueError(f"{path}: participation = {spec.participation}; expected above 0 and at most 1")
        return spec

    def participants(self, round_num: int) -> list[int]:
        """The clients of a round (numbered from 1), by the seed: all of them, or ⌊participation · K⌋, at least one."""
        count = max(1, int(self.num_clients * self.participation))
        if count == self.num_clients:
            return list(range(self.num_clients))
        order = np.random.default_rng([self.seed, round_num]).permutation(self.num_clients)
        return sorted(order[:count].tolist())


def client_name(index: int) -> str:
    """The client's name, which is also its key in the data file."""
    return f"client_{index:03d}"


def derived_seed(*key: object) -> int:
    """A seed from nothing but `key`, made as fedspan makes its own, so that the batches are the same."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def batches(num_examples: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of indices, without replacement within each pass over the data."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(num_examples, generator=rng).tolist()
        yield order[: min(batch_size, num_examples)]
        order = order[batch_size:]


@dataclass(frozen=True, slots=True)
class LocalResult:
    """The result of a client's local training in one round."""

    adapter: Adapter
    train_loss: float
    """Mean over the steps."""
    num_examples: int
    started: float
    """`now()` when its first step began; the base was in memory by then."""
    seconds: float
    """Seconds of the local training."""


class Trainer:
    """The base and one adapter in one process: loaded once, however many clients and rounds pass through it."""

    def __init__(self, spec: Spec) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.spec = spec
        base = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32, local_files_only=True)
        base.config.use_cache = False
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.target_modules))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(spec.seed, "adapter"))
            self.model: Any = get_peft_model(base, config)
        self.model.train()
        self.trained = {name: p for name, p in sorted(self.model.named_parameters()) if p.requires_grad}
        self.shapes = {name: tuple(p.shape) for name, p in self.trained.items()}
        with np.load(spec.data) as held:
            self.data = {name: torch.from_numpy(held[name]) for name in held.files}

    def adapter(self) -> Adapter:
        """A copy of the adapter as it stands."""
        return {name: p.detach().numpy().copy() for name, p in self.trained.items()}

    def load(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Copy an adapter in, in place: PEFT's own loader costs many times more.

        Raises
        ------
        ValueError
            When the names differ.
        """
        import torch

        if adapter.keys() != self.trained.keys():
            differing = sorted(adapter.keys() ^ self.trained.keys())
            raise ValueError(f"adapter names {differing[:3]} are on one side only; expected PEFT's parameter names")
        with torch.no_grad():
            sent = [torch.from_numpy(np.array(adapter[name])) for name in self.trained]  # a copy: it may be read-only
            torch._foreach_copy_(list(self.trained.values()), sent)

    def train(self, client: int, round_num: int, adapter: Mapping[str, np.ndarray]) -> LocalResult:
        """One client's local work of one round (numbered from 1): AdamW with a fresh state."""
        import torch

        spec, name = self.spec, client_name(client)
        self.load(adapter)
        rows = self.data[name]
        optimizer = torch.optim.AdamW(
            self.trained.values(), lr=spec.learning_rate, weight_decay=spec.weight_decay, foreach=True
        )
        total = torch.zeros(())
        started = now()
        # fedspan's own key: its names of the clients, its rounds numbered from 0.
        fedspan_name = f"client-{client:0{len(str(spec.num_clients - 1))}d}"
        seed = derived_seed(spec.seed, round_num - 1, fedspan_name, "batches")
        for indices in batches(len(rows), spec.batch_size, spec.local_steps, seed):
            ids = rows[indices]
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            if spec.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.trained.values(), spec.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        seconds = now() - started
        return LocalResult(self.adapter(), float(total) / spec.local_steps, len(rows), started, seconds)


_trainers: dict[str, Trainer] = {}


def trainer(spec_path: str) -> Trainer:
    """This process's trainer of an experiment: built at the first call, kept for the others."""
    if spec_path not in _trainers:
        _trainers[spec_path] = Trainer(Spec.read(spec_path))
    return _trainers[spec_path]


def initial_adapter(spec_path: str) -> Adapter:
    """Return the adapter from which the first round starts."""
    held = Spec.read(spec_path).initial_adapter
    if held is None:
        return trainer(spec_path).adapter()
    from safetensors.numpy import load_file

    return load_file(held)


def shapes(adapter: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes by name."""
    return {name: array.shape for name, array in adapter.items()}


def flatten(adapter: Mapping[str, np.ndarray]) -> np.ndarray:
    """All arrays one after another, by name."""
    return np.concatenate([adapter[name].ravel() for name in sorted(adapter)])


def unflatten(flat: np.ndarray, held: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The inverse of `flatten`: views into `flat`.

    Raises
    ------
    ValueError
        When the number of values is not what the shapes need.
    """
    adapter, at = {}, 0
    for name in sorted(held):
        size = int(np.prod(held[name]))
        adapter[name] = flat[at : at + size].reshape(held[name])
        at += size
    if at != flat.size:
        raise ValueError(f"{flat.size} values; expected {at} for the adapter's shapes")
    return adapter


def weighted_average(adapters: Sequence[Mapping[str, np.ndarray]], weights: Sequence[float]) -> Adapter:
    """Σ p_k A_k and Σ p_k B_k with p_k = weight / Σ weights, in the order given."""
    total = float(sum(weights))
    average: Adapter = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, array in adapter.items():
            part = array * np.float32(weight / total)
            average[name] = average[name] + part if name in average else part
    return average
