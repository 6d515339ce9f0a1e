"""Secure sums with a server, a network or clients that lie: nothing false is used, and whoever lied is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from honest_sums import NAMES, SESSION, Run, plain

from fedspan.privacy import primitives
from fedspan.privacy.roster import AdvertisedKeys, commitment
from fedspan.privacy.secure_sum import (
    Participant,
    SumFailed,
)


def impostor(run: Run, name: str, key: Ed25519PrivateKey | None, trusted: dict[str, bytes] | None) -> bytes:
    return Participant(run.session, name, run.num_words, key, trusted).advertise()


@pytest.mark.parametrize("signed_by", ["nobody", "another identity", "another session", "another client"])
def test_a_swapped_key_is_refused_where_keys_are_signed(signed_by: str) -> None:
    run = Run(signed=True)
    keys = {name: one.advertise() for name, one in run.clients.items()}
    other = Ed25519PrivateKey.generate()
    if signed_by == "nobody":
        keys["cadiz"] = impostor(run, "cadiz", None, None)
    elif signed_by == "another identity":
        keys["cadiz"] = impostor(run, "cadiz", other, run.trusted)
    else:
        wrong_session, wrong_name = (b"another", "cadiz") if signed_by == "another session" else (run.session, "delft")
        mine = run.identities["cadiz"]
        genuine = Participant(wrong_session, wrong_name, signer=mine, trusted=run.trusted).advertise()
        keys["cadiz"] = keys["cadiz"][:32] + genuine[32:]  # with the beginning that this sum expects
    for check in (lambda: run.clients["amiens"].share(keys, 3), lambda: run.server.keys(keys)):
        with pytest.raises(ValueError, match="keys of 'cadiz' are not signed by the identity"):
            check()


def test_honest_signed_keys_make_a_sum_and_strangers_have_no_part_in_it() -> None:
    run = Run(signed=True)
    assert np.array_equal(run.server.total(run.answers(lost=("delft",))), plain({n: run.values[n] for n in NAMES[:3]}))
    run = Run(signed=True)
    keys = {name: one.advertise() for name, one in run.clients.items()} | {"oslo": impostor(run, "oslo", None, None)}
    with pytest.raises(ValueError, match="'oslo' takes part, but no identity key is known"):
        run.clients["amiens"].share(keys, 3)


def test_without_signatures_a_client_still_knows_its_own_keys() -> None:
    run = Run()
    keys = run.keys() | {"amiens": impostor(run, "amiens", None, None)}
    with pytest.raises(ValueError, match="keys of 'amiens' is not what it advertised"):
        run.clients["amiens"].share(keys, 3)
    with pytest.raises(ValueError, match="signer and trusted go together"):
        Participant(SESSION, "amiens", signer=Ed25519PrivateKey.generate())


def test_clients_that_were_told_different_rosters_or_thresholds_cannot_read_each_other() -> None:
    for change in ("roster", "threshold"):
        run = Run(5, 3)
        keys = run.keys()
        received = {name: (dict(keys), 3) for name in run.names}
        received["amiens"] = ({n: k for n, k in keys.items() if n != "evora"}, 3) if change == "roster" else (keys, 4)
        sent = {name: one.share(*received[name]) for name, one in run.clients.items()}
        assert "amiens" in run.clients["basel"].receive({n: sent[n]["basel"] for n in run.names if n != "basel"})
        pair = set()  # nor do the masks that the two share cancel
        for name, other in (("amiens", "basel"), ("basel", "amiens")):
            roster = run.clients[name]._sharing()
            pair.add(roster.pair_mask_key(run.clients[name]._private, name, other, roster.binding(b"", NAMES[:4])))
        assert len(pair) == 2


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "first bit": lambda x: bytes([x[0] ^ 1]) + x[1:],
    "last bit": lambda x: x[:-1] + bytes([x[-1] ^ 1]),
    "middle": lambda x: x[: len(x) // 2] + bytes([x[len(x) // 2] ^ 16]) + x[len(x) // 2 + 1 :],
    "truncated": lambda x: x[:-1],
    "longer": lambda x: x + b"\0",
    "empty": lambda x: b"",
}


@pytest.mark.parametrize("change", CHANGES)
def test_tampered_shares_are_named_and_not_used(change: str) -> None:
    """The sum is that of all four: three others hold the shares of basel's seed."""
    run = Run()
    handed = run.handed()
    false = {name: one.receive(handed[name]) for name, one in run.clients.items() if name != "amiens"}
    false["amiens"] = run.clients["amiens"].receive(
        handed["amiens"] | {"basel": CHANGES[change](handed["amiens"]["basel"])}
    )
    assert false == {"amiens": ["basel"], "basel": [], "cadiz": [], "delft": []}
    assert run.server.settle(false) == {}
    for name, one in run.clients.items():
        run.server.add(name, one.mask(run.values[name]))
    answers = {name: one.unmask(run.names) for name, one in run.clients.items()}
    assert answers["amiens"][64:96] == bytes(32)
    assert np.array_equal(run.server.total(answers), plain(run.values))
    assert run.server.liars == {}


def test_shares_of_another_session_sender_or_recipient_are_refused() -> None:
    run, other = Run(), Run(session=b"run 7/round 3/exchange 1")
    # The very same keys in both sessions: what tells them apart is the session alone.
    for name, one in other.clients.items():
        one._channel = run.clients[name]._channel
        keys = primitives.public_key(one._channel), primitives.public_key(one._private)
        one._advert = AdvertisedKeys(*keys, commitment(other.session, name, one._seed)).sign(other.session, name, None)
    handed, replayed = run.handed(), other.handed()
    roster = run.clients["amiens"]._sharing()
    for wrong in (replayed["amiens"]["basel"], handed["amiens"]["cadiz"], handed["basel"]["amiens"]):
        assert run.clients["amiens"]._opened(roster, "basel", wrong) is None
    assert run.clients["amiens"]._opened(roster, "basel", handed["amiens"]["basel"]) is not None
    with pytest.raises(ValueError, match="expected some of the others"):
        run.clients["amiens"].receive(handed["amiens"] | {"amiens": handed["amiens"]["basel"]})
    with pytest.raises(ValueError, match="shares from 1 others: expected at least 2"):
        run.clients["amiens"].receive({"basel": handed["amiens"]["basel"]})


def test_keys_of_another_session_or_shape_are_refused() -> None:
    run, other = Run(), Run(session=b"another")
    keys = {name: one.advertise() for name, one in run.clients.items()}
    wrong = {
        "replayed": other.clients["basel"].advertise(),
        "another client's": keys["cadiz"],
        **{name: change(keys["basel"]) for name, change in CHANGES.items() if name not in ("last bit", "middle")},
    }
    for content in wrong.values():
        for check in (run.server.keys, lambda adverts: run.server.check_advert("basel", adverts["basel"])):
            with pytest.raises(ValueError, match=r"the (advert|keys) of 'basel'"):
                check(keys | {"basel": content})
    copied = keys["basel"][:32] + keys["cadiz"][32:]
    with pytest.raises(ValueError, match="two of the advertised keys are the same"):
        run.server.keys(keys | {"basel": copied})
    low_order = keys["basel"][:32] + bytes(32) + keys["basel"][64:]
    with pytest.raises(ValueError, match="not a usable public key"):
        run.clients["amiens"].share(keys | {"basel": low_order}, 3)
    assert run.keys() == keys  # the server goes on with the good ones


@pytest.mark.parametrize("change", CHANGES)
def test_tampered_answers_never_make_a_wrong_sum(change: str) -> None:
    run = Run(4, 3)
    answers = run.answers(lost=("delft",))
    with pytest.raises(ValueError, match=r"answer of 'basel'|2 true shares of '.*' came, 3 were needed"):
        run.server.total(answers | {"basel": CHANGES[change](answers["basel"])})
    assert np.array_equal(run.server.total(answers), plain({n: run.values[n] for n in NAMES[:3]}))


@pytest.mark.parametrize("place", [1, 4])
def test_a_wrong_share_of_either_secret_is_noticed_and_its_holder_named(place: int) -> None:
    """Of the seed of one who stayed (amiens), and of the private key of one who left (delft)."""
    run = Run(4, 3)
    answers = run.answers(lost=("delft",))
    wrong = bytearray(answers["cadiz"])
    wrong[32 * place + 9] ^= 4
    name = "amiens" if place == 1 else "delft"
    with pytest.raises(SumFailed, match=f"2 true shares of '{name}' came, 3 were needed"):
        run.server.total(answers | {"cadiz": bytes(wrong)})
    assert run.server.liars == {"cadiz": name}


def test_answers_of_others_and_of_other_sums_are_refused() -> None:
    run, other = Run(), Run(session=b"another")
    answers, replayed = run.answers(lost=("delft",)), other.answers(lost=("delft",))
    cases = {
        "answer of 'basel' is of another sum": {"basel": replayed["basel"]},
        "answer of 'basel' is of another sum, or": {"basel": answers["cadiz"]},
        "an answer from 'delft'": {"delft": answers["basel"]},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            run.server.total(answers | wrong)
        with pytest.raises(ValueError, match=message):
            run.server.check_answer(*next(iter(wrong.items())))
    with pytest.raises(SumFailed, match="2 clients helped to unmask, 3 were needed"):
        run.server.total({name: answers[name] for name in ("amiens", "basel")})
    run.server.total(answers)
    with pytest.raises(ValueError, match="unmasked already"):
        run.server.total(answers)


def test_the_server_checks_what_it_routes_and_adds() -> None:
    run = Run()
    sent = run.sent()
    short = {to: share[:-1] for to, share in sent["basel"].items()}
    fewer = {to: share for to, share in sent["basel"].items() if to != "delft"}
    for wrong in ({"basel": short}, {"basel": fewer}, {"oslo": sent["basel"]}):
        with pytest.raises(ValueError, match=r"shares from '(basel|oslo)': expected"):
            run.server.route(sent | wrong)
    with pytest.raises(SumFailed, match="2 clients shared their secrets, 3 were needed"):
        run.server.route({name: sent[name] for name in ("amiens", "basel")})
    handed = run.server.route({name: sent[name] for name in NAMES[:3]})
    masked = run.clients["amiens"].mask(run.values["amiens"], handed["amiens"])
    for wrong_vector in (masked[:-1], masked.view(np.int64), masked.reshape(1, -1)):
        with pytest.raises(ValueError, match="vector of 'amiens' is"):
            run.server.add("amiens", wrong_vector)
    run.server.add("amiens", masked)
    with pytest.raises(ValueError, match="a second vector from 'amiens'"):
        run.server.add("amiens", masked)
    with pytest.raises(ValueError, match="a vector from 'delft': expected one of"):
        run.server.add("delft", masked)


@pytest.mark.parametrize("vector", [np.zeros(4, np.uint64), np.zeros(5), np.zeros(5, np.int64), np.zeros((5, 1), "u8")])
def test_a_client_masks_only_the_vector_that_was_agreed(vector: np.ndarray) -> None:
    run = Run()
    handed = run.handed()["amiens"]
    with pytest.raises(ValueError, match="expected uint64 of 5 words"):
        run.clients["amiens"].mask(vector, handed)
