"""Laws of rows that lie end to end in the blocks: training is that of padded rows, and no row reaches another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_training import LOCAL, start_of, tasks, tensors, texts
from torch import Tensor, nn

from fedspan.client import cohort, length_parts
from fedspan.client.setup import find_packed, find_prefix
from fedspan.client.training import Assignment, LocalResult, TrainingSettings, gradient
from fedspan.config import EngineConfig
from fedspan.data import Encoded
from fedspan.models import FederatedModel, packed_rows
from fedspan.models.blocks import NotApplicable
from fedspan.models.losses import client_losses, pass_inputs
from fedspan.models.probes import apart, gradients, probe
from fedspan.models.selection import Selection
from fedspan.runs.execution import run
from fedspan.runs.provision import Provision, Wanted
from fedspan.support.seeding import generator

__all__ = ["tasks", "texts"]  # the fixtures

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROUNDING = 1e-4
"""Relative difference of gradients and updates."""
BASES = {
    "bert": ("bert", "classification"),
    "distilbert": ("distilbert", "classification"),
    "llama": ("llama", "instruction"),
    "gpt2": ("gpt2", "instruction"),
    "llama, last token": ("llama", "classification"),
    "gpt2, last token": ("gpt2", "classification"),
    "mistral, short window": ("mistral 4", "instruction"),
    "mistral, window above the trial's rows": ("mistral 12", "instruction"),
}
UPPER = Selection(layers=(2,))


def save(name: str, path: Path) -> Path:
    """A base of three layers without dropout."""
    import transformers as t

    if name in ("bert", "llama"):
        return tiny.save(name, path, num_hidden_layers=3, **(STILL if name == "bert" else {}))
    if name == "gpt2":
        return tiny.save(name, path, n_layer=3)
    common: dict[str, Any] = {"vocab_size": len(tiny.tokenizer()), "initializer_range": 0.15, **tiny.ENDS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if name == "distilbert":
            still = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
            sizes = {"dim": tiny.SIZE, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}
            base: Any = t.DistilBertForMaskedLM(t.DistilBertConfig(**common, **sizes, **still))
        else:
            sizes = {"hidden_size": tiny.SIZE, "intermediate_size": 48, "num_hidden_layers": 3}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": int(name.split()[1])}
            base = t.MistralForCausalLM(t.MistralConfig(**common, **sizes, **heads))
    base.save_pretrained(str(path))
    tiny.tokenizer().save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("still")
    return {name: save(name, folder / name.replace(" ", "")) for name in {base for base, _ in BASES.values()}}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path], texts: Encoded, tasks: Encoded) -> dict[str, FederatedModel]:
    """Bases whose blocks were found to take rows end to end."""
    data = {"classification": texts, "instruction": tasks}
    found = {}
    for name, (base, kind) in BASES.items():
        # A decoder finds a row's last token by the padding token.
        model = found[name] = tiny.load(folders[base], kind, pad_token_id=0)
        model.packed = packed_rows.find(model, data[kind])
    return found


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are wide enough."""
    monkeypatch.setattr(length_parts, "WIDEST", 0)


def batch_of(lengths: list[int], kind: str, *key: object) -> dict[str, Tensor]:
    """Random tokens, padded on the right."""
    rng = generator("packed", *key)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, 60, mask.shape, generator=rng) * mask
    labels = torch.randint(0, 3, (len(lengths),), generator=rng)
    if kind == "instruction":
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(model: FederatedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Those of each row, without padding, from a packed pass."""
    with torch.no_grad(), model.packed.packing(batch):
        logits = model.model(**pass_inputs(model, batch)).logits
    if model.kind != "instruction":
        return list(logits)
    return [own[: int(n)] for own, n in zip(logits, batch["attention_mask"].sum(dim=1), strict=True)]


@contextmanager
def shapes_in_blocks(model: FederatedModel) -> Iterator[list[torch.Size]]:
    """Those of the hidden states that the last block is given."""
    seen: list[torch.Size] = []
    last = max((name for name in model.layers), key=lambda name: name.split("."))
    layer = model.model.get_submodule(last)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", BASES)
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6))
def test_losses_and_gradients_are_those_of_padded_rows(
    models: dict[str, FederatedModel], name: str, lengths: list[int]
) -> None:
    """For any lengths, whatever a decoder's window, with an adapter in which both factors count."""
    model, batch = models[name], batch_of(lengths, BASES[name][1], lengths)
    sent = probe(model, 1)
    model.load(sent)
    with torch.no_grad():
        padded, packed = (float(client_losses(model, batch, packed=packed)) for packed in (False, True))
    assert packed == pytest.approx(padded, rel=1e-5, abs=1e-5)
    with shapes_in_blocks(model) as seen:
        padded_gradients, packed_gradients = (gradients(model, sent, batch, packed=packed) for packed in (False, True))
    assert seen == [(len(lengths), max(lengths), seen[0][-1]), (1, sum(lengths), seen[0][-1])]
    assert apart(padded_gradients, packed_gradients) < 10 * ROUNDING  # where all labels are right it cancels


@pytest.mark.parametrize("name", BASES)
def test_a_row_does_not_depend_on_the_others(models: dict[str, FederatedModel], name: str) -> None:
    """Other values in another row, and NaN too, which not even a weight of exactly zero keeps out."""
    model, lengths = models[name], [9, 14, 14, 5]
    batch = batch_of(lengths, BASES[name][1])
    wanted = logits_of(model, batch)
    embeddings: Any = model.model.get_input_embeddings()
    for row in range(len(lengths)):
        for value in (0.3, torch.nan):

            def changed(layer: nn.Module, args: Any, output: Tensor, row: int = row, value: float = value) -> Tensor:
                return output.index_fill(0, torch.tensor([row]), value)

            handle = embeddings.register_forward_hook(changed)
            found = logits_of(model, batch)
            handle.remove()
            for other, (x, y) in enumerate(zip(found, wanted, strict=True)):
                if other != row:
                    torch.testing.assert_close(x, y)
                else:
                    assert bool(x.isnan().all()) == (value != value)


def close(one: LocalResult, other: LocalResult, before: dict[str, Tensor], tolerance: float) -> None:
    x, y = tensors(one), tensors(other)
    moved = torch.stack([(y[name] - before[name]).norm() for name in y]).norm()
    error = torch.stack([(x[name] - y[name]).norm() for name in y]).norm()
    assert moved > 0
    assert error < tolerance * moved
    assert abs(one.train_loss - other.train_loss) < max(1e-5, tolerance**2) * abs(other.train_loss)


@pytest.mark.parametrize("case", ["everywhere", "upper half", "kept states", "accumulated", "bfloat16", "weights"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "gpt2", "gpt2, last token"])
def test_training_is_that_of_padded_rows(
    folders: dict[str, Path], texts: Encoded, tasks: Encoded, wide: None, name: str, case: str
) -> None:
    base, kind = BASES[name]
    data = {"classification": texts, "instruction": tasks}[kind]
    selection = UPPER if case in ("upper half", "kept states") else Selection()
    trains = "targets" if case == "weights" else "adapter"
    model = tiny.load(folders[base], kind, selection=selection, pad_token_id=0, trains=trains, base_dropout=False)
    local = LOCAL.model_copy(
        update={"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 6, "accumulate": 1 + (case == "accumulated")}
    )
    engine = EngineConfig(name="sequential", precision="bfloat16" if case == "bfloat16" else "float32")
    chosen, sent = TrainingSettings(local=local, engine=engine), tiny.broadcast(model)
    work = Assignment("client-0", sent, np.arange(len(data)), 3, 1.0)
    (padded,) = cohort.work(model, data, [work], chosen, 0)
    find_packed(model, data, EngineConfig(), 6)
    assert model.packed is not None
    assert model.notes == ()
    if case == "kept states":
        find_prefix(model, data, EngineConfig())
        assert model.prefix is not None
    with shapes_in_blocks(model) as seen:
        (packed,) = cohort.work(model, data, [work], chosen, 0)
    assert [rows for rows, _, _ in seen] == [1] * (6 if case == "accumulated" else 3)
    assert model.prefix is None or len(model.prefix.held) > 0
    close(packed, padded, start_of(sent), 0.05 if case == "bfloat16" else ROUNDING)
    blocks = model.packed.blocks
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_a_gradient_of_the_base_is_that_of_padded_rows(folders: dict[str, Path], tasks: Encoded, wide: None) -> None:
    model = tiny.load(folders["llama"], "instruction", trains="targets")
    work = Assignment("client-0", tiny.broadcast(model), np.arange(len(tasks)), 1, 1.0)
    chosen = TrainingSettings(local=LOCAL.model_copy(update={"batch_size": 6}))
    padded = gradient(model, work, tasks, chosen, 0)
    find_packed(model, tasks, EngineConfig(), 6)
    with shapes_in_blocks(model) as seen:
        packed = gradient(model, work, tasks, chosen, 0)
    assert all(rows == 1 for rows, _, _ in seen)
    for name, payload in padded.update.modules.items():
        x, y = (one.tensors()["gradient"] for one in (packed.update.modules[name], payload))
        assert (x - y).norm() < ROUNDING * y.norm(), name


def test_narrow_clients_and_checkpointing_are_as_before(
    folders: dict[str, Path], tasks: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.load(folders["llama"], "instruction")
    find_packed(model, tasks, EngineConfig(), 6)
    assert model.packed is None  # nothing was wide, so nothing was tried
    with monkeypatch.context() as patch:
        patch.setattr(length_parts, "WIDEST", 0)
        for engine in (EngineConfig(compile=True), EngineConfig(checkpointing=True)):
            find_packed(model, tasks, engine, 6)
            assert model.packed is None
        find_packed(model, tasks, EngineConfig(), 6)
        assert model.packed is not None
    work = Assignment("client-0", tiny.broadcast(model), np.arange(len(tasks)), 1, 1.0)
    with shapes_in_blocks(model) as seen:
        cohort.work(model, tasks, [work], TrainingSettings(local=LOCAL, engine=EngineConfig(name="sequential")), 0)
    assert [rows for rows, _, _ in seen] == [LOCAL.batch_size]


def test_rows_of_one_length_are_not_packed(folders: dict[str, Path], tasks: Encoded, wide: None) -> None:
    """There is nothing to leave out: the bits are those of the whole batch."""
    model = tiny.load(folders["llama"], "instruction")
    lengths = tasks.lengths.tolist()
    alike = np.array([row for row in range(len(tasks)) if lengths[row] == lengths[0]])
    assert len(alike) >= 4
    work = Assignment("client-0", tiny.broadcast(model), alike, 2, 1.0)
    chosen = TrainingSettings(local=LOCAL, engine=EngineConfig(name="sequential"))
    (padded,) = cohort.work(model, tasks, [work], chosen, 0)
    find_packed(model, tasks, EngineConfig(), 4)
    with shapes_in_blocks(model) as seen:
        (found,) = cohort.work(model, tasks, [work], chosen, 0)
    assert {rows for rows, _, _ in seen} == {4}
    tiny.same(tensors(found), tensors(padded))


def mixing(forward: Any) -> Any:
    """The layer, whose output at a token is moved a little by the token before it, across rows too."""

    def mixed(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        output = forward(hidden, *args, **options)
        return output + 1e-4 * nn.functional.pad(output[:, :-1], (0, 0, 1, 0))

    return mixed


def counting(forward: Any) -> Any:
    """The layer with positions of its own, from the start of what it is given."""
    table = 0.05 * torch.arange(512)[:, None]

    def counted(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        return forward(hidden + table[: hidden.shape[1]], *args, **options)

    return counted


def sharpening(forward: Any) -> Any:
    """The layer, sharper from its 33rd token on, more than a trial has; as Llama 4's attention from its 8,193rd."""

    def sharpened(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        return forward(hidden * (1 + torch.arange(hidden.shape[1]) // 32)[:, None], *args, **options)

    return sharpened


def asserting(forward: Any) -> Any:
    """The layer, which insists on several rows."""

    def asserted(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        assert len(hidden) > 1
        return forward(hidden, *args, **options)

    return asserted


def breaking(forward: Any) -> Any:
    """The layer, whose backward pass breaks off where there is one row; the head has its gradient by then."""

    def stop(grad: Tensor) -> None:
        raise RuntimeError("one row")

    def broken(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        output = forward(hidden, *args, **options)
        if len(output) == 1 and output.requires_grad:
            output.register_hook(stop)
        return output

    return broken


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (mixing, "its blocks mix the tokens of rows that lie end to end"),
        (counting, "gradients of rows that lie end to end differ by"),
        (sharpening, "its blocks count positions by themselves"),
        (asserting, "its blocks cannot be given rows end to end"),
        (breaking, "its blocks cannot be given rows end to end"),
        ("eager", "its attention is not torch's scaled_dot_product_attention"),
        ("other arguments", "its blocks cannot be given rows end to end"),
    ],
)
def test_blocks_that_cannot_are_left_as_they_are_and_the_reason_is_noted(
    folders: dict[str, Path], texts: Encoded, wide: None, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    """However little they mix; adapter and base are afterwards what they were."""
    model = tiny.load(folders["bert"], "classification")
    before = model.model.state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    base: Any = model.model
    layer = base.bert.encoder.layer[1]
    if change == "eager":
        base.config._attn_implementation = "eager"
    elif change == "other arguments":
        forward = layer.forward
        monkeypatch.setattr(layer, "forward", lambda hidden, *args, **options: forward(hidden[:, :9], *args, **options))
    else:
        monkeypatch.setattr(layer, "forward", change(layer.forward))
    find_packed(model, texts, EngineConfig(), 4)
    assert model.packed is None
    assert len(model.notes) == 1
    assert model.notes[0].startswith("batches are padded in the base's blocks, in parts of similar lengths: " + reason)
    tiny.same(dict(model.model.state_dict()), kept)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.bert.encoder.layer)
    assert all(parameter.grad is None for parameter in model.model.parameters())  # or they would join the first step


def test_a_base_that_leaves_out_layers_at_random_keeps_whole_batches_and_has_no_cohort(
    tasks: Encoded, tmp_path: Path, wide: None
) -> None:
    """A block that is left out would pack no rows, or put none back; and a cohort would leave out the same for all."""
    import transformers as t

    sizes = {"hidden_size": tiny.SIZE, "word_embed_proj_dim": tiny.SIZE, "ffn_dim": 48, "num_hidden_layers": 3}
    common: dict[str, Any] = {"vocab_size": len(tiny.tokenizer()), "num_attention_heads": 4, **tiny.ENDS}
    t.OPTForCausalLM(t.OPTConfig(**common, **sizes, dropout=0.0, layerdrop=0.2)).save_pretrained(str(tmp_path))
    tiny.tokenizer().save_pretrained(str(tmp_path))
    model = tiny.load(tmp_path, "instruction")
    find_packed(model, tasks, EngineConfig(), 6)
    assert model.packed is None
    work = Assignment("client-0", tiny.broadcast(model), np.arange(len(tasks)), 4, 1.0)
    chosen = TrainingSettings(local=LOCAL.model_copy(update={"batch_size": 6}))
    one, other = (tensors(cohort.work(model, tasks, [work], chosen, 0)[0]) for _ in range(2))
    tiny.same(one, other)
    reason = cohort.applies(model, tasks, work.broadcast.recipe, chosen)
    assert reason == "the base leaves out whole layers at random (layerdrop)"
    still = tiny.load(tmp_path, "instruction", base_dropout=False)
    find_packed(still, tasks, EngineConfig(), 6)
    assert still.packed is not None
    assert cohort.applies(still, tasks, work.broadcast.recipe, chosen) is None


def test_layers_in_several_lists_are_refused(folders: dict[str, Path], texts: Encoded) -> None:
    model = tiny.load(folders["bert"], "classification")
    layers = {"elsewhere.layers.0.dense": next(iter(model.layers.values())), **model.layers}
    with pytest.raises(NotApplicable, match="not in one list of blocks"):
        packed_rows.find(replace(model, layers=layers), texts)


def test_a_base_that_workers_copy_to_gpus_is_not_tried_on_the_cpu(
    folders: dict[str, Path], instructions: Path, wide: None
) -> None:
    provision, config, cpu = Provision(), tiny.config(folders["llama"], instructions), torch.device("cpu")
    prepared = provision.prepared(config, provision.corpus(config))
    wanted = Wanted(config, prepared, "adapter", 4, 0, torch.device("cuda"), 2)
    assert wanted.context(cpu).model.packed is None
    assert replace(wanted, device=cpu).context(cpu).model.packed is not None


def test_a_run_has_the_same_bits_with_any_number_of_processes(
    folders: dict[str, Path], instructions: Path, tmp_path: Path, wide: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: set[int] = set()
    packing = packed_rows.PackedRows.packing

    def noted(self: packed_rows.PackedRows, batch: dict[str, Tensor]) -> Any:
        rows.add(len(batch["labels"]))
        return packing(self, batch)

    monkeypatch.setattr(packed_rows.PackedRows, "packing", noted)
    losses = []
    for workers in (1, 2):
        engine = {"workers": workers, "name": "sequential"}
        history = run(tiny.config(folders["llama"], instructions, engine=engine), tmp_path / str(workers)).history
        losses.append([record["train_loss"] for record in history])
        assert 4 in rows  # of the first run, which trains in this process
    assert losses[0] == losses[1]
