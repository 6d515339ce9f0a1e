"""Adapters from elsewhere, and the options of their merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import Case, Content, adapter, deep, setting

A, B = "base_model.model.layer.q_proj.lora_A.weight", "base_model.model.layer.q_proj.lora_B.weight"


def _bad(content: Content, *parts: str) -> Case:
    return Case("adapters", "merge a bad --method flora --out new", parts, {"bad": content})


def _config(text: str | bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        adapter()(path)
        (path / "adapter_config.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def _weights(content: bytes | None, name: str = "adapter_model.safetensors") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        adapter()(path)
        (path / "adapter_model.safetensors").unlink()
        if content is not None:
            (path / name).write_bytes(content)

    return make


def _inside(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        shutil.copytree(path.parent / "a", path / name)

    return make


def _truncated(path: Path) -> None:
    adapter()(path)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def _endless(config: dict[str, Any]) -> None:
    config["rank_pattern"] = {"(a|aa)+b": 2}


def _long_name(tensors: dict[str, torch.Tensor]) -> None:
    for key in (A, B):
        tensors[key.replace("q_proj", "a" * 60)] = tensors.pop(key)


ADAPTERS = [
    Case(
        "adapters",
        "RUN --set model.name=a",
        ("is the folder of an adapter: expected its base, 'base', as model.name", "model.adapter = "),
    ),
    # Folders and files
    _bad(lambda path: path.mkdir(), "bad holds no adapter_config.json"),
    _bad("a file", "bad is a file"),
    _bad(_inside("adapter"), "bad holds no adapter_config.json", "such as bad/adapter"),
    _bad(_inside("default"), "bad holds no adapter_config.json", "such as bad/default"),
    _bad(lambda path: path.symlink_to("nowhere"), "bad does not exist"),
    _bad(_config(""), "adapter_config.json is not valid JSON"),
    _bad(_config("[]"), "adapter_config.json holds a JSON list"),
    _bad(_config(b"\xff\xfe"), "adapter_config.json is not valid JSON"),
    _bad(_config(deep("[", "]")), "adapter_config.json is not valid JSON"),
    _bad(_config('{"r": ' + deep('{"r": ', "}")), "adapter_config.json is not valid JSON"),
    _bad(_config('{"r": ' + "9" * 5000 + "}"), "adapter_config.json is not valid JSON"),
    _bad(_weights(None), "bad holds no adapter_model.safetensors"),
    _bad(_weights(b""), "adapter_model.safetensors cannot be read"),
    _bad(_weights(b"\xff" * 100), "adapter_model.safetensors cannot be read"),
    _bad(_weights(b"\x80\x04.", "adapter_model.bin"), "adapter_model.bin, a pickle", "docs/merging.md"),
    _bad(_truncated, "adapter_model.safetensors cannot be read"),
    # Configurations
    _bad(setting(peft_type="LOHA"), "peft_type 'LOHA'", "expected 'LORA'"),
    _bad(setting(peft_type=None), "peft_type None"),
    _bad(setting(use_dora=True), "use_dora is set", "expected a plain LoRA adapter"),
    _bad(setting(lora_bias=True), "lora_bias is set"),
    _bad(setting(bias="all"), "bias='all'", "expected 'none'"),
    _bad(setting(init_lora_weights="pissa"), "init_lora_weights='pissa'", "converted to plain LoRA"),
    _bad(setting(init_lora_weights="loftq"), "init_lora_weights='loftq'"),
    _bad(setting(init_lora_weights="magic"), "init_lora_weights='magic'"),
    _bad(setting(target_parameters=["experts"]), "target_parameters = ['experts']", "no factors of theirs"),
    _bad(setting(layer_replication=[[0, 2]]), "layer_replication is set"),
    _bad(setting(r=0), "rank r = 0", "whole number of at least 1"),
    _bad(setting(r="two"), "rank r = 'two'"),
    _bad(setting(r=3), "lora_A (2, 6)", "expected (3, in)"),
    _bad(setting(r=10**300), "(2, 6)"),
    _bad(setting(lora_alpha=None), "alpha lora_alpha = None"),
    _bad(setting(lora_alpha=10**400), "alpha lora_alpha = 1000", "expected a finite number"),
    _bad(setting(lora_alpha=1e400), "alpha lora_alpha = inf"),
    _bad(setting(lora_alpha=float("nan")), "alpha lora_alpha = nan"),
    _bad(setting(lora_alpha=1e308), "scaling 5e+307", "that float32 can hold"),
    _bad(setting(rank_pattern=[1]), "rank_pattern = [1]"),
    _bad(setting(rank_pattern={"(": 2}), "rank_pattern '('", "expected a regular expression"),
    _bad(setting(rank_pattern={"q": -1}), "rank q = -1"),
    _bad(adapter(_endless, _long_name), "'(a|aa)+b'", "takes over 0.3 s", "expected a simpler one"),
    _bad(setting(rank_pattern={"(" * 3000: 2}), "expected a regular expression"),
    _bad(setting(alpha_pattern={"q_proj": 10**400}), "alpha q_proj = 1000"),
    _bad(setting(modules_to_save="head"), "modules_to_save = 'head'"),
    _bad(setting(modules_to_save=["head"]), "modules_to_save = ['head']", "expected weights of these modules"),
    _bad(setting(base_model_name_or_path="other"), "bad adapts 'other', a adapts 'base'", "--base NAME"),
    _bad(setting(revision="v2"), "bad adapts 'base@v2'"),
    # Tensors
    _bad(adapter(tensors=lambda t: t.pop(A)), "lora_B without lora_A"),
    _bad(adapter(tensors=lambda t: (t.pop(A), t.pop(B), t.update(x=torch.ones(2)))), "'x'", "base_model.model."),
    _bad(adapter(tensors=lambda t: t.update({A: torch.full((2, 6), torch.nan)})), "NaN or infinite"),
    _bad(adapter(tensors=lambda t: t.update({A: torch.full((2, 6), 3e38), B: torch.full((5, 2), 3e38)})), "norm"),
    _bad(adapter(tensors=lambda t: t.update({A: torch.ones(2, 6).to(torch.float8_e4m3fn)})), "float8", "16 to 64 bit"),
    _bad(adapter(tensors=lambda t: t.update({A: torch.ones(2, 6, dtype=torch.int32)})), "int32"),
    _bad(adapter(tensors=lambda t: t.update({A: torch.ones(2, 6, dtype=torch.complex64)})), "complex64"),
    _bad(adapter(tensors=lambda t: t.update({A: torch.ones(2, 6, 1)})), "(2, 6, 1)", "expected a matrix"),
    _bad(adapter(tensors=lambda t: t.update({A: torch.ones(2, 0)})), "expected no empty side"),
    _bad(adapter(tensors=lambda t: t.update({A: torch.ones(4, 6)})), "lora_A (4, 6)"),
    _bad(adapter(tensors=lambda t: t.update({A: torch.ones(2, 7)})), "(5, 7)", "expected (5, 6)"),
    _bad(adapter(tensors=lambda t: t.update({"base_model.model.norm.weight": torch.ones(3)})), "norm.weight"),
    _bad(
        adapter(tensors=lambda t: t.update({k.replace("q_proj", "k_proj"): v.clone() for k, v in t.items()})),
        "adapts other modules",
        "--missing zero",
    ),
    _bad(
        adapter(tensors=lambda t: t.update({k.replace("_A", "_A.x").replace("_B", "_B.y"): t.pop(k) for k in (A, B)})),
        "the adapters x, y",
    ),
    # Options
    Case("merge", "merge --method flora --out new", ("missing argument 'ADAPTER_DIR...'",)),
    Case("merge", "merge a b --out new", ("missing option '--method'",)),
    Case("merge", "merge a b --method flora", ("missing option '--out'",)),
    Case("merge", "merge a none --method flora --out new", ("none does not exist",)),
    Case("merge", "merge a b --method flora --out a", ("a exists already", "expected a new or empty folder")),
    Case("merge", "merge a b --method flora --out texts.jsonl", ("texts.jsonl exists already",)),
    Case("merge", "merge a b --method flor --out new", ("unknown method 'flor'",)),
    Case("merge", "merge a b --method tise --out new", ("unknown method 'tise'",)),
    Case("merge", "merge a b --method local --out new", ("local", "expected a method that can merge")),
    Case("merge", "merge a b --method fedavg --out new", ("fedavg averages weights",)),
    Case("merge", "merge a b --method fedit --out new", ("fedit needs one rank per module",)),
    Case("merge", "merge a b --method fed_sb --out new", ("fed_sb needs 3", "expected a method that can")),
    Case("merge", "MERGE --weights 1", ("1 weights for 2 adapters",)),
    Case("merge", "MERGE --weights 1 2 3", ("3 weights for 2 adapters",)),
    Case("merge", "MERGE --weights 1,-1", ("weight -1", "expected a finite number above 0")),
    Case("merge", "MERGE --weights 0 1", ("weight 0",)),
    Case("merge", "MERGE --weights nan 1", ("weight nan",)),
    Case("merge", "MERGE --weights inf 1", ("weight inf",)),
    Case("merge", "MERGE --weights 1e308 1e308", ("weight 1e+308",)),
    Case("merge", "MERGE --weights 1e-320 1", ("weight 1e-320",)),
    Case("merge", "MERGE --weights one,two", ("--weights 'one'", "expected numbers")),
    Case("merge", "MERGE --rank 0", ("rank = 0",)),
    Case("merge", "MERGE --rank -2", ("rank = -2",)),
    Case("merge", "MERGE --rank two", ("--rank 'two'", "expected a whole number")),
    Case("merge", "MERGE --rank 1.5", ("--rank '1.5'",)),
    Case("merge", f"MERGE --rank {'9' * 5000}", ("--rank '999", "expected a whole number")),
    Case("merge", "MERGE --set server_rnk=3", ("server_rnk",)),
    Case("merge", "MERGE --missing nul", ("missing = 'nul'", "'refuse' or 'zero'")),
    Case("merge", "MERGE --dtype float8", ("dtype = 'float8'", "expected one of float32")),
    Case("merge", "MERGE --full", ("base 'base' could not be read",)),
    Case("merge", "MERGE --full --base nowhere", ("base 'nowhere' could not be read",)),
    Case("merge", "MERGE --full --base llama", ("base 'llama'", "layer.q_proj")),
    Case("merge", "MERGE --full --base texts.jsonl", ("base 'texts.jsonl' could not be read",)),
    Case("merge", "merge a b --method ties --set density=2 --out new", ("method.density = 2",)),
    Case("merge", "merge a b --method ties --set local.steps=2 --out new", ("expected an option of the method",)),
    Case("merge", "merge a b --method ties --set density --out new", ("'density'", "such as --set density=0.2")),
    Case("merge", "merge a b --method ties --set name=flora --out new", ("expected the method in --method",)),
    Case("merge", "merge a b --method dare_ties --set desnity=0.2 --out new", ("did you mean 'density'?",)),
    Case("merge", "merge a b --method ties --set majority_sign_method=vote --out new", ("'vote'", "'frequency'")),
]
