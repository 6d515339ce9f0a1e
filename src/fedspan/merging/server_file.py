"""A saved `fedspan.Server`: one safetensors file, read as strictly as it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedspan.merging.exchanges import Exchanges
from fedspan.merging.layout import Layout
from fedspan.methods import create
from fedspan.methods.state_file import pack_state, pack_tensors, separate, unpack_state, unpack_tensors
from fedspan.support.errors import FedspanError
from fedspan.support.files import read_tensors, write_bytes

_FORMAT = 1
_KEY = "fedspan_server"


def write(path: Path, exchanges: Exchanges, options: Mapping[str, Any]) -> None:
    """Write a method's exchanges and options to one file: whole, or not at all.

    Raises
    ------
    OSError
        When writing fails; a file that was there before survives.
    """
    tensors: dict[str, Tensor] = {}
    layout = exchanges.layout
    structure = {
        "format": _FORMAT,
        "method": exchanges.method.info.name,
        "options": options,
        "adapter_name": layout.adapter_name,
        "heads": {name: list(shape) for name, shape in layout.heads.items()},
        "modules_to_save": list(layout.modules_to_save),
        "embeddings": sorted(layout.embeddings),
        "fan_in_fan_out": layout.fan_in_fan_out,
        "state": pack_state(exchanges.state, tensors),
        "client_states": {
            client: pack_tensors(kept, f"client/{client}", tensors) for client, kept in exchanges.client_states.items()
        },
    }
    write_bytes(path, to_bytes(separate(tensors), metadata={_KEY: json.dumps(structure)}))


def read(path: Path) -> tuple[Exchanges, dict[str, Any]]:
    """Return the exchanges and the options that `write` wrote.

    Raises
    ------
    FedspanError
        When the file is no saved server of this format, or damaged.
    """
    try:
        meta, tensors = read_tensors(path, _KEY)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FedspanError(f"{path} is damaged ({error}): expected a saved server") from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise FedspanError(f"{path} is no saved server of format {_FORMAT}")
    try:
        state = unpack_state(meta["state"], tensors)
        layout = Layout(
            state.template,
            meta["adapter_name"],
            {name: tuple(shape) for name, shape in meta["heads"].items()},
            tuple(meta["modules_to_save"]),
            frozenset(meta["embeddings"]),
            meta["fan_in_fan_out"],
        )
        kept = {client: unpack_tensors(keys, tensors) for client, keys in meta["client_states"].items()}
        options = dict(meta["options"])
        exchanges = Exchanges(create(meta["method"], **options), layout, state, kept)
        # A state in the middle of a stage is none that was saved.
        if state.exchange not in (0, exchanges.stage.numbers[0]):
            raise ValueError(f"exchange {state.exchange} begins no stage")
    except FedspanError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FedspanError(f"{path} is damaged (incomplete: {error}): expected a saved server") from None
    return exchanges, options
