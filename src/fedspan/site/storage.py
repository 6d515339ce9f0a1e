"""What a site keeps between rounds, on its own disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fedspan.methods.messages import ClientState
from fedspan.methods.patches import Patch, patch_of, patch_sum, patch_tensors
from fedspan.support.errors import FedspanError
from fedspan.support.files import read_tensors, write_bytes


class Refused(FedspanError):
    """A message that this site does not act on, and why."""


class SiteStorage:
    """What a client keeps on its own disk: its state, and the patch on its base, each by the rounds it is of.

    The server names the round whose answer last counted, so what a client made of an answer that was lost is never
    used: the file of the last round that counted lies beside it until the server has named a later one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._patch: tuple[tuple[str, int], dict[str, Patch]] | None = None

    def state(self, run: str, counted: int) -> ClientState | None:
        """The state after that many rounds; none: there is none."""
        folder = self.folder / run
        for path in folder.glob("client-*.safetensors"):
            if int(path.stem.removeprefix("client-")) < counted:
                path.unlink()
        path = folder / f"client-{counted}.safetensors"
        return self._read(path) if path.exists() else None

    def keep(self, run: str, finished: int, state: ClientState) -> None:
        """The state after that many rounds, should the answer count."""
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
        write_bytes(self.folder / run / f"client-{finished}.safetensors", save(tensors))

    def patch(self, run: str, header: Mapping[str, Any], news: Sequence[Mapping[str, Patch]]) -> dict[str, Patch]:
        """The whole patch, after what is new has been added to what is held.

        Raises
        ------
        Refused
            When the server counts on a version that this site does not hold.
        """
        seen, version = header["seen"], header["version"]
        if header["whole"]:
            total = dict(news[-1]) if news else {}
        else:
            total = dict(self._held(run, seen))
            for increment in news:
                for name, patch in increment.items():
                    total[name] = patch_sum(total.get(name), patch)
        if not version:
            return total
        if self._patch is None or self._patch[0] != (run, version):
            self._patch = ((run, version), total)
            self._write(run, version, seen, total)
        return self._patch[1]

    def _held(self, run: str, seen: int) -> Mapping[str, Patch]:
        if seen == 0:
            return {}
        if self._patch is not None and self._patch[0] == (run, seen):
            return self._patch[1]
        path = self.folder / run / f"patch-{seen}.safetensors"
        if not path.exists():
            raise Refused(f"the server counts on version {seen} of the patch, which this site does not hold")
        held: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._read(path).items():
            name, _, part = key.rpartition("/")
            held.setdefault(name, {})[part] = tensor
        return {name: patch_of(tensors) for name, tensors in held.items()}

    def _write(self, run: str, version: int, seen: int, total: Mapping[str, Patch]) -> None:
        flat: dict[str, Tensor] = {}
        for name, p in total.items():
            flat |= {f"{name}/{part}": t for part, t in patch_tensors(p).items()}
        folder = self.folder / run
        write_bytes(folder / f"patch-{version}.safetensors", save({k: t.contiguous().clone() for k, t in flat.items()}))
        for path in folder.glob("patch-*.safetensors"):
            if int(path.stem.removeprefix("patch-")) not in (version, seen):
                with suppress(OSError):
                    path.unlink()

    def unmasking(self, run: str, sum_name: str, survivors: Sequence[str]) -> None:
        """Note whose sum is unmasked: of one sum's clients no other choice is ever unmasked, or the difference of two
        sums would tell what one client sent.

        Raises
        ------
        Refused
            For another choice.
        """
        path = self.folder / run / "unmasked.json"
        held: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        chosen = sorted(survivors)
        if held.setdefault(sum_name, chosen) != chosen:
            raise Refused(
                f"sum {sum_name} was unmasked for other clients before: their difference would tell of one of them; "
                f"whoever is responsible for this site may allow it by removing {path.name} from its state"
            )
        write_bytes(path, json.dumps(held).encode())

    @staticmethod
    def _read(path: Path) -> dict[str, Tensor]:
        try:
            return read_tensors(path, "fedspan")[1]
        except SafetensorError as error:
            raise Refused(f"{path.name} is damaged ({error}): this site's state is lost") from None
