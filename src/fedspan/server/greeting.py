"""A site's introduction, read from bytes that anyone may have sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.support.errors import FedspanError
from fedspan.wire import protocol, refusals, schema
from fedspan.wire.transport import Delivery


@dataclass(frozen=True, slots=True)
class Greeting:
    """The answer of one site to a greeting, with every field of the right type."""

    client_id: str
    rank: int
    """At most `max_rank`, and no larger than its widest module allows."""
    num_examples: int
    """1 where a site does not reveal it, which is where only sums may be known."""
    terms: Mapping[str, Any]
    """The settings that it must share with the server."""
    shapes: Mapping[str, Sequence[int]]
    """Of its adapted modules and trained weights, by name."""
    base: str
    """Digest of its untouched base."""
    labels: str
    """Digest of what the labels of its data mean."""
    holds: Sequence[str] = ()
    """Digests of tensors that it keeps."""

    @classmethod
    def read(cls, delivery: Delivery, max_rank: int) -> Greeting:
        """Read what came back from a node.

        Parameters
        ----------
        max_rank
            The largest rank that the server's settings give a client.

        Raises
        ------
        FedspanError
            When no answer came, the site reports a problem, or a field is missing, wrong or beyond its bounds.
        """
        return cls.of(schema.introduction(_head(delivery)), max_rank)

    @classmethod
    def of(cls, head: schema.Introduction | schema.Refusal, max_rank: int) -> Greeting:
        """Return a greeting from its fields, as `read` does."""
        if "code" in head:
            raise FedspanError(refusals.line(head["code"], head["incident"]))
        client_id, rank, count, shapes = head["client_id"], head["rank"], head["num_examples"], head["shapes"]
        # No adapter of a module is of higher rank than the module itself; the server makes its own adapters as large as
        # the largest that any site announces.
        sides = [min(shape) for name, shape in shapes.items() if len(shape) == 2 and not name.startswith("dense ")]
        most = min(max_rank, max(sides, default=max_rank))
        if rank > most:
            raise FedspanError(f"{client_id} says that its rank is {rank}: expected at most {most}")
        num_examples = 1 if count is None else count
        return cls(
            client_id, rank, num_examples, head["terms"], shapes, head["base"], head["labels"], tuple(head["holds"])
        )


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The sites that introduce themselves through one node: one site, or those of a region."""

    greetings: Sequence[Greeting]
    region: str | None = None
    """The name of the region; None: the node is a site's own."""

    @classmethod
    def read(cls, delivery: Delivery, max_rank: int) -> Arrivals:
        """Read what came back from a node, as `Greeting.read`."""
        head = _head(delivery)
        if "members" not in head:
            return cls([Greeting.of(schema.introduction(head), max_rank)])
        region = schema.region_introduction(head)
        forms, found = region["forms"], []
        for member in region["members"]:
            if member["form"] >= len(forms):
                raise FedspanError(f"{member['client_id']} has form {member['form']}: expected one of {len(forms)}")
            own = {key: member[key] for key in ("client_id", "rank", "num_examples")}
            found.append(Greeting.of(schema.introduction({**forms[member["form"]], **own, "holds": []}), max_rank))
        return cls(found, region["client_id"])


def _head(delivery: Delivery) -> dict[str, Any]:
    if delivery.content is None:
        raise FedspanError(delivery.error or "no answer")
    return protocol.decode(delivery.content)[0]
