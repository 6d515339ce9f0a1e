"""The precision of a site's training: its own choice, kept on its disk, so that a restart changes no bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fedspan.client import precision
from fedspan.config import Config
from fedspan.site.loading import Loaded
from fedspan.support.errors import FedspanError
from fedspan.support.files import write_bytes

_FILE = "precision.json"


def settle(config: Config, loaded: Loaded, folder: Path, notify: Callable[[str], None]) -> None:
    """Choose the precision where the settings leave it open, or take what was chosen before for the same base.

    Parameters
    ----------
    folder
        The site's state on its disk.
    notify
        Receives the line that says what was chosen, and why.

    Raises
    ------
    FedspanError
        When what was kept cannot be read.
    """
    context, path = loaded.context, folder / _FILE
    kept = _read(path)
    if kept.get("base") == loaded.base and config.engine.precision == "auto" and context.model.device.type == "cpu":
        name, reason = kept["precision"], kept["reason"]
    else:
        chosen = precision.choose(context.model, context.data["train"], config, context.model.device)
        if chosen is None:
            return
        name, reason = chosen.name, chosen.reason
        content = {"base": loaded.base, "precision": name, "reason": reason}
        write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
    context.training = context.training.with_options(precision=name)
    notify(f"trains with products in {name}: {reason}")


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        kept: dict[str, str] = json.loads(path.read_text())
        known = kept["precision"] in ("float32", "bfloat16") and {"base", "reason"} <= kept.keys()
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise FedspanError(f"{path} is damaged: expected what this site chose; remove it to have it chosen anew")
    return kept
