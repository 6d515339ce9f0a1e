"""Settings, options of methods, the command line, and the files of settings."""

from __future__ import annotations

from tables import Case, deep


def _set(subject: str, text: str, *parts: str) -> Case:
    return Case(subject, f"RUN --set '{text}'", parts)


def _toml(content: str | bytes, *parts: str) -> Case:
    return Case("settings file", "run bad.toml --out new", parts, {"bad.toml": content})


SETTINGS = [
    # Numbers: zero, negative, fractional, not a number, infinite, words, too large, lists
    *(
        _set("numbers", f"{key}={value}", f"{key} = ")
        for key in ("federation.num_clients", "federation.rounds", "local.steps", "local.batch_size", "data.max_length")
        for value in ("0", "-3", "1.5", "true", '"many"', "[2]", "inf", "1e400")
    ),
    *(
        _set("numbers", f"{key}={value}", f"{key} = ")
        for key in ("adapter.alpha", "local.learning_rate", "privacy.clip", "deployment.deadline")
        for value in ("0", "-1.0", "nan", "inf", '"fast"', "{}")
    ),
    *(
        _set("numbers", f"{key}={value}", f"{key} = ")
        for key in ("federation.participation", "data.holdout", "adapter.dropout")
        for value in ("-0.1", "1.5", "nan", '"half"')
    ),
    _set("numbers", "threads=1000000000", "threads = 1000000000"),
    _set("numbers", "engine.workers=1000000000", "engine.workers = 1000000000"),
    _set("numbers", "federation.num_clients=1000000000", "1000000000"),
    _set("numbers", "federation.num_clients=100000000000000000000000", "100000000000000000000000"),
    _set("numbers", "federation.ranks=1000000000", "rank 1000000000"),
    _set("numbers", "federation.ranks=0", "0"),
    _set("numbers", "federation.ranks=[2, 0]", "0"),
    _set("numbers", "federation.ranks=[2]", "1 ranks for 2 clients"),
    _set("numbers", "federation.ranks=[2, 2, 2]", "3 ranks for 2 clients"),
    _set("numbers", 'federation.ranks="unifrom"', "unifrom"),
    _set("numbers", "federation.min_clients=3", "min_clients = 3"),
    _set("numbers", "federation.min_success=3", "min_success = 3"),
    _set("numbers", "seed=-1", "seed = -1"),
    _set("numbers", "seed=0.5", "seed = 0.5"),
    _set("numbers", "data.max_length=1", "data.max_length = 1", "leaves none of its text: expected at least 2"),
    _set("numbers", "privacy.delta=1", "privacy.delta = 1"),
    _set("numbers", "privacy.threshold=0.5", "privacy.threshold = 0.5"),
    _set("numbers", "privacy.noise_multiplier=-1", "privacy.noise_multiplier = -1"),
    _set("numbers", "local.learning_rate=1e39", "local.learning_rate"),
    _set("numbers", "evaluation.max_new_tokens=0", "evaluation.max_new_tokens = 0"),
    # Names
    _set("names", "federation.round=3", "'federation.round'", "did you mean 'federation.rounds'?"),
    _set("names", "modle.name=x", "'modle'"),
    _set("names", "federation=3", "federation = 3", "[federation]"),
    _set("names", "federation.alpha=0.1", "federation.alpha is now called federation.dirichlet_alpha"),
    _set("names", "local.optimizer=adam", "local.optimizer = 'adam'", "'adamw'"),
    _set("names", "federation.partition=random", "federation.partition = 'random'", "'iid'"),
    _set("names", "federation.sampler=roulette", "roulette"),
    _set("names", "federation.weighting=size", "federation.weighting = 'size'"),
    _set("names", "engine.name=fast", "engine.name = 'fast'", "'cohort'"),
    _set("names", "model.dtype=float8", "model.dtype = 'float8'"),
    _set("names", "model.quantise=int4", "model.quantise = 'int4'"),
    _set("names", "wire.up=float16", "wire.up = 'float16'"),
    _set("names", "privacy.dp=central", "privacy.dp = 'central'"),
    _set("names", "privacy.accountant=moments", "moments"),
    _set("names", "robust.filter=krumm", "robust.filter = 'krumm'"),
    _set("names", "server.optimizer=adam", "server.optimizer = 'adam'"),
    _set("names", "data.task=fils", "data.task = 'fils'"),
    _set("names", "data.kind=text", "data.kind = 'text'"),
    _set("names", "data.metric=acuracy", "acuracy"),
    _set("names", "device=gpu", "device = 'gpu'"),
    _set("names", "device=hpu", "device = 'hpu'"),
    _set("names", "device=vulkan", "device = 'vulkan'"),
    _set("names", "device=CUDA", "device = 'CUDA'"),
    _set("names", "device=cuda:99", "device = 'cuda:99'"),
    _set("names", "device=meta", "device = 'meta'"),
    _set("names", "device=", "device = ''"),
    _set("names", "adapter.target_modules=[]", "adapter.target_modules is empty"),
    _set("names", "adapter.target_modules=qkv", "'qkv' matches no"),
    _set("names", "adapter.target_modules=3", "adapter.target_modules = 3"),
    _set("names", "data.text_columns=body", "body"),
    _set("names", "data.label_column=target", "target"),
    # Settings that exclude each other
    Case("combinations", "RUN --set local.steps=2 --set local.epochs=1", ("local.steps or local.epochs, not both",)),
    Case("combinations", "RUN --set adapter.alpha=2 --set adapter.lora_alpha=3", ("the same setting",)),
    Case("combinations", "RUN --set method.name=fedit --set 'federation.ranks=[2, 3]'", ("one rank for all clients",)),
    Case("combinations", "RUN --set method.name=fedit --set server.optimizer=fedadam", ("server.optimizer",)),
    Case("combinations", "RUN --set federation.partition=by_field", ("data.field_column", '"iid"')),
    Case("combinations", "RUN --set federation.partition=preset", ("preset",)),
    Case("combinations", "RUN --set federation.partition=files", ("1 file",)),
    Case("combinations", "RUN --set federation.num_clients=99", ("99 clients",)),
    Case("combinations", "RUN --set privacy.epsilon=1", ("privacy.epsilon = 1", "expected client or example")),
    Case(
        "combinations",
        "RUN --set robust.filter=krum --set privacy.secure_sums=true",
        ("secure_sums = true",),
    ),
    Case("combinations", "RUN --set method.name=scaffold --set local.optimizer=adamw", ("sgd",)),
    Case("combinations", "RUN --set method.name=fedavg --set model.quantise=int8", ("quantise",)),
    Case("combinations", "RUN --set federation.sums_only=true --set method.name=flora", ("flora",)),
    Case("combinations", "RUN --set engine.name=cohort --set method.name=fedftg", ("engine.name = 'cohort'",)),
    # Methods and their options
    _set("methods", "method.name=glor", "unknown method 'glor'", "did you mean 'glora'?"),
    _set("methods", "method.name=3", "3"),
    _set("methods", "method.name=LoRA-FAIR", "did you mean 'lora_fair'?"),
    _set("methods", "method.server_rnk=4", "'method.server_rnk'", "did you mean 'server_rank'?"),
    _set("methods", "method.server_rank=0", "server_rank"),
    _set("methods", "method.server_rank=two", "server_rank"),
    _set("methods", "method.basis=best", "basis"),
    _set("methods", "method=flora", "method = 'flora'"),
    Case("methods", "methods flor", ("unknown method 'flor'", "did you mean 'flora'?")),
    Case("methods", "RUN --set method.name=fedftg --set method.galore_rank=999", ("galore_rank = 999",)),
    Case("methods", "RUN --set method.name=fedftg --set method.galore_rank=-1", ("galore_rank",)),
    Case("methods", "RUN --set method.name=fedprox --set method.mu=-1", ("mu",)),
    # The command line
    Case("command line", "rnu", ("unknown command 'rnu'", "did you mean 'run'?")),
    Case("command line", "run --otu x", ("no such option", "'--otu'; did you mean '--out'?")),
    Case(
        "command line", "resume finished --set federation.rounds=3", ("'--set': a run goes on", "--rounds extends it")
    ),
    Case("command line", "merge a b --methd flora --out new", ("'--methd'; did you mean '--method'?",)),
    Case("command line", "run a.toml b.toml", ("unexpected extra argument", "b.toml")),
    Case("command line", "run --set", ("--set", "requires an argument")),
    Case("command line", "run --set federation.rounds", ("expected key=value",)),
    Case("command line", "run --set =3", ("expected key=value",)),
    Case("command line", "run --set ''", ("expected key=value",)),
    Case("command line", "run --workers 0", ("engine.workers",)),
    Case("command line", "run --workers many", ("engine.workers",)),
    Case("command line", "run --engine fast", ("engine.name = 'fast'",)),
    Case("command line", "resume", ("missing argument 'DIR'",)),
    Case("command line", "resume finished --rounds 0", ("--rounds", "0")),
    Case("command line", "resume finished --rounds ten", ("--rounds", "ten")),
    Case("command line", "resume finished --workers none", ("--workers", "none")),
    Case("command line", "bench serve", ("serve",)),
    Case("command line", "bench server --only d", ("--only 'd'", "expected KEY=VALUE")),
    Case("command line", "bench server --only d=768,r=16", ("--only 'd=768,r=16'", "expected one key")),
    Case("command line", "bench server --device tpu", ("tpu",)),
    Case("command line", "flower upp", ("'upp'",)),
    Case("command line", "--verison", ("no such option", "--verison")),
    Case("command line", "config none.toml", ("none.toml", "No such file")),
    Case("command line", f"run --set 'data.template={'[' * 5000}'", ("data.template",)),
    # Files of settings
    Case("settings file", "run none.toml", ("none.toml", "No such file")),
    Case("settings file", "run bert", ("bert", "Is a directory")),
    Case("settings file", "run texts.jsonl", ("texts.jsonl is not valid TOML",)),
    _toml("federation.rounds = ", "bad.toml is not valid TOML"),
    _toml("[federation\nrounds = 3", "bad.toml is not valid TOML"),
    _toml("rounds = 3", "unknown key 'rounds'"),
    _toml("federation = 3", "federation = 3"),
    _toml("[federation]\nrounds = 1\nrounds = 2\n", "not valid TOML"),
    _toml("[federation]\nrounds = 1\nnum_rounds = 2\n", "the same setting"),
    _toml(b"\xff\xfe\x00\x01", "bad.toml is not valid TOML"),
    _toml(b"seed = 1\x00\n", "bad.toml is not valid TOML"),
    _toml("x = " + deep("[", "]"), "bad.toml"),
    _toml("x = " + deep("{a = ", "1"), "bad.toml"),
    _toml("x" + deep(".a", depth=500) + " = 1", "bad.toml", "nested over 10 deep"),
    _toml("seed = " + "9" * 5000, "bad.toml"),
    _toml("method = 3", "method = 3"),
    _toml("[method]\nname = []", "[]"),
    _toml("[[federation]]\nrounds = 3", "federation"),
    _toml("seed = 2020-01-01", "seed = "),
]
