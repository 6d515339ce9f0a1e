"""The files that a site keeps between rounds, on its own disk."""

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
from fedspan.site.errors import Refused
from fedspan.support.files import read_tensors, write_bytes
from fedspan.wire.refusals import Code

_UNMASKED = "unmasked.json"
_VECTORS = ".vectors.json"
"""Of all runs. No run has such a name."""
_Record = dict[str, dict[str, list[str]]]
"""Sum or vector -> the survivors that it was unmasked for, and the proved liars among them."""


class SiteStorage:
    """A client's state and the patch on its base, in one file for each round or version, under a folder for each run.

    The server names the round whose answer last counted. The state of that round is kept beside the state of a later
    round until the server has named the later one, so that the state after an answer that was lost is never used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._patch: tuple[tuple[str, int], dict[str, Patch]] | None = None

    def state(self, run: str, counted: int) -> ClientState | None:
        """Return the state after that many finished rounds, or None; the files of earlier rounds are removed."""
        folder = self.folder / run
        path = folder / f"client-{counted}.safetensors"
        if not path.exists():
            return None  # and nothing is removed: a server that names a round of the future must not take all states
        for other in folder.glob("client-*.safetensors"):
            if int(other.stem.removeprefix("client-")) < counted:
                other.unlink()
        return self._read(path)

    def keep(self, run: str, finished: int, state: ClientState) -> None:
        """Keep the state after that many finished rounds, for the case that the answer counts."""
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
        write_bytes(self.folder / run / f"client-{finished}.safetensors", save(tensors))

    def patch(self, run: str, header: Mapping[str, Any], news: Sequence[Mapping[str, Patch]]) -> dict[str, Patch]:
        """Return the whole patch, after adding the new parts to the version that is held.

        Parameters
        ----------
        header
            `whole`: the news are the whole patch. `seen` and `version`: the versions before and after the news.

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
        # The exchanges of a round name the same version, and the news must be added to it only once.
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
            raise Refused(
                f"the server counts on version {seen} of the patch, which this site does not hold", Code.NOT_HELD
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._read(path).items():
            name, _, part = key.rpartition("/")
            parts.setdefault(name, {})[part] = tensor
        return {name: patch_of(tensors) for name, tensors in parts.items()}

    def _write(self, run: str, version: int, seen: int, total: Mapping[str, Patch]) -> None:
        flat: dict[str, Tensor] = {}
        for name, p in total.items():
            flat |= {f"{name}/{part}": t for part, t in patch_tensors(p).items()}
        folder = self.folder / run
        write_bytes(folder / f"patch-{version}.safetensors", save({k: t.contiguous().clone() for k, t in flat.items()}))
        # The version before stays too: if this answer is lost, the server sends the same news again.
        for path in folder.glob("patch-*.safetensors"):
            if int(path.stem.removeprefix("patch-")) not in (version, seen):
                with suppress(OSError):
                    path.unlink()

    def allow_unmasking(self, run: str, sum_name: str, vector: str, survivors: Sequence[str]) -> None:
        """Record the clients for which a sum is unmasked, before this site helps to do so.

        One sum is never unmasked for two choices of clients, since the difference of the two results would be the
        update of the clients in which they differ. Nor are two sums with the same vector of this site: a run that is
        begun again from the same seed has the same vectors as before, and a server may call any sum another run's. The
        records are on disk because a server that was restarted asks about the same round again, and this site may have
        been restarted too.

        Parameters
        ----------
        sum_name
            The name that this site gave the sum when it masked its own update.
        vector
            Digest of that update, as it was before it was masked.

        Raises
        ------
        Refused
            When the sum, or one with the same vector, was unmasked for other clients before, or a record cannot be
            read.
        """
        for place, key in self._places(run, sum_name, vector):
            record = self._unmasked(place)
            before, chosen = record.setdefault(key, {"survivors": sorted(set(survivors)), "liars": []}), set(survivors)
            # Without clients that have dealt false shares the same sum may be asked for again: the difference is
            # theirs.
            if not set(before["survivors"]) - set(before["liars"]) <= chosen <= set(before["survivors"]):
                raise Refused(
                    f"sum {sum_name}, or one with the same update of this site, was unmasked for other clients before, "
                    "and the difference would reveal the update of one of them; a new run needs another seed; the "
                    f"person responsible for this site may allow it by removing {place.name} from its state",
                    Code.UNMASKED,
                )
            self._keep_unmasked(place, record)

    def unmasked_for(self, number: str, besides: tuple[str, str], strict: bool) -> list[list[str]]:
        """Return the survivors of the sums of one exchange that were unmasked, in all runs, without proved liars.

        Parameters
        ----------
        number
            Of the exchange, as at the end of the names of sums.
        besides
            The run and name of a sum that is left out.
        strict
            Refuse where a record cannot be read; otherwise it is left out.
        """
        found: list[set[str]] = []
        liars: set[str] = set()
        for path in sorted(self.folder.glob(f"*/{_UNMASKED}")):
            try:
                record = self._unmasked(path)
            except Refused:
                if strict:
                    raise
                continue
            for name, entry in record.items():
                liars.update(entry["liars"])
                if name.rpartition("/")[2] == number and (path.parent.name, name) != besides:
                    found.append(set(entry["survivors"]))
        return [sorted(survivors - liars) for survivors in found]

    def record_liar(self, run: str, sum_name: str, vector: str, client_id: str) -> None:
        """Record that a client was proved to have dealt false shares for a sum that this site has helped to unmask."""
        for place, key in self._places(run, sum_name, vector):
            record = self._unmasked(place)
            record[key]["liars"] = sorted({*record[key]["liars"], client_id})
            self._keep_unmasked(place, record)

    def _places(self, run: str, sum_name: str, vector: str) -> tuple[tuple[Path, str], ...]:
        """Return the two records that a sum is in, and its name in each."""
        return (self.folder / run / _UNMASKED, sum_name), (self.folder / _VECTORS, vector)

    @staticmethod
    def _unmasked(path: Path) -> _Record:
        if not path.exists():
            return {}
        try:
            record: _Record = json.loads(path.read_text(encoding="utf-8"))
            if any(entry.keys() != {"survivors", "liars"} for entry in record.values()):
                raise ValueError("entries of another form")
        except (ValueError, AttributeError) as error:
            # Not taken for an empty record, which would allow everything.
            raise Refused(f"{path.name} is damaged ({error}): this site cannot tell what it has unmasked") from None
        return record

    @staticmethod
    def _keep_unmasked(path: Path, record: _Record) -> None:
        write_bytes(path, json.dumps(record).encode())

    @staticmethod
    def _read(path: Path) -> dict[str, Tensor]:
        try:
            return read_tensors(path, "fedspan")[1]
        except SafetensorError as error:
            raise Refused(f"{path.name} is damaged ({error}): this site's state is lost", Code.NOT_HELD) from None
