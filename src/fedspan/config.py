"""What a run is made of: frozen, validated settings read from TOML and `--set` overrides.

Every key is written in the field's own words; an unknown key names the nearest valid one.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


def _as_tuple(value: object) -> object:
    """One name stands for a list of one."""
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


def _none(value: object) -> object:
    """TOML has no null: `none` stands for it."""
    return None if value == "none" else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """`[model]`: the base that every client holds."""

    name: str = "builtin:decoder"
    """A local folder, a hub id, or `builtin:decoder` / `builtin:vit`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen base; adapters, patches and full-weight training are float32 always."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """The base's linear layers in 8 or 4 bits (needs the extra `quantised`); patches stay beside them in float32."""


class AdapterConfig(_Section):
    """`[adapter]`: the LoRA adapters (ranks are set under `[federation]`)."""

    target_modules: Names = ("all-linear",)
    """Name endings of the linear layers to adapt; `all-linear` takes every one but the head. Full-weight
    methods that train selected layers use the same list."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The scaling of a client of rank r is alpha / r (rsLoRA: alpha / √r)."""
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class DataConfig(_Section):
    """`[data]`: what the clients hold."""

    task: str = "builtin:tasks"
    """`builtin:tasks`, `builtin:digits`, `glue/NAME`, `hub:NAME`, or `files`."""
    kind: Literal["instruction", "classification", "image"] | None = None
    """What the examples are; known for builtin and GLUE tasks, otherwise told by the columns."""
    train: Names = ()
    """With `files`: JSONL, JSON, CSV or Parquet files (gzip too), an .npz, or an image folder. Several files with
    `partition = "files"` are one client each. With hub data: the name of a split."""
    test: Names = ()
    """Held-out data for everyone; without it `holdout` of the training data is kept back."""
    unseen: Names = ()
    """Files evaluated but never trained on (unseen tasks or clients)."""
    unseen_values: Names = ()
    """Values of `field_column` kept out of training altogether and evaluated as unseen."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    text_columns: Names = ()
    """One or two columns of a classification; none: `text`, `sentence`, or `sentence1` and `sentence2`."""
    label_column: str = "label"
    instruction_column: str = "instruction"
    input_column: str = "input"
    """An empty name says that there is no such column."""
    output_column: str = "output"
    image_column: str = "image"
    field_column: str | None = None
    """The column that `partition = "by_field"` splits by (task, category, source)."""
    template: str = "{instruction}\n{input}\n"
    """Prompt of instruction data with {instruction} and {input}; `chat` uses the tokenizer's chat template."""
    metric: str | None = None
    """The metric of the summary; known for builtin and GLUE tasks."""
    max_length: PositiveInt = 256
    """Longest sequence in tokens. A longer prompt is cut at its start, never the answer."""
    max_train: PositiveInt | None = None
    """At most so many training examples (drawn by the seed)."""
    max_test: PositiveInt | None = None
    holdout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training data kept back as test data when there is no test file."""
    client_holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each client's own data kept back for evaluation on that client."""


class FederationConfig(_Section):
    """`[federation]`: who takes part, when, and at which rank."""

    num_clients: PositiveInt = 8
    rounds: PositiveInt = 12
    participation: Fraction = 0.5
    """Share of the clients drawn in each round, by the run's seed."""
    sampler: str = "auto"
    """How a round's clients are drawn: `uniform` (always the same number), `poisson` (a coin for each client), or
    `auto`: `poisson` where `privacy.dp = "client"` with `participation` below 1 needs it, otherwise `uniform`."""
    min_clients: PositiveInt = 1
    """At least so many are drawn."""
    min_success: PositiveInt = 1
    """At least so many valid updates are needed, or the run ends (and can be resumed)."""
    ranks: int | tuple[int, ...] | Literal["uniform", "normal", "heavy_tail"] = "uniform"
    """One rank for all, one per client, or a distribution over `rank_values`."""
    rank_values: tuple[int, ...] = (2, 4, 8, 16)
    partition: Literal["iid", "dirichlet", "by_field", "preset", "files"] = "by_field"
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Concentration of the Dirichlet label skew: small is very skewed."""
    preset: str = "dolly-ftg-2"
    weighting: Literal["examples", "equal"] = "examples"
    """What a client counts for in every average."""
    sums_only: bool = False
    """Refuse a method whose server needs more than sums over the clients' updates."""
    drop_empty: bool = False
    """Leave out clients that got no data instead of refusing to start."""


class LocalConfig(_Section):
    """`[local]`: a client's work in one round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has no momentum; it is what SCAFFOLD is correct with. GaLore is AdamW's."""
    learning_rate: Annotated[float, Field(gt=0, lt=3e38)] = 3e-3
    steps: PositiveInt | None = None
    """Optimizer steps a round (10 unless `epochs` is given)."""
    epochs: PositiveInt | None = None
    """Passes over the client's data a round, instead of `steps`."""
    batch_size: PositiveInt = 16
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none)] = 1.0
    """Gradient norm above which a client's gradient is scaled down; "none": never."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of a round's steps over which the learning rate rises linearly."""

    @model_validator(mode="after")
    def _one_budget(self) -> LocalConfig:
        if self.steps is not None and self.epochs is not None:
            raise FedspanError("give local.steps or local.epochs, not both")
        return self


class ServerConfig(_Section):
    """`[server]`: an optimizer on the server, for methods whose global model is one plain vector."""

    optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    """The average of the updates is a pseudo-gradient for it. Methods that average factor pairs refuse it."""
    learning_rate: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none)] = None
    """"none": 1 for FedAvgM, 0.01 for the others, whose steps have about this size in every entry."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """β of FedAvgM, β₁ of the others."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """What FedAdam and FedYogi add to the root of the second moment."""


class EvaluationConfig(_Section):
    """`[evaluation]`: what is measured, and how often."""

    every: PositiveInt = 1
    """Evaluate the server's state after every so many rounds (and always after the last)."""
    batch_size: PositiveInt = 64
    max_examples: PositiveInt | None = None
    """Examples of the evaluations between rounds, and of every client's own model where each has one (there may be
    many); the last evaluation of a shared model uses the whole test data."""
    max_new_tokens: PositiveInt = 16
    base: bool = True
    """Evaluate the untouched base first."""
    local: bool = True
    """Train every client alone with the same steps as a control, and report the average."""
    per_rank: bool = True
    """In the last evaluation, measure what a client of each rank receives."""
    diagnostics: bool | Literal["auto"] = "auto"
    """Measure every round's server step: distance from the ideal update, ranks, angles; `fedspan inspect` shows it.
    `auto`: where adapters are trained and at most 64 clients take part, since it holds their updates until it is done,
    and no `[privacy]` hides these from the server.
    """


class PrivacyConfig(_Section):
    """`[privacy]`: what the server may learn of one client."""

    secure_sums: bool = False
    """Clients send masked vectors, of which the server learns the sum alone (pairwise masks, Bonawitz et al. 2017)."""
    fixed_point: bool = False
    """The arithmetic of secure sums without the masks: the same bits as with them."""
    fraction_bits: Annotated[int, Field(ge=8, le=48)] = 32
    """Of the 64-bit fixed point that secure sums are taken in."""
    threshold: Annotated[float, Field(gt=0.5, le=1.0)] = 0.6
    """Share of a round's clients that must stay until its end for the sum to be recovered; no fewer can unmask."""
    rounds_ahead: PositiveInt = 8
    """Between real sites: for how many rounds keys and shares are exchanged at once, while the same sites take part."""
    dp: Literal["none", "client", "example"] = "none"
    """`client`: every client's update is clipped and the sum gets Gaussian noise.  `example`: DP-SGD on the client."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of what one client (or one example's gradient) adds to a sum."""
    noise_multiplier: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the noise, in units of `clip`."""
    accountant: str = "pld"
    """What ε is computed with. `pld`: privacy loss distributions (Google's dp-accounting)."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    epsilon: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none)] = None
    """Budget: the run stops before the round (a client: before the work) that would exceed it; "none": no budget."""


class RobustConfig(_Section):
    """`[robust]`: what keeps a few bad clients from spoiling a round; not possible under secure sums."""

    filter: Literal["none", "krum", "multi_krum", "geometric_median", "median", "trimmed_mean"] = "none"
    """Krum and the geometric median compare products B·A, never factors; `median` and `trimmed_mean` are taken
    coordinate by coordinate, for methods whose clients send one plain vector."""
    attackers: PositiveInt = 1
    """f: how many of a round's clients may be bad."""
    max_norm: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none)] = None
    """An update whose change of the weights is larger in Frobenius norm is rejected; "none": any size."""


class WireConfig(_Section):
    """`[wire]`: the types in which tensors travel. What is computed from them is float32 always."""

    up: Literal["float32", "bfloat16", "int8"] = "float32"
    """From the clients; `int8` has a scale for every row. Secure sums send 64-bit integers instead."""
    down: Literal["float32", "bfloat16", "int8"] = "float32"


class DeploymentConfig(_Section):
    """`[deployment]`: a federation of real sites; nothing here matters where all clients are in one process."""

    wait: Annotated[float, Field(gt=0)] = 300.0
    """Seconds to wait for enough sites before a round, at most."""
    deadline: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a site has for one answer."""
    oversample: Annotated[float, Field(ge=0.0, le=4.0)] = 0.0
    """Share of clients asked beyond those that a round needs; the last to answer are then not waited for."""
    order: Literal["sorted", "arrival"] = "sorted"
    """`sorted`: updates are folded in the order of the clients' ids, the same bits every time.  `arrival`: as they
    come."""
    patience: PositiveInt = 2
    """Answers that a site may miss in a row before it is left out for `quarantine` rounds."""
    quarantine: PositiveInt = 3
    poll: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Seconds between two looks for answers."""


class EngineConfig(_Section):
    """`[engine]`: how the work is done on this machine. Engines agree to rounding; how many workers changes nothing."""

    name: Literal["auto", "cohort", "sequential"] = "auto"
    """`cohort`: many clients in one batched pass over the shared frozen base. `sequential`: one after the other.
    `auto`: the cohort where the method allows it and the model is small enough for it to be faster."""
    cohort_size: PositiveInt | Literal["auto"] = "auto"
    """Clients in one pass; `auto` fits them into `memory`."""
    memory: Annotated[float, Field(gt=0)] = 2.0
    """GiB that one process's passes over a cohort may take beside the base."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes of `threads` threads each; `auto`: as many as this machine has cores for, or GPUs."""
    compile: bool = False
    """Compile the base's forward and backward passes: half a minute at the start, faster steps after it."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Type of the base's matrix products in training; pays for wide models (hidden size of 512 and more)."""


class Config(_Section):
    """A whole run. `Config()` is the embedded default."""

    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU when there is one."""
    threads: PositiveInt = 1
    """CPU threads of the tensor library: one is fastest for small models."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    federation: FederationConfig = FederationConfig()
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    robust: RobustConfig = RobustConfig()
    wire: WireConfig = WireConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "glora"})
    """`name` and the method's own options, checked against the method's signature."""


def load(path: Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (none: the embedded default) and apply `key=value` overrides.

    Raises
    ------
    ValueError
        One line naming the key or value and what was expected.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FedspanError(f"cannot read the config {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FedspanError(f"{path} is not valid TOML: {error}") from None
    for item in overrides:
        _set(tree, item)
    return from_mapping(tree)


def with_absolute_paths(config: Config) -> Config:
    """Files and folders by their whole path, so that the settings mean the same from anywhere."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name

    data, model = config.data, config.model
    paths = {part: tuple(map(absolute, getattr(data, part))) for part in ("train", "test", "unseen")}
    return config.model_copy(
        update={
            "data": data.model_copy(update=paths if data.task == "files" else {}),
            "model": model.model_copy(update={"name": absolute(model.name)}),
        }
    )


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping, with this library's defaults for the task where the mapping is silent."""
    tree = _with_task_defaults(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise FedspanError(_one_line(error)) from None


_TASK_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "builtin:digits": {
        "model": {"name": "builtin:vit"},
        "federation": {"partition": "dirichlet", "alpha": 0.1},
    },
}


def _with_task_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    if isinstance(merged.get("method"), dict):
        # An option of the default method may be set without naming it.
        merged["method"] = {"name": "glora", **merged["method"]}
    data = merged.get("data")
    task = data.get("task") if isinstance(data, dict) else None
    for section, values in _TASK_DEFAULTS.get(str(task), {}).items():
        given = merged.get(section, {})
        if isinstance(given, Mapping):
            merged[section] = {**values, **given}
    return merged


def _set(tree: dict[str, Any], item: str) -> None:
    """Apply one `a.b=value`; the value is TOML, or a bare string when it is not."""
    key, separator, text = item.partition("=")
    if not separator or not key.strip():
        raise FedspanError(f"--set {item!r}: expected key=value, such as federation.rounds=20")
    try:
        value: Any = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise FedspanError(f"--set {item!r}: {parent} is a value, not a section")
        node = child
    node[last] = value


def _valid_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _valid_keys(kind, f"{prefix}{name}.")
        keys.append(prefix + name)
    return keys


def _one_line(error: ValidationError) -> str:
    """The first problem, in words a user would use."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if isinstance(part, str) and part.isidentifier())
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, _valid_keys())}"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def to_toml(config: Config) -> str:
    """The fully resolved configuration, readable by `load`."""
    top: list[str] = []
    sections: list[str] = []
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            defaults = getattr(Config(), key)
            lines = [f"[{key}]"]
            for name, item in value.items():
                # An absent key means its default, so a null is left out only where it is the default.
                if item is not None or key == "method" or getattr(defaults, name) is not None:
                    lines.append(f"{name} = {_toml_value('none' if item is None else item)}")
            sections.append("\n".join(lines))
        else:
            top.append(f"{key} = {_toml_value(value)}")
    return "\n".join(top) + "\n\n" + "\n\n".join(sections) + "\n"


def _toml_value(value: object) -> str:
    # JSON's strings, numbers, booleans and arrays are TOML's too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
