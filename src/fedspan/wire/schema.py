"""The fields of every message, in both directions, with their types and bounds.

A head is plain JSON that anyone may have written. Here it is held against one form for each kind of message: no field
is missing, unknown, of another type or beyond its bounds. That indices, names, shapes and values fit what was asked for
is checked where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypeVar, final

from pydantic import ConfigDict, Discriminator, Field, Strict, Tag, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from fedspan.support.errors import one_line
from fedspan.wire.framing import Malformed
from fedspan.wire.names import Name, TensorName
from fedspan.wire.refusals import Code

T = TypeVar("T")

MAX_RANK = 2**16
MAX_EXAMPLES = 10**12
MAX_HELD = 10**4
"""Digests of held tensors in one message."""
_SHOWN = 60
"""Characters of a wrong value that an error shows."""
_MANY = 1000
"""Wrong fields, above which none of them is named: a description of each would take gigabytes."""
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Flag = Annotated[bool, Strict()]
Index = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
"""Of a tensor of the message."""
Count = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
"""Of rounds, exchanges, clients, sums."""
Bytes = Annotated[int, Strict(), Field(ge=0, lt=2**53)]
Rank = Annotated[int, Strict(), Field(ge=1, le=MAX_RANK)]
Examples = Annotated[int, Strict(), Field(ge=1, le=MAX_EXAMPLES)]
Weight = Annotated[float, Strict(), Field(gt=0, le=MAX_EXAMPLES)]
Seconds = Annotated[float, Strict(), Field(ge=0, le=1e9)]
Loss = Annotated[float, Strict(), Field(ge=-1e30, le=1e30)]
Scaling = Annotated[float, Strict(), Field(ge=-1e9, le=1e9)]
Digest = Annotated[str, Strict(), Field(pattern=r"\A[0-9a-f]{1,128}\z")]
ContentDigest = Annotated[str, Strict(), Field(pattern=r"\A[0-9a-f]{64}\z")]
Incident = Annotated[str, Strict(), Field(pattern=r"\A[0-9a-f]{6}\z")]
Shape = Annotated[list[Annotated[int, Strict(), Field(ge=0, lt=2**40)]], Field(max_length=8)]
Names = Annotated[list[Name], Field(max_length=10**5)]
Reason = Annotated[str, Strict(), Field(max_length=1000)]
LayoutName = Annotated[str, Strict(), Field(max_length=10**5)]
"""Of a tensor in the layout of a sum: a module, a weight, or a description of statistics."""

Pair = tuple[Index, Index, Scaling]
"""B, A and their scaling."""
SentPair = tuple[Index | None, Index | None, Scaling]
"""None where the site derives the factor by itself."""


@with_config(_STRICT)
class Values(TypedDict):
    """A payload in coordinates that all clients share."""

    values: dict[TensorName, Index]


def _form(payload: object) -> str:
    return "values" if isinstance(payload, dict) and "values" in payload else "pair"


Payloads = dict[
    TensorName,
    Annotated[
        Annotated[Values, Tag("values")] | Annotated[dict[Literal[""], Pair], Field(min_length=1), Tag("pair")],
        Discriminator(_form),
    ],
]


@with_config(_STRICT)
class UpdateHead(TypedDict):
    """An update: as `fedspan.wire.protocol.put_update` describes it."""

    modules: Payloads
    dense: dict[TensorName, Index]
    moments: dict[TensorName, Index]
    num_examples: Weight


@final
@with_config(_STRICT)
class Refusal(TypedDict):
    """A site's answer that it does not answer."""

    client_id: Name | None
    """None where the site could not read its own settings."""
    code: Code
    incident: Incident


@final
@with_config(_STRICT)
class Introduction(TypedDict):
    """A site's answer to `hello`."""

    client_id: Name
    rank: Rank
    num_examples: Examples | None
    """None where only sums may be known."""
    terms: Annotated[dict[TensorName, Any], Field(max_length=1000)]
    shapes: Annotated[dict[TensorName, Shape], Field(max_length=10**5)]
    base: Digest
    labels: Digest
    holds: Annotated[list[ContentDigest], Field(max_length=MAX_HELD)]
    """The digests of tensors that it keeps."""


@with_config(_STRICT)
class MemberForm(TypedDict):
    """Common part of the introductions of several sites of a region."""

    terms: Annotated[dict[TensorName, Any], Field(max_length=1000)]
    shapes: Annotated[dict[TensorName, Shape], Field(max_length=10**5)]
    base: Digest
    labels: Digest


@with_config(_STRICT)
class RegionMember(TypedDict):
    """One site of a region, as it has introduced itself there."""

    client_id: Name
    rank: Rank
    num_examples: Examples | None
    form: Count
    """The number of its `MemberForm`."""


@final
@with_config(_STRICT)
class RegionIntroduction(TypedDict):
    """A region's answer to `hello`: the sites that are behind it now."""

    client_id: Name
    """The region's name."""
    members: Annotated[list[RegionMember], Field(max_length=10**4)]
    forms: Annotated[list[MemberForm], Field(max_length=100)]


@with_config(_STRICT)
class RelayedHead(TypedDict):
    """The clients whose parts are in the sum of a region, and those whose parts are not."""

    answers: dict[Name, tuple[Seconds, Bytes]]
    """Its seconds at work, and the bytes of its optimizer."""
    problems: dict[Name, tuple[Reason, Flag]]
    """The reason, and whether no answer came at all."""


@final
@with_config(_STRICT)
class SiteAnswer(TypedDict):
    """A site's answer to any other message: where it belongs, and the fields that this kind of answer has."""

    client_id: Name
    run: Name
    round: Count
    number: Count
    lacks: NotRequired[Annotated[list[ContentDigest], Field(min_length=1, max_length=10**5)]]
    """The message counts on tensors of these digests, which it does not hold: it wants to be asked again."""
    stored: NotRequired[Flag]
    """It holds every tensor now that it was asked to keep."""
    gone: NotRequired[Annotated[list[ContentDigest], Field(max_length=MAX_HELD)]]
    """Of tensors that it had to let go of since its last answer."""
    seconds: NotRequired[Seconds]
    optimizer_bytes: NotRequired[Bytes]
    train_loss: NotRequired[Loss | None]
    update: NotRequired[UpdateHead]
    words: NotRequired[Index]
    """The vector of a sum."""
    keys: NotRequired[Index]
    shares: NotRequired[dict[Name, Index]]
    false: NotRequired[Names]
    """The clients whose shares for this site are false."""
    signature: NotRequired[Index]
    """Of the list of survivors."""
    unmask: NotRequired[Index]
    statistics: NotRequired[Index]
    """Of the client's held-out rows: float64 numbers as the whole numbers of their bits."""
    relayed: NotRequired[RelayedHead]
    """A region's: who is in the vector, which is absent where the region has none."""


@with_config(_STRICT)
class Hello(TypedDict):
    """The server's greeting."""

    kind: Literal["hello"]


@with_config(_STRICT)
class GaloreHead(TypedDict):
    """`fedspan.methods.messages.GaloreOptions`."""

    rank: Rank
    update_gap: Annotated[int, Strict(), Field(ge=1, lt=2**31)]
    scale: Annotated[float, Strict(), Field(gt=0, le=1e6)]
    svd: Literal["exact", "randomized", "power"]
    side: Literal["auto", "left", "right"]
    on_refresh: Literal["keep", "project", "reset"]


@with_config(_STRICT)
class RecipeHead(TypedDict):
    """`fedspan.methods.messages.Recipe`."""

    train_a: Flag
    train_b: Flag
    galore: GaloreHead | None
    tail_penalty: tuple[Annotated[float, Strict(), Field(ge=0, le=1e6)], Count] | None
    proximal: Annotated[float, Strict(), Field(ge=0, le=1e6)]
    confined: Flag
    heads: Annotated[int, Strict(), Field(ge=0, le=MAX_RANK)]
    carries_moments: Flag
    corrected: Flag
    drifts: Flag
    gradient: Flag
    probe_batches: Annotated[int, Strict(), Field(ge=1, le=10**5)]
    align: Literal["a", "b"] | None


@with_config(_STRICT)
class BroadcastHead(TypedDict):
    """A broadcast: as `fedspan.wire.protocol.put_broadcast` describes it."""

    recipe: RecipeHead
    seeded: list[TensorName]
    adapter: dict[TensorName, SentPair]
    dense: dict[TensorName, Index | None]
    correction: dict[TensorName, Index]
    moments: dict[TensorName, Index]
    subspaces: dict[TensorName, tuple[Index | None, Literal["left", "right"]]]


@with_config(_STRICT)
class PatchHead(TypedDict):
    """The new part of a patch: as `fedspan.wire.protocol.put_patch` describes it."""

    whole: Flag
    seen: Count
    version: Count
    news: Annotated[
        list[dict[TensorName, Annotated[list[Index], Field(min_length=1, max_length=2)]]], Field(max_length=10**4)
    ]


@with_config(_STRICT)
class PreviousHead(TypedDict):
    """The parts that a site completes tensors of a broadcast from: see `fedspan.methods.base.Method.complete`."""

    broadcast: BroadcastHead
    news: Annotated[
        list[dict[TensorName, Annotated[list[Index], Field(min_length=1, max_length=2)]]], Field(max_length=10**4)
    ]


@with_config(_STRICT)
class SumHead(TypedDict):
    """The sum that an answer is to be part of."""

    rank: Rank
    """The largest of the clients that were asked: the layout of the sum follows from it."""
    num_clients: NotRequired[Annotated[int, Strict(), Field(ge=1, lt=2**31)]]
    """For how many clients a sum in the open leaves room."""
    session: NotRequired[Name]
    index: NotRequired[Count]
    members: NotRequired[Names]
    """The clients of the masks."""


class _Placed(TypedDict):
    """The fields that place a message in a run."""

    run: Name
    round: Count
    number: Count
    place: tuple[Count, Count]
    keep: Flag
    terms: Digest
    base: Digest
    rank: Rank
    num_clients: Count


class _WithBroadcast(_Placed):
    """The fields of a message that carries a broadcast."""

    counted: Count
    broadcast: BroadcastHead
    patch: PatchHead
    held: Annotated[list[tuple[Index, ContentDigest]], Field(max_length=10**5)]
    """(index, digest) of the tensors that the site has, and that are empty in this message."""
    store: Annotated[list[Index], Field(max_length=10**5)]
    """Tensors to keep, since they may be named by their digests later."""
    previous: NotRequired[PreviousHead]
    sum: NotRequired[SumHead]


@with_config(_STRICT)
class Ask(_WithBroadcast):
    """A question for an update, or for a part of a sum."""

    kind: Literal["ask"]


@with_config(_STRICT)
class Evaluate(_WithBroadcast):
    """A question for the statistics of a model on a client's held-out rows, or for a part of their sum.

    Its round is the number of finished rounds, and its number that after the last of the method's exchanges."""

    kind: Literal["evaluate"]
    whole: Flag
    """On all of them, not only as many as `evaluation.max_examples` says."""


@with_config(_STRICT)
class Advertise(_Placed):
    """A question for the keys of several sums."""

    kind: Literal["advertise"]
    counted: Count
    session: Name
    num_sums: Annotated[int, Strict(), Field(ge=1, le=10**4)]


@with_config(_STRICT)
class Share(_Placed):
    """The keys of all clients, and a question for sealed shares."""

    kind: Literal["share"]
    counted: Count
    session: Name
    keys: dict[Name, Index]
    threshold: Count


@with_config(_STRICT)
class Receive(_Placed):
    """The others' sealed shares for a site, and a question which of them are false."""

    kind: Literal["receive"]
    counted: Count
    session: Name
    shares: dict[Name, Index]


@with_config(_STRICT)
class Proof(TypedDict):
    """The proof that a client has dealt false shares: see `fedspan.privacy.participant.Participant.convicts`."""

    commitments: dict[Name, Index]
    signature: Index
    shares: dict[Name, Index]


@with_config(_STRICT)
class Convict(_Placed):
    """Proofs of false shares, by the client that dealt them."""

    kind: Literal["convict"]
    session: Name
    index: Count
    proofs: dict[Name, Proof]


@with_config(_STRICT)
class Sign(_Placed):
    """The clients whose vectors are in a sum, and a question for a signature of their list."""

    kind: Literal["sign"]
    session: Name
    index: Count
    survivors: Names


@with_config(_STRICT)
class Unmask(_Placed):
    """The clients whose vectors are in a sum, and a question for the shares that unmask it."""

    kind: Literal["unmask"]
    session: Name
    index: Count
    survivors: Names
    signatures: NotRequired[dict[Name, Index]]
    """Of the list, by survivor; where the server may be malicious."""


@with_config(_STRICT)
class LayoutHead(TypedDict):
    """`fedspan.privacy.sum_layout.SumLayout`, its names in their order."""

    dense: dict[LayoutName, Shape]
    modules: dict[LayoutName, dict[LayoutName, Shape]]


@with_config(_STRICT)
class Relay(_Placed):
    """A question to a region: the messages for its sites, without what the region itself knows, and their sum."""

    kind: Literal["relay"]
    messages: Annotated[list[Index], Field(min_length=1, max_length=10**4)]
    """Whole messages of kind `ask` or `evaluate`, as bytes."""
    clients: Annotated[dict[Name, tuple[Count, Count]], Field(min_length=1, max_length=10**4)]
    """The number of a client's message, and `counted` of its own."""
    weights: Annotated[dict[Name, Annotated[float, Strict(), Field(gt=0, le=MAX_EXAMPLES)]], Field(max_length=10**4)]
    """The weights of those clients that the server above knows."""
    largest: Rank
    """The largest rank of the clients that are asked in all regions, whose layout the sum has."""
    layout: LayoutHead
    room: Annotated[int, Strict(), Field(ge=1, lt=2**31)]
    """Number of clients that are asked in all regions: each leaves room for as many, so that no sum of sums wraps."""


_QUESTIONS: Mapping[str, TypeAdapter[Any]] = {
    "hello": TypeAdapter(Hello),
    "ask": TypeAdapter(Ask),
    "evaluate": TypeAdapter(Evaluate),
    "advertise": TypeAdapter(Advertise),
    "share": TypeAdapter(Share),
    "receive": TypeAdapter(Receive),
    "convict": TypeAdapter(Convict),
    "sign": TypeAdapter(Sign),
    "unmask": TypeAdapter(Unmask),
    "relay": TypeAdapter(Relay),
}
_INTRODUCTION: TypeAdapter[Introduction] = TypeAdapter(Introduction)
_REGION: TypeAdapter[RegionIntroduction] = TypeAdapter(RegionIntroduction)
_ANSWER: TypeAdapter[SiteAnswer] = TypeAdapter(SiteAnswer)
_REFUSAL: TypeAdapter[Refusal] = TypeAdapter(Refusal)


def question(head: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the kind of a server's message, and the message.

    Raises
    ------
    Malformed
        When the kind is unknown, or a field is missing, unknown, or not of its type.
    """
    kind = head.get("kind")
    if not isinstance(kind, str) or kind not in _QUESTIONS:
        raise Malformed(f"a message of kind {_shown(kind)}: expected one of {', '.join(_QUESTIONS)}")
    message: dict[str, Any] = _checked(_QUESTIONS[kind], head)
    return kind, message


def introduction(head: Mapping[str, Any]) -> Introduction | Refusal:
    """Return a site's answer to a greeting; a `Malformed` where a field is missing, unknown, or not of its type."""
    return _checked(_REFUSAL, head) if "code" in head else _checked(_INTRODUCTION, head)


def region_introduction(head: Mapping[str, Any]) -> RegionIntroduction:
    """Return a region's answer to a greeting; a `Malformed` as of `introduction`."""
    return _checked(_REGION, head)


def answer(head: Mapping[str, Any]) -> SiteAnswer | Refusal:
    """Return a site's answer to any other message; a `Malformed` as of `introduction`."""
    return _checked(_REFUSAL, head) if "code" in head else _checked(_ANSWER, head)


def _checked(form: TypeAdapter[T], head: Mapping[str, Any]) -> T:
    try:
        return form.validate_python(head)
    except ValidationError as error:
        if error.error_count() > _MANY:
            raise Malformed(f"a message with {error.error_count()} wrong fields") from None
        first = error.errors(include_url=False, include_context=False)[0]
        place = one_line(".".join(map(str, first["loc"])), 2 * _SHOWN)
        if first["type"] == "missing":
            raise Malformed(f"a message that lacks {place}") from None
        reason = f"{place} = {_shown(first['input'])}: {first['msg'].removeprefix('Input ')}"
        raise Malformed(f"a message with {reason}") from None


def _shown(value: object) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, dict | list) else one_line(repr(value), _SHOWN)
