"""The names of what a site is asked and answers under example-level privacy: digests of everything that matters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Update
from fedspan.methods.patches import patch_tensors
from fedspan.privacy.gaussian import fingerprint


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to one client for a round's training.

    Exchanges have no part in it: where two of them ask for the same training, the result is the same.
    """

    run: str
    client_id: str
    round_num: int
    """Counted from 0."""
    steps: int
    num_examples: int
    digest: str
    """SHA-256 of everything that the answer depends on beside the site's secret."""

    @classmethod
    def of(
        cls,
        run: str,
        client_id: str,
        round_num: int,
        steps: int,
        num_examples: int,
        started: Broadcast,
        about: Sequence[str],
    ) -> Ask:
        """Return the question for training from `started`.

        Parameters
        ----------
        started
            Everything that training starts from, what this client keeps included.
        about
            Digests of the settings, the base and the examples.
        """
        parts = [run, client_id, round_num, steps, num_examples, broadcast_digest(started), *about]
        return cls(
            run, client_id, round_num, steps, num_examples, hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        )


def broadcast_digest(sent: Broadcast) -> str:
    """Return a digest of everything in a broadcast that training depends on: every tensor, trained or frozen."""
    recipe = json.dumps([asdict(sent.recipe), {name: f.scaling for name, f in sorted(sent.adapter.items())}])
    sides = json.dumps({name: space.side for name, space in sorted(sent.subspaces.items())})
    return hashlib.sha256(f"{recipe}\n{sides}\n{fingerprint(_tensors(sent))}".encode()).hexdigest()


def _tensors(sent: Broadcast) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, sorted, each under a name that tells the parts apart."""
    for name, f in sorted(sent.adapter.items()):
        yield from ((f"adapter {name} {part}", t) for part, t in sorted(f.tensors().items()))
    for kind, held in (("dense", sent.dense), ("correction", sent.correction), ("moments", sent.moments)):
        yield from ((f"{kind} {name}", t) for name, t in sorted(held.items()))
    for name, patch in sorted(sent.patch.items()):
        yield from ((f"patch {name} {part}", t) for part, t in sorted(patch_tensors(patch).items()))
    yield from ((f"subspace {name}", space.basis) for name, space in sorted(sent.subspaces.items()))


def data_digest(examples: Encoded) -> str:
    """Return a digest of a client's examples as its model sees them, in their order."""
    rows = (examples.batch([row]) for row in range(len(examples)))
    return fingerprint((f"{number} {name}", t) for number, row in enumerate(rows) for name, t in sorted(row.items()))


def update_digest(update: Update) -> str:
    """Return a digest of the result of training."""
    return fingerprint((" ".join(key), t) for key, t in sorted(update.named_tensors().items()))
