"""Our methods' messages as Flower's records of named arrays: factors by module, their scaling beside them.

Names: `MODULE/a`, `MODULE/b` (or what else a method sends of a module), and dense weights by their own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedspan.flower.records import one_line
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Factors, Payload, Recipe, Template, Tensors, Update
from fedspan.support.errors import FedspanError

ARRAYS, CONFIG, METRICS = "arrays", "fedspan", "metrics"
_PAIRS = ((".lora_A.weight", ".lora_B.weight"), ("/a", "/b"))


def received(message: Message) -> Broadcast:
    """In a ClientApp: what the server sent. The tensors are the caller's own.

    Raises
    ------
    ValueError
        When the message is not from a `FedspanStrategy`.
    """
    config, values = _config(message), _values(message)
    adapter: dict[str, Factors] = {}
    for name, scaling in zip(_list(config, "modules"), _list(config, "scalings"), strict=True):
        if not isinstance(name, str) or not isinstance(scaling, float):
            raise FedspanError(f"the module {name!r} has the scaling {scaling!r}: expected a name and a number")
        adapter[name] = Factors(_taken(values, f"{name}/b"), _taken(values, f"{name}/a"), scaling)
    recipe = Recipe(
        train_a=bool(config["train-a"]), train_b=bool(config["train-b"]), proximal=_number(config, "proximal")
    )
    return Broadcast(adapter, values, recipe)


def reply(message: Message, method: Method, update: Update, metrics: Mapping[str, float] | None = None) -> Message:
    """In a ClientApp: what training came to, as the server's method wants it.

    Parameters
    ----------
    method
        The server's: its `encode` runs here, so that only what it needs leaves the site.
    update
        Factors by module and dense weights, after training; `client_id` is this site's own name in every round.
    metrics
        Figures to be averaged over the clients.
    """
    config = _config(message)
    if config.get("method") != method.info.name:
        raise FedspanError(f"the server runs {config.get('method')!r}: expected {method.info.name!r} as here")
    sent = received(message)
    for name, scaling in update.scalings().items():
        if name in sent.adapter and scaling != sent.adapter[name].scaling:
            # The scaling does not travel back: the server takes it for the one that it sent.
            raise FedspanError(f"{name} has scaling {scaling}, expected {sent.adapter[name].scaling} as was sent")
    encoded, _ = method.encode(update, sent, None)
    records = _answer(message, update.client_id, update.num_examples, metrics)
    records[ARRAYS] = _arrays(_payload(encoded.modules, encoded.dense))
    return Message(records, reply_to=message)


def figures(message: Message, client_id: str, num_examples: float, metrics: Mapping[str, float]) -> Message:
    """In a ClientApp: what evaluation came to."""
    return Message(_answer(message, client_id, num_examples, metrics), reply_to=message)


def record_of(sent: Broadcast, method: Method, server_round: int, rank: int) -> RecordDict:
    """What a node of that rank is sent."""
    config = ConfigRecord({"method": method.info.name, "round": server_round, "rank": rank})
    config["train-a"], config["train-b"] = sent.recipe.train_a, sent.recipe.train_b
    config["proximal"] = float(sent.recipe.proximal)
    if sent.adapter:
        config["modules"] = list(sent.adapter)
        config["scalings"] = [float(f.scaling) for f in sent.adapter.values()]
    return RecordDict({ARRAYS: arrays_of(sent), CONFIG: config})


def arrays_of(sent: Broadcast) -> ArrayRecord:
    """The tensors of a broadcast."""
    return _arrays(_payload(sent.adapter, sent.dense))


def update_of(message: Message, method: Method, sent: Broadcast, server_round: int) -> Update:
    """A valid reply's update.

    Raises
    ------
    ValueError
        When it is another round's, or names, shapes or types differ from what the method makes of what was sent, or a
        value is not finite.
    """
    client_id, num_examples = sender_of(message, server_round)
    # What encoding makes of the very tensors that were sent has the names, shapes and scalings of every answer.
    probe = Update(client_id, num_examples, dict(sent.adapter), dict(sent.dense))
    expected, _ = method.encode(probe, sent, None)
    wanted = _payload(expected.modules, expected.dense)
    record = message.content.array_records.get(ARRAYS)
    got = {} if record is None else dict(record.items())
    if got.keys() != wanted.keys():
        odd = sorted(got.keys() ^ wanted.keys())[0]
        raise FedspanError(f"it names {odd}, which was not asked for, or lacks it")
    values = {name: _checked(name, got[name], wanted[name]) for name in wanted}
    modules: dict[str, Payload] = {}
    for name, payload in expected.modules.items():
        own = {part: values.pop(f"{name}/{part}") for part in payload.tensors()}
        modules[name] = payload.with_tensors(own)
    return Update(client_id, num_examples, modules, values)


def sender_of(message: Message, server_round: int) -> tuple[str, float]:
    """Who answers, and for how many examples."""
    if message.has_error():
        raise FedspanError(one_line(message.error.reason or f"error {message.error.code}"))
    config = _config(message)
    client_id, num_examples = config.get("client-id"), config.get("num-examples")
    if config.get("round") != server_round:
        raise FedspanError(f"it is of round {config.get('round')!r}, expected {server_round}")
    if not isinstance(client_id, str) or not client_id:
        raise FedspanError(f"client-id = {client_id!r}, expected the site's name")
    if not isinstance(num_examples, float) or not (math.isfinite(num_examples) and num_examples > 0):
        raise FedspanError(f"num-examples = {num_examples!r}, expected more than 0")
    return client_id, num_examples


def metrics_of(message: Message) -> MetricRecord:
    """A reply's figures, each one number.

    Raises
    ------
    ValueError
        When one is not.
    """
    found = message.content.metric_records.get(METRICS) or MetricRecord()
    for name, value in found.items():
        if isinstance(value, list) or not math.isfinite(value):
            raise FedspanError(f"{name} = {value!r}, expected a finite number")
    return found


def mean_metrics(found: Sequence[tuple[float, MetricRecord]]) -> MetricRecord:
    """Σ n_k x_k / Σ n_k of the figures that every client has, in the order given."""
    total = sum(weight for weight, _ in found)
    figures = [
        (weight, {name: float(x) for name, x in told.items() if not isinstance(x, list)}) for weight, told in found
    ]
    common = set.intersection(*(set(told) for _, told in figures))
    means = MetricRecord({"num-clients": len(found)})
    for name in sorted(common):
        means[name] = sum(weight * told[name] for weight, told in figures) / total
    return means


def template_of(arrays: ArrayRecord, alpha: float, rslora: bool, seed: int) -> tuple[Template, dict[str, Tensor]]:
    """Modules, rank and dense weights of an untrained adapter."""
    values = {name: _tensor(name, array) for name, array in arrays.items()}
    modules: dict[str, tuple[int, int]] = {}
    ranks: set[int] = set()
    for first, second in _PAIRS:
        for name in [name for name in values if name.endswith((first, second))]:
            module = name.removesuffix(first).removesuffix(second)
            if module in modules:
                continue
            a, b = _half(values, module + first), _half(values, module + second)
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise FedspanError(f"{module}: factors {tuple(a.shape)} and {tuple(b.shape)}, expected (r, n), (m, r)")
            if bool(b.any()):
                raise FedspanError(f"{module}: B is not zero, expected an untrained adapter; merge this one first")
            modules[module] = (b.shape[0], a.shape[1])
            ranks.add(a.shape[0])
            del values[module + first], values[module + second]
    if len(ranks) > 1:
        raise FedspanError(f"the adapter has the ranks {sorted(ranks)}: expected one")
    return Template(modules, next(iter(ranks), 1), alpha, rslora, seed), values


def same(x: ArrayRecord, y: ArrayRecord) -> bool:
    """Whether two records are the same to the last bit."""
    return x.keys() == y.keys() and all(x[name].data == y[name].data for name in x)


def _answer(message: Message, client_id: str, num_examples: float, metrics: Mapping[str, float] | None) -> RecordDict:
    config = ConfigRecord({"client-id": client_id, "num-examples": float(num_examples)})
    config["round"] = _config(message)["round"]
    told = MetricRecord({name: float(value) for name, value in (metrics or {}).items()})
    return RecordDict({CONFIG: config, METRICS: told})


def _payload(modules: Mapping[str, Payload], dense: Tensors) -> dict[str, Tensor]:
    named = {f"{name}/{part}": t for name, payload in modules.items() for part, t in payload.tensors().items()}
    if both := named.keys() & dense.keys():
        raise FedspanError(f"{min(both)} is a dense weight and a factor's name: expected different names")
    return named | dict(dense)


def _arrays(values: Mapping[str, Tensor]) -> ArrayRecord:
    record = ArrayRecord()
    for name, value in values.items():
        if value.dtype == torch.bfloat16:
            raise FedspanError(f"{name} is bfloat16, which Flower's arrays cannot hold: expected float32")
        record[name] = Array(np.ascontiguousarray(value.detach().cpu().numpy()))
    return record


def _checked(name: str, array: Array, wanted: Tensor) -> Tensor:
    value = _tensor(name, array)
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        got, expected = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, wanted))
        raise FedspanError(f"{name} is {got}, expected {expected}")
    if not bool(torch.isfinite(value).all()):
        raise FedspanError(f"{name} holds NaN or infinity")
    return value


def _tensor(name: str, array: Array) -> Tensor:
    """An array's values, copied; no memory is taken for what its header only claims to hold."""
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
        if array.stype != "numpy.ndarray" or fortran or dtype.hasobject:
            raise FedspanError("expected a plain array in C order")
        body = array.data[stream.tell() :]
        return torch.from_numpy(np.frombuffer(body, dtype).reshape(shape).copy())
    except (ValueError, KeyError, TypeError) as error:
        raise FedspanError(f"{name} cannot be read ({error})") from None


def _values(message: Message) -> dict[str, Tensor]:
    record = message.content.array_records.get(ARRAYS)
    return {} if record is None else {name: _tensor(name, array) for name, array in record.items()}


def _config(message: Message) -> ConfigRecord:
    config = message.content.config_records.get(CONFIG)
    if config is None:
        raise FedspanError(f"a message without the record {CONFIG!r}: expected one of a FedspanStrategy")
    return config


def _list(config: ConfigRecord, key: str) -> Iterable[object]:
    value = config.get(key, [])
    return value if isinstance(value, list) else [value]


def _number(config: ConfigRecord, key: str) -> float:
    value = config[key]
    if not isinstance(value, float):
        raise FedspanError(f"{key} = {value!r}, expected a number")
    return value


def _taken(values: dict[str, Tensor], name: str) -> Tensor:
    if name not in values:
        raise FedspanError(f"a message lacks {name}")
    return values.pop(name)


def _half(values: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in values:
        raise FedspanError(f"{name} is missing: expected both factors of every module")
    return values[name]
