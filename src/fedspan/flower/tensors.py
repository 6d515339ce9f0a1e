"""Conversion between our methods' messages and Flower's records of named arrays.

Names: `MODULE/a` and `MODULE/b` (or other parts that a method sends of a module); dense weights have their own names.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Factors, Payload, Recipe, Template, Tensors, Update
from fedspan.server import magnitudes
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire.names import check_name
from fedspan.wire.refusals import unpacked
from fedspan.wire.schema import MAX_EXAMPLES

ARRAYS, CONFIG, METRICS = "arrays", "fedspan", "metrics"
_LARGEST_FIGURE = 1e30
_MAX_REASON = 300
"""Characters of the reason that a node gives, and of a figure's name."""
_PAIRS = ((".lora_A.weight", ".lora_B.weight"), ("/a", "/b"))


def received(message: Message) -> Broadcast:
    """Return the broadcast in a message, for use in a ClientApp. The tensors are copies that the caller may change.

    Raises
    ------
    FedspanError
        When the message is not from a `FedspanStrategy`.
    """
    config, values = _config(message), _values(message)
    adapter: dict[str, Factors] = {}
    for name, scaling in zip(_list(config, "modules"), _list(config, "scalings"), strict=True):
        if not isinstance(name, str) or not isinstance(scaling, float):
            raise FedspanError(f"module {name!r} has scaling {scaling!r}: expected a name and a number")
        adapter[name] = Factors(_pop(values, f"{name}/b"), _pop(values, f"{name}/a"), scaling)
    train_a, train_b = bool(config["train-a"]), bool(config["train-b"])
    return Broadcast(adapter, values, Recipe(train_a=train_a, train_b=train_b, proximal=_number(config, "proximal")))


def reply(message: Message, method: Method, update: Update, metrics: Mapping[str, float] | None = None) -> Message:
    """Return the reply to a training message, for use in a ClientApp.

    Parameters
    ----------
    method
        The server's method: its `encode` runs here, so that only what the server needs leaves the site.
    update
        Factors by module and dense weights, after training; `client_id` is this site's name, the same in every round.
    metrics
        Figures to be averaged over the clients.

    Raises
    ------
    FedspanError
        When the server runs another method, or a factor pair has another scaling than was sent.
    """
    config = _config(message)
    if config.get("method") != method.info.name:
        raise FedspanError(f"the server runs {config.get('method')!r}: expected {method.info.name!r} as here")
    sent = received(message)
    for name, scaling in update.scalings().items():
        if name in sent.adapter and scaling != sent.adapter[name].scaling:
            # The scaling is not part of the reply: the server assumes the one that it sent.
            raise FedspanError(f"{name} has scaling {scaling}: expected {sent.adapter[name].scaling}, as sent")
    encoded, _ = method.encode(update, sent, None)
    records = _answer(message, update.client_id, update.num_examples, metrics)
    records[ARRAYS] = _arrays(_payload(encoded.modules, encoded.dense))
    return Message(records, reply_to=message)


def figures(message: Message, client_id: str, num_examples: float, metrics: Mapping[str, float]) -> Message:
    """Return the reply to an evaluation message, for use in a ClientApp."""
    return Message(_answer(message, client_id, num_examples, metrics), reply_to=message)


def record_of(sent: Broadcast, method: Method, server_round: int, rank: int) -> RecordDict:
    """Return the message content for a node of that rank."""
    config = ConfigRecord({"method": method.info.name, "round": server_round, "rank": rank})
    config["train-a"], config["train-b"] = sent.recipe.train_a, sent.recipe.train_b
    config["proximal"] = float(sent.recipe.proximal)
    if sent.adapter:
        config["modules"] = list(sent.adapter)
        config["scalings"] = [float(f.scaling) for f in sent.adapter.values()]
    return RecordDict({ARRAYS: arrays_of(sent), CONFIG: config})


def arrays_of(sent: Broadcast) -> ArrayRecord:
    """Return the tensors of a broadcast."""
    return _arrays(_payload(sent.adapter, sent.dense))


def update_of(message: Message, method: Method, sent: Broadcast, server_round: int) -> Update:
    """Return the update in a reply, after checking it.

    Raises
    ------
    FedspanError
        When the reply is of another round, its names, shapes or types differ from those that the method makes of the
        broadcast, or a value is not finite.
    """
    client_id, num_examples = sender_of(message, server_round)
    # Encoding the broadcast itself gives the names, shapes and scalings that every valid reply must have.
    probe = Update(client_id, num_examples, dict(sent.adapter), dict(sent.dense))
    expected, _ = method.encode(probe, sent, None)
    wanted = _payload(expected.modules, expected.dense)
    record = message.content.array_records.get(ARRAYS)
    arrays = {} if record is None else dict(record.items())
    if missing := wanted.keys() - arrays.keys():
        raise FedspanError(f"it lacks the array {min(missing)}")
    if unknown := arrays.keys() - wanted.keys():
        raise FedspanError(f"it has the array {min(unknown)}, which was not requested")
    values = {name: _checked(name, arrays[name], wanted[name]) for name in wanted}
    modules: dict[str, Payload] = {}
    for name, payload in expected.modules.items():
        parts = {part: values.pop(f"{name}/{part}") for part in payload.tensors()}
        modules[name] = payload.with_tensors(parts)
    update = Update(client_id, num_examples, modules, values)
    problem = magnitudes.problem(update, method.info.gauge_invariant)
    if problem is not None:
        raise FedspanError(f"it {problem}")
    return update


def sender_of(message: Message, server_round: int) -> tuple[str, float]:
    """Return a reply's client id and number of examples.

    Raises
    ------
    FedspanError
        When the reply holds an error, is of another round, or one of the two is not valid.
    """
    if message.has_error():
        reason = message.error.reason or f"error {message.error.code}"
        raise FedspanError(unpacked(reason) or one_line(reason, _MAX_REASON))
    config = _config(message)
    client_id, num_examples = config.get("client-id"), config.get("num-examples")
    if config.get("round") != server_round:
        raise FedspanError(f"it is for round {config.get('round')!r}: expected {server_round}")
    if not isinstance(num_examples, float) or not 0 < num_examples <= MAX_EXAMPLES:
        raise FedspanError(f"num-examples = {num_examples!r}: expected more than 0, at most {MAX_EXAMPLES:g}")
    return check_name(client_id, "client-id"), num_examples


def metrics_of(message: Message) -> MetricRecord:
    """Return a reply's figures.

    Raises
    ------
    FedspanError
        When one is not a single finite number.
    """
    metrics = message.content.metric_records.get(METRICS) or MetricRecord()
    for name, value in metrics.items():
        if isinstance(value, list) or not abs(value) <= _LARGEST_FIGURE:
            raise FedspanError(f"{name} = {value!r}: expected a finite number")
        if one_line(name, _MAX_REASON) != name:
            raise FedspanError(f"a figure of the name {name!r}: expected one line of printable characters")
    return metrics


def mean_metrics(weighted: Sequence[tuple[float, MetricRecord]]) -> MetricRecord:
    """Return Σ n_k x_k / Σ n_k of each figure that every client reports, summed in the order given.

    Parameters
    ----------
    weighted
        Number of examples and figures of each client.
    """
    total = sum(weight for weight, _ in weighted)
    numbers = [
        (weight, {name: float(x) for name, x in metrics.items() if not isinstance(x, list)})
        for weight, metrics in weighted
    ]
    common = set.intersection(*(set(metrics) for _, metrics in numbers))
    means = MetricRecord({"num-clients": len(weighted)})
    for name in sorted(common):
        means[name] = sum(weight * metrics[name] for weight, metrics in numbers) / total
    return means


def template_of(arrays: ArrayRecord, alpha: float, rslora: bool, seed: int) -> tuple[Template, dict[str, Tensor]]:
    """Return the template and the dense weights of an untrained adapter.

    Raises
    ------
    FedspanError
        For an unreadable array, and factors that are incomplete, of different ranks, or already trained.
    """
    values = {name: _tensor(name, array) for name, array in arrays.items()}
    modules: dict[str, tuple[int, int]] = {}
    ranks: set[int] = set()
    for suffix_a, suffix_b in _PAIRS:
        names = [name for name in values if name.endswith((suffix_a, suffix_b))]
        for module in dict.fromkeys(name.removesuffix(suffix_a).removesuffix(suffix_b) for name in names):
            if module in modules:
                raise FedspanError(f"{module} has two pairs of factors: expected one")
            a, b = _pop_factor(values, module + suffix_a), _pop_factor(values, module + suffix_b)
            _check_untrained(module, a, b)
            modules[module] = (b.shape[0], a.shape[1])
            ranks.add(a.shape[0])
    if len(ranks) > 1:
        raise FedspanError(f"the adapter has the ranks {sorted(ranks)}: expected one")
    return Template(modules, next(iter(ranks), 1), alpha, rslora, seed), values


def _check_untrained(module: str, a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise FedspanError(f"{module}: factors {tuple(a.shape)} and {tuple(b.shape)}: expected (r, n) and (m, r)")
    if bool(b.any()):
        raise FedspanError(f"{module}: B is not zero: expected an untrained adapter; merge this one first")


def same_bits(x: ArrayRecord, y: ArrayRecord) -> bool:
    """Return whether two records are equal to the last bit."""
    return x.keys() == y.keys() and all(x[name].data == y[name].data for name in x)


def _answer(message: Message, client_id: str, num_examples: float, metrics: Mapping[str, float] | None) -> RecordDict:
    config = ConfigRecord({"client-id": client_id, "num-examples": float(num_examples)})
    config["round"] = _config(message)["round"]
    record = MetricRecord({name: float(value) for name, value in (metrics or {}).items()})
    return RecordDict({CONFIG: config, METRICS: record})


def _payload(modules: Mapping[str, Payload], dense: Tensors) -> dict[str, Tensor]:
    named = {f"{name}/{part}": t for name, payload in modules.items() for part, t in payload.tensors().items()}
    if both := named.keys() & dense.keys():
        raise FedspanError(f"{min(both)} is the name of a dense weight and of a factor: expected different names")
    return named | dict(dense)


def _arrays(values: Mapping[str, Tensor]) -> ArrayRecord:
    record = ArrayRecord()
    for name, value in values.items():
        if value.dtype == torch.bfloat16:
            raise FedspanError(f"{name} is bfloat16, which Flower's arrays do not support: expected float32")
        record[name] = Array(np.ascontiguousarray(value.detach().cpu().numpy()))
    return record


def _checked(name: str, array: Array, wanted: Tensor) -> Tensor:
    value = _tensor(name, array)
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        actual, expected = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, wanted))
        raise FedspanError(f"{name} is {actual}: expected {expected}")
    if not bool(torch.isfinite(value).all()):
        raise FedspanError(f"{name} holds NaN or infinity")
    return value


def _tensor(name: str, array: Array) -> Tensor:
    """Return a copy of an array's values; the header's shape alone never makes it allocate memory."""
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran, dtype = read_header(stream)
        if array.stype != "numpy.ndarray" or fortran or dtype.hasobject:
            raise FedspanError("expected a plain array in C order")
        body = array.data[stream.tell() :]
        return torch.from_numpy(np.frombuffer(body, dtype).reshape(shape).copy())
    except Exception as error:
        # numpy parses the header, which anyone may have written, as a Python literal: a bad one ends in a TokenError,
        # a MemoryError or other errors without a common base, and none of them may end the run.
        raise FedspanError(f"{name} cannot be read ({one_line(error)})") from None


def _values(message: Message) -> dict[str, Tensor]:
    record = message.content.array_records.get(ARRAYS)
    return {} if record is None else {name: _tensor(name, array) for name, array in record.items()}


def _config(message: Message) -> ConfigRecord:
    config = message.content.config_records.get(CONFIG)
    if config is None:
        raise FedspanError(f"a message lacks the record {CONFIG!r}: expected one from a FedspanStrategy")
    return config


def _list(config: ConfigRecord, key: str) -> Iterable[object]:
    value = config.get(key, [])
    return value if isinstance(value, list) else [value]


def _number(config: ConfigRecord, key: str) -> float:
    value = config[key]
    if not isinstance(value, float):
        raise FedspanError(f"{key} = {value!r}: expected a number")
    return value


def _pop(values: dict[str, Tensor], name: str) -> Tensor:
    if name not in values:
        raise FedspanError(f"a message lacks the array {name}")
    return values.pop(name)


def _pop_factor(values: dict[str, Tensor], name: str) -> Tensor:
    if name not in values:
        raise FedspanError(f"{name} is missing: expected both factors of every module")
    return values.pop(name)
