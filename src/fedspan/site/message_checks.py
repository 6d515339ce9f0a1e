"""The checks that a message must pass before a site acts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.methods.messages import Broadcast, Recipe
from fedspan.methods.patches import Patch
from fedspan.site.errors import Refused
from fedspan.wire import agreement
from fedspan.wire.names import check_name
from fedspan.wire.refusals import Code
from fedspan.wire.schema import MAX_RANK

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoundHeader:
    """The fields of a message that place it in a run, each of the right type."""

    run: str
    round_num: int
    counted: int
    """Rounds that were finished when this client's answer last counted: its state is the one of then."""
    number: int
    """Of the exchange, in the method's list."""
    rank: int
    """The server's."""
    num_clients: int
    """Of the run."""

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> RoundHeader:
        """Read the fields of a message that `fedspan.wire.schema` has checked.

        Raises
        ------
        Refused
            When they contradict each other.
        """
        round_num, counted = message["round"], message["counted"]
        # The run names a folder on this site's disk. That is checked with the other fields, and here again, since a
        # caller that forgets it would give away every file.
        run = check_name(message["run"], "run")
        if not 0 <= counted <= round_num:
            raise Refused(f"round {round_num} after {counted} finished rounds: expected the next one")
        return cls(run, round_num, counted, message["number"], message["rank"], message["num_clients"])


class MessageChecks:
    """The checks that a message belongs to this federation, and is not an old one.

    Parameters
    ----------
    terms
        The settings that the site shares with the server.
    max_rank
        The largest rank that these settings give any client, and so the server.
    """

    def __init__(self, terms: Mapping[str, Any], max_rank: int = MAX_RANK) -> None:
        self._terms, self._max_rank = agreement.digest(terms), max_rank
        self._newest = ("", 0)
        """Run, and the largest count of finished rounds that the server has named in it."""

    def check(self, message: Mapping[str, Any], base: str) -> RoundHeader:
        """Return the header of a message that this site may act on.

        Parameters
        ----------
        base
            Digest of the site's untouched base.

        Raises
        ------
        Refused
            When the message belongs to another federation or to a round before the last one that counted.
        """
        if message.get("terms") != self._terms:
            raise Refused("a message for other settings: say hello first", Code.OTHER_SETTINGS)
        if message.get("base") != base:
            raise Refused("a message for other base weights: say hello first", Code.OTHER_BASE)
        header = RoundHeader.read(message)
        # The server's first state is made here too, of that rank: an absurd one would take all of the memory.
        if header.rank > self._max_rank:
            raise Refused(f"a server of rank {header.rank}: expected at most {self._max_rank}", Code.OTHER_SETTINGS)
        run, newest = self._newest
        # An old question, delayed or replayed, would have the site train from an old state and overwrite a newer one.
        if header.run == run and header.counted < newest:
            raise Refused(f"a message from before round {newest}, which this site has seen finished", Code.OLD)
        self._newest = (header.run, header.counted)
        return header


def check_patch(patch: Mapping[str, Patch], modules: Mapping[str, tuple[int, int]]) -> None:
    """Check an addition to the base before it is kept on this site's disk.

    Raises
    ------
    Refused
        When it names another module than the base has, or one in another shape.
    """
    for name, addition in patch.items():
        if modules.get(name) != tuple(addition.shape):
            raise Refused(f"a patch of {name} in shape {tuple(addition.shape)}: expected {modules.get(name)}")


def check_tensors(sent: Broadcast, modules: Mapping[str, Shape], dense: Mapping[str, Shape]) -> None:
    """Check that a broadcast's tensors are in the shapes of this model, before anything is computed from them.

    A product of factors without a single number, (2³³, 0) and (0, 2³³), would fill any memory.

    Parameters
    ----------
    modules
        Name -> (m, n).
    dense
        The heads and trained weights of the base.

    Raises
    ------
    Refused
        Naming the first that is not.
    """
    for name, f in sent.adapter.items():
        if (f.b.shape[0], f.a.shape[1]) != modules.get(name):
            raise Refused(f"factors of {name} for {(f.b.shape[0], f.a.shape[1])}: expected {modules.get(name)}")
    for name, value in sent.dense.items():
        if tuple(value.shape) != dense.get(name):
            raise Refused(f"{name} in shape {tuple(value.shape)}: expected {dense.get(name)}")
    trained = {f"{name}/{part}": t.shape for name, f in sent.adapter.items() for part, t in f.tensors().items()}
    trained |= {name: t.shape for name, t in sent.dense.items()}
    _check_subspaces(sent, {**modules, **trained})
    for name, value in sent.correction.items():
        if trained.get(name) != value.shape:
            raise Refused(f"a correction of {name} in shape {tuple(value.shape)}: expected that of a trained tensor")
    for name, value in sent.moments.items():
        shape = trained.get(name)
        # GaLore's are about projected gradients; others about the tensor, one number for each block of it.
        fits = value.ndim == 2 if sent.recipe.galore is not None else _expands(value.shape, shape)
        if shape is None or not fits:
            raise Refused(f"second moments of {name} in shape {tuple(value.shape)}: expected those of a trained tensor")


def _expands(shape: Sequence[int], other: Sequence[int] | None) -> bool:
    return (
        other is not None and len(shape) == len(other) and all(x in (1, y) for x, y in zip(shape, other, strict=True))
    )


def _check_subspaces(sent: Broadcast, shapes: Mapping[str, Shape]) -> None:
    """Check the bases that a broadcast has of trained tensors, of modules, or of what a method derives from a module
    and names `MODULE/part`."""
    for name, space in sent.subspaces.items():
        shape = shapes.get(name, shapes.get(name.rpartition("/")[0], ()))
        # It is known of a tensor on which of its sides a basis acts, and not of what is derived from one.
        sides = shape if name not in shapes else shape[:1] if space.side == "left" else shape[1:]
        if space.basis.ndim != 2 or len(shape) != 2 or space.basis.shape[0] not in sides:
            raise Refused(f"a subspace of {name} in shape {tuple(space.basis.shape)}: expected as many rows as {shape}")


def check_work(recipe: Recipe, own: Recipe) -> None:
    """Check that a recipe asks for no more work than the method's options do, which both sides have agreed on.

    Parameters
    ----------
    own
        That of the method's broadcast before it has learnt anything.

    Raises
    ------
    Refused
        For more batches of a gradient, or another GaLore, whose decompositions could be made in every step.
    """
    if recipe.probe_batches > own.probe_batches:
        raise Refused(f"a gradient over {recipe.probe_batches} batches: expected at most {own.probe_batches}")
    if recipe.galore not in (None, own.galore):
        raise Refused(f"a recipe with {recipe.galore}: expected {own.galore}")
