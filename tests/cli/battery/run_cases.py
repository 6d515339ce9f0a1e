"""Runs and their folders, bases, starting adapters, sites."""

from __future__ import annotations

from pathlib import Path

from tables import Case, Content, adapter, base_with, deep, edited, run_with


def _resume(content: Content, *parts: str, command: str = "resume bad") -> Case:
    return Case("runs", command, parts, {"bad": content})


def _base(base: str, name: str, change: object, *parts: str) -> Case:
    data = "--set data.train=tasks.jsonl " if base == "llama" else ""
    files = {"bad": base_with(base, name, change)}  # type: ignore[arg-type]
    return Case("bases", f"RUN {data}--set model.name=bad", parts, files)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip(name: str, place: int) -> object:
    def make(path: Path) -> None:
        run_with("note", "")(path)
        content = bytearray((path / name).read_bytes())
        content[place] ^= 4
        (path / name).write_bytes(bytes(content))

    return make


def _setting(text: str, other: str) -> object:
    def make(path: Path) -> None:
        run_with("note", "")(path)
        config = (path / "config.toml").read_text()
        assert text in config
        (path / "config.toml").write_text(config.replace(text, other))

    return make


CHECKPOINT = "checkpoint/federation.safetensors"

RUNS = [
    Case("runs", "resume none", ("none does not exist",)),
    Case("runs", "resume ''", ("holds no run",)),
    Case("runs", "resume bert", ("bert holds no run",)),
    Case("runs", "resume texts.jsonl", ("texts.jsonl is a file",)),
    Case("runs", "resume finished --rounds 99999999999999999999999 --workers 0", ("--workers",)),
    Case("runs", "inspect none", ("none does not exist",)),
    Case("runs", "report none", ("none does not exist",)),
    Case("runs", "watch none", ("none does not exist",)),
    Case("runs", "watch finished --port x", ("--port 'x'", "0 to 65535")),
    Case("runs", "report finished --out texts.jsonl", ("texts.jsonl exists and was not made by fedspan",)),
    Case("runs", "plot finished --x time", ("--x 'time'", "megabytes")),
    Case("runs", "plot none", ("none does not exist",)),
    Case("runs", "plot finished --out new.xyz", ("new.xyz", ".png")),
    Case("runs", "plot finished --metric fame", ("'fame'",)),
    Case("runs", "inspect finished --plot new.xyz", ("new.xyz",)),
    _resume(run_with("config.toml", ""), "bad cannot be resumed"),
    _resume(run_with("config.toml", "seed = "), "config.toml is not valid TOML"),
    _resume(run_with("config.toml", "seed = " + deep("[", "]")), "config.toml"),
    _resume(run_with(CHECKPOINT, b""), "federation.safetensors is damaged", "expected a checkpoint"),
    _resume(run_with(CHECKPOINT, b"\x00" * 4000), "federation.safetensors is damaged"),
    _resume(run_with(CHECKPOINT, "hello, this is no checkpoint"), "federation.safetensors is damaged"),
    _resume(_flip(CHECKPOINT, -3), "federation.safetensors is damaged", "checksum"),
    _resume(_flip(CHECKPOINT, 3000), "federation.safetensors"),
    _resume(_flip(CHECKPOINT, 4), "federation.safetensors is damaged"),
    _resume(_setting("steps = 2", "steps = 3"), "local.steps is 3, and it began with 2"),
    _resume(_setting("seed = 3", "seed = 4"), "seed is 4, and it began with 3"),
    _resume(_setting('name = "glora"', 'name = "flora"'), "method.name is 'flora'"),
    _resume(_setting("/texts.jsonl", "/none.jsonl"), "none.jsonl"),
    _resume(_setting("/bert", "/none"), "none"),
    _resume(run_with("sites.json", "{}"), "real sites"),
    *(
        Case("runs", f"{command} bad", ("bad", "damaged"), {"bad": run_with("metrics.jsonl", content)})
        for command in ("plot", "inspect", "report")
        for content in ("{", "3\n", "[]\n", "{}\n", deep("["), b"\xff\xfe", '{"round_num": 1, "diagnostics": 3}\n')
    ),
    *(
        Case("runs", "plot bad", ("bad", "damaged"), {"bad": run_with("summary.json", content)})
        for content in ("{", "[]", deep('{"a":'), "{}", b"\xff\xfe", '{"metric": 3}')
    ),
    # Bases
    Case("bases", "RUN --set model.name=none/at/all", ("model.name = 'none/at/all'",)),
    Case("bases", "RUN --set model.name=", ("model.name = ''", "at least 1 character")),
    Case("bases", "RUN --set model.name=texts.jsonl", ("model.name = ", "/texts.jsonl'")),
    Case("bases", "RUN --set model.name=builtin:decodr", ("builtin:decodr",)),
    Case("bases", "RUN --set model.name=../../..", ("model.name",)),
    Case("bases", "RUN --set model.name=vit", ("model.name = ", "/vit'")),
    _base("bert", "config.json", lambda file: file.unlink(), "model.name = ", "/bad'"),
    _base("bert", "config.json", lambda file: file.write_text("{"), "model.name = ", "/bad'"),
    _base("bert", "config.json", lambda file: file.write_text(deep("[", "]")), "model.name = ", "/bad'"),
    _base("bert", "config.json", edited(model_type="unheard"), "model.name = ", "/bad'"),
    _base("bert", "config.json", edited(hidden_size=0), "model.name = ", "/bad'"),
    _base("bert", "config.json", edited(hidden_size="wide"), "model.name = ", "/bad'"),
    _base("bert", "config.json", edited(num_hidden_layers=3), "model.name = ", "/bad'", "lack"),
    _base("bert", "config.json", edited(quantization_config={"quant_method": "gptq"}), "quantised already"),
    _base("bert", "model.safetensors", lambda file: file.unlink(), "model.name = ", "/bad'"),
    _base("bert", "model.safetensors", _cut, "model.name = ", "/bad'"),
    _base("bert", "model.safetensors", lambda file: file.write_bytes(b""), "model.name = ", "/bad'"),
    _base("bert", "tokenizer.json", lambda file: file.write_text("{"), "model.name = ", "/bad'"),
    _base("bert", "tokenizer.json", lambda file: file.unlink(), "model.name = ", "/bad'"),
    Case("bases", "RUN --set data.train=tasks.jsonl", ("bert",)),
    Case("bases", "RUN --set 'federation.ranks=33'", ("rank 33 is above",)),
    Case("bases", "RUN --set adapter.target_modules=embeddings", ("'embeddings' matches no linear layer",)),
    # Starting adapters
    Case("starting adapters", "RUN --set model.adapter=none", ("none does not exist",)),
    Case("starting adapters", "RUN --set model.adapter=", ("model.adapter = ''", "at least 1 character")),
    Case("starting adapters", "RUN --set model.adapter=3", ("model.adapter = 3",)),
    Case("starting adapters", "RUN --set model.adapter=bert", ("bert holds no adapter_config.json",)),
    Case("starting adapters", "RUN --set model.adapter=a", ("model.adapter = ", "/a'", "this base does not have")),
    Case(
        "starting adapters",
        "RUN --set model.adapter=x",
        ("use_dora",),
        {"x": adapter(lambda c: c.update(use_dora=True))},
    ),
    # Sites
    Case("sites", "flower init texts.jsonl --sites 2", ("texts.jsonl",)),
    Case("sites", "flower init new --sites 0", ("--sites", "0")),
    Case("sites", "flower init finished --sites 2", ("finished",)),
    Case("sites", "flower keys rotate none", ("none",)),
    Case("sites", "flower up none --sites 0", ("--sites",)),
    Case("sites", "flower init new --sites 2 --set federation.roundss=2", ("federation.roundss",)),
    Case("sites", "flower init new --sites 2 --set method.name=glor", ("unknown method 'glor'",)),
]
