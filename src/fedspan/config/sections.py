"""The settings of a run, section by section: names, types, defaults and explanations.

The docstring below a setting is its explanation everywhere: in the file that `fedspan config` prints and in the JSON
Schema. A new setting needs its line and its explanation here, and nothing elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from fedspan.config.system import DeploymentConfig, EngineConfig, WireConfig
from fedspan.config.tracking import TrackingConfig
from fedspan.config.values import (
    Fraction,
    Indices,
    Names,
    NamesOrPattern,
    Parallel,
    PartialFraction,
    Paths,
    PositiveFloat,
    PositiveFloatOrNone,
    PositiveInt,
    Section,
    Seed,
    as_name,
)
from fedspan.support.errors import FedspanError
from fedspan.support.scalars import plain


class ModelConfig(Section):
    """The base model, which every client holds."""

    name: Annotated[str, Field(min_length=1), BeforeValidator(as_name)] = "builtin:decoder"
    """A local folder, a Hugging Face Hub id, `builtin:decoder` or `builtin:vit`."""
    adapter: Annotated[
        Annotated[str, Field(min_length=1)] | None, BeforeValidator(as_name), Field(examples=["earlier/adapter"])
    ] = None
    """A PEFT LoRA folder to start from. It counts as part of the base in every method, and the adapter that is saved
    holds both changes, at the sum of their ranks. Unset: start from the base as it is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen base. Adapters, patches and full-weight training always use float32."""
    dropout: bool = True
    """Keep the base's own dropout in training, as its configuration says; `false`: none. `adapter.dropout` is apart."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Hold the base's linear layers in 8 bits (`int8`) or 4 bits (`nf4`); needs the extra `quantised`. Patches stay
    beside them in float32."""


class AdapterConfig(Section):
    """The LoRA adapters. Their ranks are set by `federation.ranks`."""

    target_modules: NamesOrPattern = ("all-linear",)
    """Name endings of the linear layers to adapt, or a regular expression (a string) that matches their whole names;
    `all-linear` means every one except the head and those that cannot be adapted. Methods that train the full weights
    of selected layers use the same list."""
    target_parameters: Annotated[Names, Field(examples=[["experts.gate_up_proj", "experts.down_proj"]])] = ()
    """Name endings of parameters that hold the weights of several experts in one tensor, such as
    `experts.gate_up_proj`; each expert gets an adapter of its own. `exclude_modules` and `layers` do not concern them.
    Needs `dropout = 0`."""
    exclude_modules: NamesOrPattern = ()
    """Linear layers to leave out of those, as name endings or a regular expression that matches their whole names."""
    layers: Annotated[Indices | None, Field(examples=[[0, 1]])] = None
    """Numbers of the blocks whose layers are adapted (PEFT's `layers_to_transform`). Unset: all blocks."""
    modules_to_save: Names = ()
    """Name endings of modules that are trained whole besides the head, such as embeddings and norms, and saved with
    the adapter."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scaling: a client of rank r scales its update by alpha / r (rsLoRA: alpha / √r)."""
    rslora: bool = False
    """Use rsLoRA's scaling, alpha / √r instead of alpha / r."""
    dropout: PartialFraction = 0.0
    """Probability of dropping an adapter's input during training."""


class DataConfig(Section):
    """The data that the clients train on and the data that evaluates them."""

    task: str = "builtin:tasks"
    """`builtin:tasks`, `builtin:digits`, `glue/NAME`, `hub:NAME`, or `files`."""
    kind: Annotated[Literal["instruction", "classification", "image"] | None, Field(examples=["classification"])] = None
    """Kind of the examples: `instruction`, `classification` or `image`. Unset: known for built-in and GLUE tasks,
    otherwise inferred from the columns."""
    train: Paths = ()
    """With `task = "files"`: JSONL, JSON, CSV or Parquet files (gzip too), an .npz file, or an image folder; with
    `partition = "files"` each file is one client, named after it. A relative path is looked up beside the config first,
    then in the working folder. With Hub data: the name of a split."""
    test: Paths = ()
    """Held-out data, in the same forms. Empty: `holdout` of the training data is held out."""
    unseen: Paths = ()
    """Files that are evaluated but never trained on (unseen tasks or clients)."""
    unseen_values: Names = ()
    """Values of `field_column` whose rows are never trained on and are evaluated as unseen data."""
    subset: Annotated[str | None, Field(examples=["en"])] = None
    """Configuration name of a Hub dataset."""
    text_columns: Names = ()
    """One or two text columns for classification. Empty: `text`, `sentence`, or `sentence1` and `sentence2`."""
    label_column: str = "label"
    """Column of the labels in classification and image data."""
    label_names: Annotated[Names, Field(examples=[["benign", "malignant"]])] = ()
    """Names of the classes in the order of their ids, whether or not all of them are among the rows. Empty: learnt from
    the training data. A server without data needs them."""
    instruction_column: str = "instruction"
    """Column of the instructions in instruction data; an empty name means that there is no such column."""
    input_column: str = "input"
    """Column of the inputs in instruction data; an empty name means that there is no such column."""
    output_column: str = "output"
    """Column of the answers in instruction data."""
    messages_column: Annotated[str | None, Field(examples=["chat"])] = None
    """Column of conversations in instruction data, each a list of turns. Unset: `messages` or `conversations`, where
    there is such a column and none of answers."""
    image_column: str = "image"
    """Column of the images in image data."""
    image_range: Annotated[tuple[float, float] | None, Field(examples=[[0, 4095]])] = None
    """The values that become black and white in images of more than 8 bits and in arrays of floats; values beyond them
    are cut off. Unset: the smallest and the largest value of each image."""
    encoding: str = "utf-8"
    """Encoding of text files, such as Excel's `cp1252`. A file that says its own, by a byte order mark, is read in
    that."""
    field_column: Annotated[str | None, Field(examples=["category"])] = None
    """Column that `partition = "by_field"` splits by, such as a task, category or source. Unset: `task`, where there
    is such a column."""
    template: str = "{instruction}\n{input}\n"
    """Prompt of instruction data, with {instruction} and {input} filled in; `chat` uses the tokenizer's chat
    template. Conversations always use that where there is one."""
    system: str = ""
    """With `template = "chat"`: text of a system turn before the user's. Empty: no system turn."""
    metrics: Annotated[Names, Field(examples=[["accuracy", "auroc"]])] = ()
    """Metrics of every evaluation, before the usual ones of the task; the first is the summary's. `module:function` is
    a function of your own (docs/metrics.md). Empty: the usual ones alone."""
    max_length: PositiveInt = 256
    """Maximum sequence length in tokens; of an encoder-decoder, for prompt and answer each. A longer prompt is cut at
    its start, a conversation loses its oldest turns, and only an answer too long by itself is cut. The default is
    lowered to the base's number of positions where that is smaller."""
    max_train: Annotated[PositiveInt | None, Field(examples=[1000])] = None
    """Maximum number of training examples, drawn by the seed. Unset: all."""
    max_test: Annotated[PositiveInt | None, Field(examples=[200])] = None
    """Maximum number of test examples, and of unseen ones, drawn by the seed. Unset: all."""
    holdout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training data held out as test data when no test data is given."""
    validation: PartialFraction = 0.0
    """Share of the training data kept back, by the seed, to find the best round and to stop early; never test data."""
    test_from_training: PartialFraction = 0.0
    """Share of the training data that takes the place of the test and unseen data, whose rows are then not used: for
    choosing settings without seeing those rows. 0: evaluate on the test data."""
    client_holdout: PartialFraction = 0.0
    """Share of each client's data held out for evaluation on that client's own data (see `evaluation.where`)."""
    seed: Annotated[Seed | None, Field(examples=[0])] = None
    """Seed of the rows: those that are held out, kept by `max_train` and `max_test`, or generated. Unset: `seed`."""

    @field_validator("image_range")
    @classmethod
    def _increasing(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("expected two numbers, black below white")
        return value


class FederationConfig(Section):
    """The clients: their number, their data, their ranks, and the rounds in which they take part."""

    num_clients: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Number of clients. Where each file is one client and this is not given: the number of files."""
    rounds: PositiveInt = 12
    """Number of rounds."""
    participation: Fraction = 0.5
    """Share of the clients sampled in each round, by the run's seed."""
    sampler: str = "auto"
    """Sampling of a round's clients: `uniform` (the same number every round), `poisson` (each client independently),
    or `auto`: `poisson` where `privacy.dp = "client"` with `participation` below 1 requires it, otherwise
    `uniform`."""
    min_clients: PositiveInt = 1
    """Minimum number of clients sampled in a round, whatever `participation` says."""
    min_success: PositiveInt = 1
    """Minimum number of valid updates in a round. With fewer, the run stops and can be resumed."""
    ranks: int | tuple[int, ...] | Literal["uniform", "normal", "heavy_tail"] = "uniform"
    """LoRA rank of each client: one number for all, a list with one number per client, or a distribution over
    `rank_values`."""
    rank_values: tuple[int, ...] = (2, 4, 8, 16)
    """Ranks that the distributions of `ranks` draw from."""
    partition: Literal["auto", "iid", "dirichlet", "by_field", "preset", "files"] = "auto"
    """Split of the training data over the clients: at random (`iid`), with Dirichlet label skew, by
    `data.field_column`, by a published recipe (`preset`), or one file per client (`files`). `auto`: by the field where
    the rows have at least two values of it, otherwise at random. Several training files are one client each where
    neither this, nor `field_column`, nor another number of clients is given."""
    dirichlet_alpha: PositiveFloat = 0.5
    """Concentration of `partition = "dirichlet"`: a small value gives clients very different label distributions."""
    preset: str = "dolly-ftg-2"
    """Name of the recipe of `partition = "preset"`."""
    weighting: Literal["examples", "rounded", "equal"] = "examples"
    """Weight of a client in every average: its number of training examples, that number rounded to a power of two, or
    the same for all. Under secure sums the totals of several rounds give every client's weight."""
    sums_only: bool = False
    """Refuse methods whose server needs more than sums over the clients' updates."""
    drop_empty: bool = False
    """Leave out clients without data instead of refusing to start."""
    seed: Annotated[Seed | None, Field(examples=[0])] = None
    """Seed of the split over the clients, of their ranks, and of the clients that are sampled in each round. Unset:
    `seed`, which then draws these too."""


class LocalConfig(Section):
    """A client's training in one round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is without momentum; SCAFFOLD's analysis assumes it. GaLore always uses AdamW."""
    learning_rate: Annotated[float, Field(gt=0, lt=3e38)] = 3e-3
    """Learning rate at its highest, after the warm-up."""
    steps: Annotated[PositiveInt | None, Field(examples=[10])] = None
    """Optimizer steps per round. Unset: 10, or as many as `epochs` takes."""
    epochs: Annotated[PositiveInt | None, Field(examples=[1])] = None
    """Passes over the client's data per round, instead of `steps`."""
    batch_size: PositiveInt = 16
    """Examples per optimizer step."""
    accumulate: PositiveInt = 1
    """Parts that every batch is cut into, which pass one after the other and whose gradients add up: less memory, the
    same result to rounding where nothing is dropped (each part draws masks of its own)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip_norm: PositiveFloatOrNone = 1.0
    """Norm to which a larger gradient is scaled down; "none": no clipping."""
    warmup: PartialFraction = 0.0
    """Share of a round's steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate over the rounds of the federation: constant, or falling towards zero in a straight
    line or along half a cosine. Every round has one factor, which its number determines."""
    schedule_rounds: Annotated[PositiveInt | None, Field(examples=[12])] = None
    """Rounds over which it falls; later ones keep the last factor. Unset: `federation.rounds`, as it was when the run
    began."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds over which the learning rate rises before that."""
    head_learning_rate: Annotated[PositiveFloat | None, Field(examples=[1e-3])] = None
    """Learning rate of heads and of `adapter.modules_to_save` at its highest. Unset: `learning_rate`."""
    lora_plus_ratio: Annotated[PositiveFloat | None, Field(examples=[16.0])] = None
    """LoRA+: the learning rate of B as a multiple of A's (Hayou et al. 2024). Unset: the same rate."""
    keep_optimizer: bool = False
    """Keep every client's AdamW or GaLore state from one of its rounds to its next, as FedFTG's public code does,
    instead of starting it anew. The state stays with the client; AdamW's takes twice the memory of what is trained."""

    @model_validator(mode="after")
    def _one_budget(self) -> LocalConfig:
        if self.steps is not None and self.epochs is not None:
            raise FedspanError("give local.steps or local.epochs, not both")
        return self

    @model_validator(mode="after")
    def _room_for_the_schedule(self) -> LocalConfig:
        if self.schedule == "constant":
            return self
        if self.schedule_rounds is None:
            raise FedspanError(f"local.schedule = {self.schedule!r} needs local.schedule_rounds")
        if self.warmup_rounds >= self.schedule_rounds:
            raise FedspanError(
                f"local.warmup_rounds = {self.warmup_rounds}: expected fewer than the {self.schedule_rounds} rounds of "
                "local.schedule"
            )
        return self


class ServerConfig(Section):
    """An optimizer on the server, for methods whose global model is one plain vector."""

    optimizer: Literal["none", "fedavgm", "fedadagrad", "fedadam", "fedyogi"] = "none"
    """Optimizer that takes the average of the updates as a pseudo-gradient. Methods that average factor pairs
    refuse it."""
    learning_rate: Annotated[PositiveFloatOrNone, Field(examples=[0.01])] = None
    """Server learning rate. Unset or "none": 1 for FedAvgM, 0.01 for the others, whose steps have about this size in
    every entry."""
    momentum: PartialFraction = 0.9
    """β of FedAvgM, β₁ of the others. The published FedAdagrad has 0."""
    beta2: PartialFraction = 0.99
    """β₂ of FedAdam and FedYogi."""
    tau: PositiveFloat = 1e-3
    """Constant that the adaptive optimizers add to the root of the second moment."""


class EvaluationConfig(Section):
    """Evaluation: the figures that are measured, and when."""

    where: Literal["server", "clients", "both"] = "server"
    """The rows that models are judged on: the server's test data, each client's own held-out rows (by
    `data.client_holdout`, or test data of its own), of which the server is sent the metrics' statistics alone, or
    both."""
    every: PositiveInt = 1
    """Rounds between two evaluations of the server's state. The last round is always evaluated."""
    every_seconds: Annotated[PositiveFloat | None, Field(examples=[600.0])] = None
    """Seconds between two evaluations, instead of `every`: a round that ends earlier is not evaluated."""
    patience: Annotated[PositiveInt | None, Field(examples=[5])] = None
    """Evaluations without a better figure on the validation data (`data.validation`; without it, and for personal
    models, on the clients' held-out rows, where `where` has them judge) after which the run ends. Unset: it has all its
    rounds."""
    batch_size: PositiveInt = 64
    """Examples per forward pass."""
    max_examples: Annotated[PositiveInt | None, Field(examples=[200])] = None
    """Maximum number of test examples between rounds, and for each client's own model in personalised methods. The
    last evaluation of a shared model always uses the whole test data. Unset: all."""
    max_new_tokens: PositiveInt = 16
    """Maximum length of a generated answer in tokens."""
    base: bool = True
    """Evaluate the untouched base first."""
    local: bool = True
    """As a control, train every client alone with the same number of steps, and report the average."""
    per_rank: bool = True
    """In the last evaluation, measure the adapter that a client of each rank receives."""
    diagnostics: bool | Literal["auto"] = "auto"
    """Measure every round's server step (distance from the ideal update, ranks, angles), for `fedspan inspect`. The
    clients' updates are kept in memory meanwhile. `auto`: where adapters are trained, at most 64 clients take part in
    a round, and nothing under `[privacy]` hides their updates from the server."""


class PrivacyConfig(Section):
    """Secure sums and differential privacy."""

    secure_sums: bool = False
    """Clients send masked vectors, of which the server learns only the sum (pairwise masks, Bonawitz et al. 2017)."""
    fixed_point: bool = False
    """Compute in the fixed-point arithmetic of secure sums, without the masks; gives the same bits as with them."""
    fraction_bits: Annotated[int, Field(ge=8, le=48)] = 32
    """Bits after the binary point in that 64-bit arithmetic."""
    threshold: Annotated[float, Field(gt=0.5, le=1.0)] = 0.6
    """Share of a round's clients that must stay to its end for the sum to be recovered. Fewer clients cannot remove
    each other's masks."""
    min_clients: Annotated[int | None, Field(ge=2, examples=[3])] = None
    """Fewest clients in a secure sum, at its start and at its end. Every site refuses to help with a sum of fewer.
    Unset: `threshold` times the number of clients that `[federation]` samples in a round, rounded up; at least 2."""
    server: Literal["curious", "malicious"] = "curious"
    """The server that secure sums protect against. `curious`: one that follows the protocol and analyses what it sees.
    `malicious`: one that shows sites different lists; it needs signed identities, a `threshold` above 2/3, and one more
    message per sum."""
    differencing: Literal["allow", "warn", "refuse"] = "warn"
    """A site's answer to a secure sum whose sites differ from those of an earlier one, of any run, by fewer than
    `min_difference`: from the two sums their difference can be read. `warn`: it helps and says so. `refuse`: it does
    not help, and the server leaves sites out where it can, so that such sums do not come about. Without effect under
    `dp = "example"`, whose noise each site adds itself."""
    min_difference: Annotated[int, Field(ge=2)] = 2
    """Fewest sites by which two secure sums may differ, if they differ at all. 2: no difference is one site's part."""
    rounds_ahead: PositiveInt = 8
    """Rounds for which real sites exchange keys and shares at once, as long as the same sites take part."""
    dp: Literal["none", "client", "example"] = "none"
    """Differential privacy. `client`: every client's update is clipped and the sum gets Gaussian noise. `example`:
    DP-SGD on the client."""
    clip: PositiveFloat = 1.0
    """Largest norm of one client's (or one example's) contribution to a sum."""
    noise_multiplier: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the noise, in units of `clip`."""
    accountant: str = "pld"
    """Computes ε. `pld`: privacy loss distributions, by Google's dp-accounting."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """δ of (ε, δ)-differential privacy."""
    epsilon: Annotated[PositiveFloatOrNone, Field(examples=[8.0])] = None
    """Privacy budget: the run stops before the round (with `dp = "example"`, a client before the work) that would
    exceed it. Unset or "none": no budget."""


class RobustConfig(Section):
    """Filters that keep a few bad clients from spoiling a round; not possible under secure sums."""

    filter: Literal["none", "krum", "multi_krum", "geometric_median", "median", "trimmed_mean"] = "none"
    """Filter of a round's updates. Krum and the geometric median compare products B·A, never factors; `median` and
    `trimmed_mean` work coordinate by coordinate, for methods whose clients send one plain vector."""
    attackers: PositiveInt = 1
    """f: the number of a round's clients that may be bad."""
    max_norm: Annotated[PositiveFloatOrNone, Field(examples=[10.0])] = None
    """Largest accepted change of the weights, in Frobenius norm; an update above it is rejected. Unset or "none": any
    size."""


class Config(Section):
    """All settings of a run. `Config()` is the embedded default."""

    seed: Seed = 0
    """Seed of every random draw, except secret ones under `[privacy]`, and those of `data.seed` and `federation.seed`
    where these are set: then it is the seed of the training."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto`: a GPU when there is one."""
    threads: Parallel = 1
    """CPU threads per process; one is fastest for small models."""
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
    tracking: TrackingConfig = TrackingConfig()
    method: dict[str, Annotated[Any, BeforeValidator(plain)]] = Field(default_factory=lambda: {"name": "glora"})
    """The method's `name` and its own options; `fedspan methods NAME` lists them."""

    @property
    def data_seed(self) -> int:
        """The seed of the rows."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def federation_seed(self) -> int:
        """The seed of the split, the ranks and the schedule."""
        return self.seed if self.federation.seed is None else self.federation.seed


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return the dotted key of every setting and section, in the order of the file."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += valid_keys(kind, f"{prefix}{name}.")
        keys.append(prefix + name)
    return keys
