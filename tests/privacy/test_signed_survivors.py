"""A server that lies about keys, rosters, thresholds and survivors: each attack succeeds where the sites take it for a
curious one, and none of them where `malicious_server` is set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

pytest.importorskip("cryptography")

from fedspan.privacy import primitives
from fedspan.privacy.consistency import Inconsistent, check_malicious_threshold, most_colluders
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.primitives import SECRET, Ed25519PrivateKey
from fedspan.privacy.roster import Roster
from fedspan.privacy.secure_sum import Aggregator, Participant
from fedspan.support.errors import FedspanError

SESSION = b"run/round 3/exchange 0"
NAMES = tuple("abcdefghijklm")
Lists = Mapping[str, Sequence[str]]
"""The survivors that each client is told."""


@dataclass
class Lying:
    """Honest clients that have masked their vectors for a server that does what it likes from there on."""

    num_clients: int
    threshold: int
    malicious: bool
    session: bytes = SESSION
    identities: Mapping[str, Ed25519PrivateKey] = field(default_factory=dict)
    told_members: Mapping[str, Sequence[str]] = field(default_factory=dict)
    told_terms: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = NAMES[: self.num_clients]
        random = np.random.default_rng(self.num_clients)
        self.values: dict[str, Words] = {n: random.integers(0, 2**64, 4, np.uint64) for n in self.names}
        self.identities = self.identities or {name: Ed25519PrivateKey.generate() for name in self.names}
        self.trusted = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        self.clients = {
            n: Participant(self.session, n, None, self.identities[n], self.trusted, self.malicious) for n in self.names
        }
        adverts = {name: one.advertise() for name, one in self.clients.items()}
        self.server = Aggregator(self.session, self.threshold, 4, self.trusted)
        keys = self.server.keys(adverts)
        self.roster = Roster.read(self.session, adverts, self.threshold, self.trusted)
        handed = self.server.route({name: one.share(keys, self.threshold) for name, one in self.clients.items()})
        for name, one in self.clients.items():
            one.receive(handed[name])
            one.settle(self.told_members.get(name, self.names))
        self.server.settle(dict.fromkeys(self.names, ()))
        self.masked = {n: c.mask(self.values[n], terms=self.told_terms.get(n, b"")) for n, c in self.clients.items()}
        self.binding = self.roster.binding(b"", self.names)

    def sign(self, lists: Lists) -> dict[str, bytes]:
        return {name: self.clients[name].sign_survivors(told) for name, told in lists.items()}

    def shares(self, lists: Lists, colluders: Collection[str] = ()) -> dict[str, dict[str, bytes]]:
        """Return holder -> client -> the share that it reveals, with the best that the server can do for signatures:
        each client is shown those of all that were told the same list."""
        if self.malicious:
            signed = self.sign({n: told for n, told in lists.items() if n not in colluders})
            for name, told in lists.items():
                if name in colluders:
                    continue
                same = {n: s for n, s in signed.items() if list(lists[n]) == list(told)}
                for colluder in colluders:
                    content = _statement(self, colluder, told)
                    same |= {colluder: self.identities[colluder].sign(content)}
                self.clients[name].accept_survivors(told, same)
        answers = {n: self.clients[n].unmask(told) for n, told in lists.items() if n not in colluders}
        return {
            n: {u: content[SECRET * i : SECRET * (i + 1)] for i, u in enumerate(self.names, 1)}
            for n, content in answers.items()
        }

    def secret(self, client: str, shares: Mapping[str, bytes]) -> bytes:
        """Return a client's secret from any t shares of it, by holder."""
        chosen = sorted(shares)[: self.threshold]
        return primitives.combine({self.roster.share_index(v): shares[v] for v in chosen})

    def sum_of(self, kept: Sequence[str], lists: Lists) -> Words:
        """Return Σ of the vectors of `kept`: seeds of those, private keys of all others, each from t clients that were
        told what it takes."""
        shares = self.shares(lists)
        secrets = {
            u: self.secret(u, {v: s[u] for v, s in shares.items() if (u in lists[v]) == (u in kept)})
            for u in self.names
        }
        assert all(self.roster.fits(u, secret, u in kept) for u, secret in secrets.items())
        total = np.zeros(4, np.uint64)
        plus: list[bytes] = []
        minus = [self.roster.self_mask_key(secrets[u], u, self.binding) for u in kept]
        for u in kept:
            total = total + self.masked[u]
        for gone in sorted(set(self.names) - set(kept)):
            for u in kept:
                key = self.roster.pair_mask_key(secrets[gone], gone, u, self.binding)
                (minus if u < gone else plus).append(key)
        primitives.add_masks(total, plus, minus)
        return total


def _statement(fed: Lying, client_id: str, survivors: Sequence[str]) -> bytes:
    from fedspan.privacy.consistency import statement

    return statement(fed.roster, client_id, fed.binding, sorted(survivors))


def lists_for(names: Sequence[str], threshold: int, gone: Sequence[str]) -> dict[str, list[str]]:
    """Return for each client a list of at least t survivors with itself, so that t clients call each of `gone` lost."""
    room = {name: len(names) - threshold for name in names}
    left: dict[str, set[str]] = {name: set() for name in names}
    for u in gone:
        for v in sorted((v for v in names if v != u), key=lambda v: -room[v])[:threshold]:
            room[v] -= 1
            left[v].add(u)
    assert min(room.values()) >= 0
    return {name: [u for u in names if u not in left[name]] for name in names}


SPLITS = [(5, 3, 2), (10, 7, 6)]
"""n, t, and the number of clients in the sum that the server gets."""


@pytest.mark.parametrize(("n", "t", "kept"), SPLITS)
def test_by_other_survivors_for_each_site_the_server_reads_a_sum_of_fewer_than_the_threshold(
    n: int, t: int, kept: int
) -> None:
    """With nobody's help: of five honest sites with the default threshold it gets the sum of two."""
    fed = Lying(n, t, malicious=False)
    who = fed.names[:kept]
    lists = lists_for(fed.names, t, fed.names[kept:])
    assert kept < t <= min(map(len, lists.values()))
    expected = sum((fed.values[name] for name in who), np.zeros(4, np.uint64))
    assert np.array_equal(fed.sum_of(who, lists), expected)


@pytest.mark.parametrize(("n", "t", "kept"), [(10, 7, 6), (13, 9, 8)])
def test_with_signed_survivors_it_reads_nothing_by_other_survivors(n: int, t: int, kept: int) -> None:
    fed = Lying(n, t, malicious=True)
    with pytest.raises(Inconsistent, match=rf"signatures of the list of survivors: expected at least {t}"):
        fed.sum_of(fed.names[:kept], lists_for(fed.names, t, fed.names[kept:]))
    with pytest.raises(FedspanError, match="was shown no signatures"):
        fed.clients["a"].unmask(lists_for(fed.names, t, fed.names[kept:])["a"])


def halves(fed: Lying, victim: str, colluder: str) -> dict[str, list[str]]:
    """Tell half of the honest sites that the victim stayed, and half that it left."""
    honest = [name for name in fed.names if name not in (victim, colluder)]
    half = fed.threshold - 2  # beside the victim and the colluder
    stayed, left = [victim, *honest[:half]], honest[half:]
    everyone = list(fed.names)
    return dict.fromkeys(stayed, everyone) | {name: [u for u in everyone if u != victim] for name in left}


def test_with_one_accomplice_the_server_reads_both_secrets_of_a_site() -> None:
    """t = 3 of n = 5, c = 1: 2t = n + c. The self-mask and the pair masks of one site are gone: its vector is bare."""
    fed = Lying(5, 3, malicious=False)
    victim, colluder = "a", "e"
    lists = halves(fed, victim, colluder)
    own = fed.clients[colluder]._held[victim]  # what an accomplice gives away
    shares = fed.shares(lists, [colluder])
    seeds = {v: s[victim] for v, s in shares.items() if victim in lists[v]} | {colluder: own[:SECRET]}
    privates = {v: s[victim] for v, s in shares.items() if victim not in lists[v]} | {colluder: own[SECRET:]}
    seed, private = fed.secret(victim, seeds), fed.secret(victim, privates)
    others = [name for name in fed.names if name != victim]
    keys = [fed.roster.pair_mask_key(private, victim, other, fed.binding) for other in others]
    bare = fed.masked[victim].copy()
    primitives.add_masks(bare, [], [fed.roster.self_mask_key(seed, victim, fed.binding), *keys])
    assert np.array_equal(bare, fed.values[victim])


def test_with_signed_survivors_an_accomplice_that_signs_everything_is_not_enough() -> None:
    """t = 4 of n = 5, c = 1: two lists of survivors would need six honest signatures of four honest sites."""
    fed = Lying(5, 4, malicious=True)
    assert most_colluders(4, 5) == 2
    with pytest.raises(Inconsistent, match="3 signatures of the list of survivors: expected at least 4"):
        fed.shares({**halves(fed, "a", "e"), "c": list("bcde")}, ["e"])
    for name in "abcd":
        with pytest.raises(FedspanError, match=r"signed other survivors|was shown no signatures"):
            fed.clients[name].unmask(list("bcde") if name != "a" else list("abcd"))


def test_a_site_signs_one_list_of_a_sum() -> None:
    fed = Lying(5, 4, malicious=True)
    fed.clients["a"].sign_survivors(fed.names)
    fed.clients["a"].sign_survivors(fed.names[::-1])
    with pytest.raises(Inconsistent, match="has signed other survivors of this sum"):
        fed.clients["a"].sign_survivors("abcd")


def other_sum(fed: Lying, session: bytes = SESSION) -> dict[str, bytes]:
    """Genuine signatures of the same sites of the same list, in another sum."""
    other = Lying(fed.num_clients, fed.threshold, True, session, fed.identities)
    return other.sign(dict.fromkeys(other.names, other.names))


FORGERIES: dict[str, Callable[[Lying, dict[str, bytes]], dict[str, bytes]]] = {
    "one is missing below the threshold": lambda fed, s: {n: s[n] for n in "abc"},
    "one of no one's": lambda fed, s: {**s, "b": bytes(64)},
    "one of no bytes": lambda fed, s: {**s, "b": b""},
    "one site's in another's name": lambda fed, s: {**s, "b": s["c"]},
    "of a stranger": lambda fed, s: {**{n: s[n] for n in "abc"}, "mallory": s["d"]},
    "of another round": lambda fed, s: other_sum(fed, b"run/round 4/exchange 0"),
    "of another run": lambda fed, s: other_sum(fed, b"another run/round 3/exchange 0"),
    "of the same sum in another set-up": lambda fed, s: other_sum(fed),
    "by a key of the server's": lambda fed, s: {
        **s,
        "b": Ed25519PrivateKey.generate().sign(_statement(fed, "b", fed.names)),
    },
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_and_replayed_signatures_are_no_reason_to_unmask(forgery: str) -> None:
    fed = Lying(5, 4, malicious=True)
    signed = fed.sign(dict.fromkeys(fed.names, fed.names))
    with pytest.raises(Inconsistent):
        fed.clients["a"].accept_survivors(fed.names, FORGERIES[forgery](fed, signed))
    with pytest.raises(Inconsistent, match="was shown no signatures"):
        fed.clients["a"].unmask(fed.names)
    fed.clients["a"].accept_survivors(fed.names, {n: signed[n] for n in "abcd"})  # one may be lost
    assert len(fed.clients["a"].unmask(fed.names)) == SECRET * 6


@pytest.mark.parametrize("lie", ["members", "terms"])
def test_sites_that_were_told_other_members_or_terms_reveal_nothing(lie: str) -> None:
    """A curious server's sites help to unmask what is noise by then; these do not even that."""
    members = dict.fromkeys("ab", "abcd") if lie == "members" else {}
    terms = dict.fromkeys("ab", b"x") if lie == "terms" else {}
    curious = Lying(5, 4, malicious=False, told_members=members, told_terms=terms)
    survivors = list("abcd")
    answers = {n: curious.clients[n].unmask(survivors) for n in survivors}
    assert len(answers) == 4
    fed = Lying(5, 4, malicious=True, told_members=members, told_terms=terms)
    signed = fed.sign(dict.fromkeys(survivors, survivors))
    for name in survivors:
        with pytest.raises(Inconsistent, match="has not signed the survivors"):
            fed.clients[name].accept_survivors(survivors, signed)


def test_sites_without_identities_are_read_through_keys_of_the_servers_own() -> None:
    """The server plays all the others to one site, and subtracts what it has put in their place. A site that expects a
    malicious server takes part in nothing without identities."""
    session, value = SESSION, np.arange(4, dtype=np.uint64)
    site, played = Participant(session, "a"), {name: Participant(session, name) for name in "bcde"}
    everyone = {"a": site, **played}
    server = Aggregator(session, 3, 4)
    keys = server.keys({name: one.advertise() for name, one in everyone.items()})
    handed = server.route({name: one.share(keys, 3) for name, one in everyone.items()})
    for name, one in everyone.items():
        server.add(name, one.mask(value if name == "a" else np.zeros(4, np.uint64), handed[name]))
    survivors = server.survivors()
    assert np.array_equal(server.total({n: one.unmask(survivors) for n, one in everyone.items()}), value)
    with pytest.raises(FedspanError, match="'a' has no identity to sign with"):
        Participant(session, "a", malicious_server=True)


def test_sites_that_were_told_other_rosters_cannot_open_each_others_shares() -> None:
    """Four signed keys for a and b, five for the others: either half is too small for a threshold of its own."""
    identities = {name: Ed25519PrivateKey.generate() for name in NAMES[:5]}
    trusted = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    clients = {n: Participant(SESSION, n, None, key, trusted, True) for n, key in identities.items()}
    adverts = {name: one.advertise() for name, one in clients.items()}
    few = {name: adverts[name] for name in "abcd"}
    sent = {name: one.share(few if name in "ab" else adverts, 4) for name, one in clients.items()}
    false = clients["a"].receive({name: sent[name]["a"] for name in "bcd"})
    assert false == ["c", "d"]


@pytest.mark.parametrize(
    ("threshold", "num_clients", "good"), [(4, 6, False), (5, 6, True), (3, 4, True), (2, 3, False)]
)
def test_the_threshold_is_more_than_two_thirds_at_the_site(threshold: int, num_clients: int, good: bool) -> None:
    """A server may name any: the sites count. So many may collude as the proof allows, and no more."""
    if good:
        check_malicious_threshold(threshold, num_clients)
        worst = most_colluders(threshold, num_clients)
        assert 2 * threshold > num_clients + worst >= 2 * threshold - 1
        assert worst + 1 >= num_clients / 3
        return
    identities = {name: Ed25519PrivateKey.generate() for name in NAMES[:num_clients]}
    trusted = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    clients = {n: Participant(SESSION, n, None, key, trusted, True) for n, key in identities.items()}
    keys = {name: one.advertise() for name, one in clients.items()}
    with pytest.raises(FedspanError, match="expected more than two thirds of them against a malicious server"):
        clients["a"].share(keys, threshold)


@pytest.mark.parametrize(("n", "t", "lost"), [(4, 3, ""), (4, 3, "d"), (5, 4, "c"), (7, 5, "bg")])
def test_an_honest_sum_is_as_it_was(n: int, t: int, lost: str) -> None:
    """With drop-outs before the vectors; another site signs and does not help any more."""
    fed = Lying(n, t, malicious=True)
    stayed = [name for name in fed.names if name not in lost]
    for name in stayed:
        fed.server.add(name, fed.masked[name])
    survivors = fed.server.survivors()
    signed = fed.sign(dict.fromkeys(survivors, survivors))
    for name, signature in signed.items():
        fed.server.check_signature(name, signature)
    with pytest.raises(Inconsistent):
        fed.server.check_signature(survivors[0], signed[survivors[1]])
    shown = dict(sorted(signed.items())[:t])
    answers = {}
    for name in survivors[:t]:
        fed.clients[name].accept_survivors(survivors, shown)
        answers[name] = fed.clients[name].unmask(survivors)
    expected = sum((fed.values[name] for name in stayed), np.zeros(4, np.uint64))
    assert np.array_equal(fed.server.total(answers), expected)
