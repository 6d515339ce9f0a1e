"""Sites that lie in secure sums: the lie is blamed on the right one, and the others have their sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signed import Signed, changed, settings, without

from fedspan.config import Config
from fedspan.privacy import primitives
from fedspan.privacy.participant import Participant
from fedspan.wire import protocol

LIAR = "client-2"
NODE = "node-2"


def in_the_clear(config: Config) -> Config:
    return config.model_copy(
        update={"privacy": config.privacy.model_copy(update={"secure_sums": False, "fixed_point": True})}
    )


def everyone(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    fed = Signed(in_the_clear(config), folder)
    fed.serve()
    return fed.state()


# Keys


def copied(fed: Signed) -> Callable[[bytes], bytes]:
    """Advertise client-1's public keys as one's own."""

    def answer(content: bytes) -> bytes:
        head, tensors = protocol.decode(fed.sites[LIAR].answer(content))
        (own,) = primitives.unpack(protocol.get_bytes(tensors, head["keys"]), 1)
        (theirs,) = primitives.unpack(fed.sites["client-1"]._sums._participant.advertise(), 1)
        return reply(head, "keys", primitives.pack(own[:32] + theirs[32:]))

    return answer


def of_low_order(fed: Signed) -> Callable[[bytes], bytes]:
    """Advertise a mask key with which everybody agrees on the same secret."""

    def answer(content: bytes) -> bytes:
        head, tensors = protocol.decode(fed.sites[LIAR].answer(content))
        (own,) = primitives.unpack(protocol.get_bytes(tensors, head["keys"]), 1)
        return reply(head, "keys", primitives.pack(own[:64] + bytes(32) + own[96:]))

    return answer


def reply(head: dict[str, Any], field: str, content: bytes) -> bytes:
    outgoing = protocol.MessageTensors()
    kept = {key: value for key, value in head.items() if key not in ("schema", "places")}
    return protocol.encode({**kept, field: protocol.put_bytes(outgoing, content)}, outgoing)


@pytest.mark.parametrize(
    ("lie", "blame"), [(copied, "are copied from 'client-1'"), (of_low_order, "is not a usable public key")]
)
def test_false_keys_exclude_their_sender_alone(
    bases: dict[str, Path], texts: Path, tmp_path: Path, lie: Any, blame: str
) -> None:
    config = settings(bases["bert"], texts)
    fed = Signed(config, tmp_path / "a", signed=False)
    answer = lie(fed)
    fed.transport.mishap = lambda node, head, content: (
        answer(content) if node == NODE and head["kind"] == "advertise" else None
    )
    (record,) = fed.serve()
    assert list(record["rejected"]) == [LIAR]
    assert blame in record["rejected"][LIAR]
    tiny.same(fed.state(), without(config, tmp_path / "b", LIAR))


@pytest.mark.parametrize("known", [True, False])
def test_a_bad_signature_excludes_its_sender_alone_where_the_server_knows_the_identities(
    bases: dict[str, Path], texts: Path, tmp_path: Path, known: bool
) -> None:
    """Where it does not, it passes the keys on, and the other sites refuse them with the whole sum."""
    config = settings(bases["bert"], texts)
    fed = Signed(config, tmp_path / "a", known=known)
    fed.sites[LIAR]._sums._identity = Ed25519PrivateKey.generate().private_bytes_raw()
    if not known:
        with pytest.raises(ValueError, match="clients shared their secrets, 3 were needed"):
            fed.serve()
        return
    (record,) = fed.serve()
    assert list(record["rejected"]) == [LIAR]
    assert "are not signed by the identity that is known for it" in record["rejected"][LIAR]
    tiny.same(fed.state(), without(config, tmp_path / "b", LIAR))


# Shares


def dealing(monkeypatch: pytest.MonkeyPatch, victims: tuple[str, ...]) -> None:
    """Have the liar deal these clients false shares."""
    share = Participant.share

    def dealt(self: Participant, keys: dict[str, bytes], threshold: int) -> dict[str, bytes]:
        sent = share(self, keys, threshold)
        if self.client_id == LIAR:
            sent |= {who: bytes(len(sent[who]) - 64) + sent[who][-64:] for who in victims if who in sent}
        return sent

    monkeypatch.setattr(Participant, "share", dealt)


def test_false_shares_for_one_client_evict_nobody(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three others hold true ones. It was the victim that fell out, in every round."""
    config = settings(bases["bert"], texts, federation={"rounds": 3})
    dealing(monkeypatch, ("client-0",))
    fed = Signed(config, tmp_path / "a")
    history = fed.serve()
    assert [record["num_clients"] for record in history] == [4, 4, 4]
    assert "client-0 says that the shares that client-2 dealt it are false: one of them is wrong" in fed.lines
    tiny.same(fed.state(), everyone(config, tmp_path / "b"))


def test_false_shares_for_many_exclude_their_dealer(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from then on: the others' keys last for all their rounds."""
    config = settings(bases["bert"], texts, federation={"rounds": 3})
    dealing(monkeypatch, ("client-0", "client-1"))
    fed = Signed(config, tmp_path / "a")
    history = fed.serve()
    fault = "dealt false shares, as client-0, client-1 said"
    assert [record["rejected"] for record in history] == [{LIAR: fault}] * 3
    assert [record["round_trips"] for record in history] == [5, 2, 2]
    tiny.same(fed.state(), without(config, tmp_path / "b", LIAR))


def test_where_everyone_is_needed_they_begin_again_without_the_dealer(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With threshold 1 no false share can be borne; without the liar the threshold is the other three."""
    config = settings(bases["bert"], texts, privacy={"threshold": 1.0, "min_clients": 3})
    dealing(monkeypatch, ("client-0",))
    fed = Signed(config, tmp_path / "a")
    (record,) = fed.serve()
    assert record["rejected"] == {LIAR: "dealt false shares, as client-0 said"}
    assert record["round_trips"] == 3 + 5
    tiny.same(fed.state(), without(config, tmp_path / "b", LIAR))


def test_a_site_that_calls_all_shares_false_excludes_nobody(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts)
    fed = Signed(config, tmp_path / "a")
    others = ["client-0", "client-1", "client-3"]
    fed.transport.mishap = lambda node, head, content: (
        changed(fed.sites[LIAR].answer(content), lambda head, tensors: head.update(false=others))
        if node == NODE and head["kind"] == "receive"
        else None
    )
    assert fed.serve()[0]["num_clients"] == 4
    tiny.same(fed.state(), everyone(config, tmp_path / "b"))


@pytest.mark.parametrize("false", ["client-0", ["client-9"], [LIAR], [["client-0"]]])
def test_an_odd_complaint_excludes_its_sender_alone(
    bases: dict[str, Path], texts: Path, tmp_path: Path, false: Any
) -> None:
    fed = Signed(settings(bases["bert"], texts), tmp_path / "a")
    fed.transport.mishap = lambda node, head, content: (
        changed(fed.sites[LIAR].answer(content), lambda head, tensors: head.update(false=false))
        if node == NODE and head["kind"] == "receive"
        else None
    )
    assert list(fed.serve()[0]["rejected"]) == [LIAR]


def test_a_false_share_at_the_unmasking_is_not_used_and_its_sender_named(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmask = Participant.unmask

    def false(self: Participant, survivors: list[str]) -> bytes:
        content = unmask(self, survivors)
        return content[:32] + bytes(len(content) - 32) if self.client_id == LIAR else content

    monkeypatch.setattr(Participant, "unmask", false)
    config = settings(bases["bert"], texts, federation={"rounds": 2})
    fed = Signed(config, tmp_path / "a")
    assert [record["num_clients"] for record in fed.serve()] == [4, 4]
    line = "client-2 revealed a share of client-0's secret that it was not dealt: it was not used"
    assert fed.lines.count(line) == 2
    tiny.same(fed.state(), everyone(config, tmp_path / "b"))


def inconsistent_in(monkeypatch: pytest.MonkeyPatch, name: Callable[[bytes], bool]) -> None:
    """Have the liar deal shares that fit its commitments, and no secret, for the sums whose sessions these are."""
    share, split = Participant.share, primitives.split

    def dealt(self: Participant, keys: dict[str, bytes], threshold: int) -> dict[str, bytes]:
        if self.client_id != LIAR or not name(self.session):
            return share(self, keys, threshold)
        with monkeypatch.context() as patch:
            patch.setattr(primitives, "split", lambda secret, t, n: split(primitives.new_secret(), t, n))
            return share(self, keys, threshold)

    monkeypatch.setattr(Participant, "share", dealt)


@pytest.fixture
def inconsistent(monkeypatch: pytest.MonkeyPatch) -> None:
    inconsistent_in(monkeypatch, lambda session: True)


@pytest.mark.parametrize("method", ["ffa_lora", "glora_sums"])
@pytest.mark.usefixtures("inconsistent")
def test_a_secret_that_no_shares_give_has_the_sum_repeated_without_its_dealer(
    bases: dict[str, Path], texts: Path, tmp_path: Path, method: str
) -> None:
    """The sites are shown the proof; of the same sum, they would unmask no other choice of clients."""
    config = settings(bases["bert"], texts, method, federation={"rounds": 2})
    fed = Signed(config, tmp_path / "a")
    history = fed.serve()
    fault = "dealt shares that do not give the secret of its keys"
    assert [record["rejected"] for record in history] == [{LIAR: fault}] * 2
    assert any("it begins again without client-2" in line for line in fed.lines)
    tiny.same(fed.state(), without(config, tmp_path / "b", LIAR))


def test_a_rounds_later_sum_is_repeated_too(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About the same results of training: the liar is in the basis, and not in the cores."""
    config = settings(bases["bert"], texts, "glora_sums")
    inconsistent_in(monkeypatch, lambda session: session.endswith(primitives.pack(b"sum", b"1")))
    fed, plain = Signed(config, tmp_path / "a"), Signed(in_the_clear(config), tmp_path / "b")
    plain.transport.mishap = lambda node, head, content: (
        "gone" if node == NODE and head["kind"] == "ask" and head["number"] == 1 else None
    )
    assert list(fed.serve()[0]["rejected"]) == list(plain.serve()[0]["rejected"]) == [LIAR]
    tiny.same(fed.state(), plain.state())


@pytest.mark.usefixtures("inconsistent")
def test_without_signatures_there_is_no_proof_and_the_run_ends_with_the_dealers_name(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    fed = Signed(settings(bases["bert"], texts), tmp_path, signed=False)
    with pytest.raises(ValueError, match="the shares that 'client-2' dealt do not fit its keys: the sum is given up"):
        fed.serve()


@pytest.mark.usefixtures("inconsistent")
@pytest.mark.parametrize("spoil", ["commitments", "signature", "shares", "dealer", "fewer shares", "nothing"])
def test_sites_accept_no_false_proof(bases: dict[str, Path], texts: Path, tmp_path: Path, spoil: str) -> None:
    """Or a server could have an honest site left out of a sum that it has unmasked with it already."""
    fed = Signed(settings(bases["bert"], texts), tmp_path)

    def change(head: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        proof = head["proofs"].pop(LIAR)
        head["proofs"]["client-1" if spoil == "dealer" else LIAR] = proof
        if spoil == "fewer shares":
            proof["shares"].popitem()
        elif spoil not in ("nothing", "dealer"):
            part = proof[spoil]
            tensors[next(iter(part.values())) if isinstance(part, dict) else part][3] ^= 1

    for client_id in ("client-0", "client-1", "client-3"):
        fed.ask_falsely(client_id, ("convict",), change)
    if spoil == "nothing":
        assert fed.serve()[0]["num_clients"] == 3
        return
    with pytest.raises(ValueError, match="0 clients helped to unmask, 3 were needed"):
        fed.serve()
    assert sum("no proof that the shares of" in line for line in fed.said) == 3
