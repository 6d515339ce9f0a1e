"""The server's knowledge of what its sites hold, so that it is not sent to them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedspan.federation.exchange import Question
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast
from fedspan.server.registry import Member, SiteRegistry
from fedspan.wire import contents, packing, protocol
from fedspan.wire.contents import LEAST_BYTES, num_bytes
from fedspan.wire.precision import Kind
from fedspan.wire.protocol import MessageTensors

_MOST_HELD = 10**5
"""Digests that are remembered of one site. It is a matter of traffic alone, so that the rest is forgotten."""


@dataclass(slots=True)
class _Held:
    """The tensors that one site has said that it holds, since its last greeting."""

    member: Member
    digests: set[str]
    asked: set[str] = field(default_factory=set)
    """The digests that it was asked to keep in the last message."""
    sent: tuple[int, Broadcast] | None = None
    """The last broadcast that it was sent, and the round."""
    before: tuple[int, Broadcast] | None = None
    """The last one that it has answered to, and the round."""


class SiteContents:
    """Leaves out of the messages to sites what they hold, or work out themselves: see `fedspan.wire.contents`."""

    def __init__(self, registry: SiteRegistry, method: Method) -> None:
        self._registry, self._method = registry, method
        self._held: dict[str, _Held] = {}
        self._digests: dict[tuple[int, Kind], tuple[Tensor, str]] = {}
        """By identity, with the tensor, whose identity is its own as long as it is held; of one exchange."""
        self._completed: dict[tuple[int, int, int], tuple[Broadcast, Broadcast, Sequence[Tensor]]] = {}
        self._place: tuple[int, int] = (-1, -1)

    def begin(self, question: Question) -> None:
        """Begin an exchange: what was worked out for the one before is released."""
        if self._place != (question.round_num, question.number):
            self._place = (question.round_num, question.number)
            self._digests, self._completed = {}, {}
            for held in self._held.values():
                # Older weights than those of the last round are of no use, and would stay in memory for each client.
                if held.before is not None and held.before[0] < question.round_num - 1:
                    held.before = None

    def name(
        self,
        question: Question,
        client_id: str,
        sent: Broadcast,
        derived: Broadcast,
        described: tuple[Mapping[str, Any], Mapping[str, Any]],
        outgoing: MessageTensors,
        keep_all: bool = False,
    ) -> dict[str, Any]:
        """Name the tensors of a message that the client holds by digests, so that they are not sent.

        Parameters
        ----------
        derived
            The broadcast that the site works out from the settings.
        described
            The description of `sent` in the message, and that of its patch's news.
        keep_all
            The client is asked to keep everything, since it will be sent the same weights again.

        Returns
        -------
        dict
            The message's fields about this: `held`, (place, digest); `store`, the places of tensors to keep;
            `previous`, what the rest is completed from, where the method can.
        """
        held, count = self._of(client_id), len(outgoing.tensors)
        keep = set(
            _whole_places(*described, outgoing)
            if keep_all
            else self._worth_keeping(question, sent, described[0], outgoing)
        )
        names = {
            place: self._digest(tensor, outgoing.kinds[place])
            for place, tensor in enumerate(outgoing.tensors)
            if (held.digests or place in keep or self._method.complete is not None) and num_bytes(tensor) >= LEAST_BYTES
        }
        known = {place: name for place, name in names.items() if name in held.digests}
        rest = {place: name for place, name in names.items() if place not in known}
        fields: dict[str, Any] = {}
        previous, completed = self._previous(question, held, sent, derived, set(rest.values()), outgoing)
        if previous is not None:
            known |= {place: name for place, name in rest.items() if name in completed}
            fields["previous"] = previous
            known |= {
                place: self._digest(tensor, outgoing.kinds[place])
                for place, tensor in enumerate(outgoing.tensors)
                if place >= count and self._digest(tensor, outgoing.kinds[place]) in held.digests
            }
        outgoing.held |= known
        held.asked = {names[place] for place in keep}
        held.sent = (question.round_num, sent) if self._method.complete is not None else None
        return {**fields, "held": sorted(known.items()), "store": sorted(keep)}

    def answered(self, client_id: str, stored: bool, gone: Iterable[str] = ()) -> None:
        """Take note that a client has answered to its last message.

        Parameters
        ----------
        stored
            It keeps what it was asked to.
        gone
            Digests of what it keeps no longer: where its room is too small, that would otherwise cost a round trip.
        """
        held = self._of(client_id)
        if stored and len(held.digests) < _MOST_HELD:
            held.digests |= held.asked
        held.digests.difference_update(gone)
        held.before = held.sent

    def forget(self, client_id: str) -> None:
        """Count on nothing that a client holds: it lacks something that it was believed to."""
        held = self._of(client_id)
        held.digests, held.before = set(), None

    def _of(self, client_id: str) -> _Held:
        member = self._registry.members[client_id]
        if client_id not in self._held or self._held[client_id].member is not member:
            self._held[client_id] = _Held(member, set(member.holds))
        return self._held[client_id]

    def _digest(self, tensor: Tensor, kind: Kind) -> str:
        key = (id(tensor), kind)
        if key not in self._digests:
            self._digests[key] = (tensor, contents.digest(tensor, kind))
        return self._digests[key][1]

    def _worth_keeping(
        self, question: Question, sent: Broadcast, described: Mapping[str, Any], outgoing: MessageTensors
    ) -> list[int]:
        """Return the places of what may be sent again: what is not trained, and weights that more exchanges, or the
        next round's, begin from."""
        places = [place for place, _ in described["subspaces"].values()]
        trained = (sent.recipe.train_b, sent.recipe.train_a)
        for b, a, _ in described["adapter"].values():
            places += [place for place, trains in zip((b, a), trained, strict=True) if not trains]
        if self._method.complete is not None or question.place[0] + 1 < question.place[1]:
            places += described["dense"].values()
        return _large(places, outgoing)

    def _previous(
        self,
        question: Question,
        held: _Held,
        sent: Broadcast,
        derived: Broadcast,
        wanted: set[str],
        outgoing: MessageTensors,
    ) -> tuple[dict[str, Any] | None, set[str]]:
        """Return what the site completes some of the wanted tensors from, and the digests of those."""
        complete = self._method.complete
        if complete is None or not wanted:
            return None, set()
        for before in (sent, *([] if held.before is None else [held.before[1]])):
            part = self._held_part(before, derived, held, outgoing)
            key = (id(sent), id(before), hash((frozenset(part.dense), frozenset(part.subspaces))))
            if key not in self._completed:
                made = complete(question.template, part, sent.news)
                self._completed[key] = (sent, before, made)
            names = {self._digest(tensor, "float32") for tensor in self._completed[key][2]} & wanted
            if names:
                described = protocol.put_broadcast(outgoing, part, derived, "float32")
                news = [packing.put_patch(outgoing, patch) for patch in sent.news]
                return {"broadcast": described, "news": news}, names
        return None, set()

    def _held_part(self, before: Broadcast, derived: Broadcast, held: _Held, outgoing: MessageTensors) -> Broadcast:
        """Return the weights of a broadcast that the site holds or derives, and the subspaces, which may be in the same
        message too: no method completes one."""

        def known(tensor: Tensor, own: Tensor | None) -> bool:
            if num_bytes(tensor) >= LEAST_BYTES and self._digest(tensor, "float32") in held.digests:
                return True
            return own is not None and protocol.same_bits(tensor, own)

        spaces = {
            name: space
            for name, space in before.subspaces.items()
            if outgoing.has(space.basis)
            or known(space.basis, derived.subspaces[name].basis if name in derived.subspaces else None)
        }
        dense = {name: t for name, t in before.dense.items() if known(t, derived.dense.get(name))}
        return Broadcast({}, dense, before.recipe, subspaces=spaces)


def _whole_places(described: Mapping[str, Any], patch: Mapping[str, Any], outgoing: MessageTensors) -> list[int]:
    """Return the places of all tensors of a broadcast, and of the news of its patch."""
    places = [place for b, a, _ in described["adapter"].values() for place in (b, a)]
    places += [place for place, _ in described["subspaces"].values()]
    for group in ("dense", "correction", "moments"):
        places += described[group].values()
    places += [place for increment in patch["news"] for parts in increment.values() for place in parts]
    return _large(places, outgoing)


def _large(places: Iterable[int | None], outgoing: MessageTensors) -> list[int]:
    return [p for p in places if p is not None and num_bytes(outgoing.tensors[p]) >= LEAST_BYTES]
