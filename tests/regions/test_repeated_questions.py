"""Servers that are started again in the middle of a run: the one above, which repeats its question, and a region's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from memory_transport import make_sites
from trees import OPEN, SECURE, Tree, flat, settings, state_of

from fedspan.wire import framing

pytest.importorskip("cryptography")


class _Killed(BaseException):
    pass


def interrupted(tree: Tree) -> list[bytes]:
    """End the server above in the second round, when the north has answered and the south has not been asked yet.

    Returns what the north was asked.
    """
    asked: list[bytes] = []

    def mishap(node: str, head: dict[str, Any], content: bytes) -> None:
        if node == "node-south" and head.get("round") == 1:
            raise _Killed
        if node == "node-north" and head["kind"] == "relay":
            asked.append(content)

    tree.transport.mishap = mishap
    with pytest.raises(_Killed):
        tree.serve()
    tree.transport.mishap = None
    return asked


@pytest.mark.parametrize("privacy", [OPEN, SECURE], ids=["open", "secure"])
def test_a_question_that_is_repeated_is_answered_without_the_sites(
    bases: dict[str, Path], texts: Path, tmp_path: Path, privacy: Any
) -> None:
    """The bits are those of an uninterrupted run; another question is never answered from memory."""
    tree = Tree(settings(bases["bert"], texts, "fedit", privacy=privacy), tmp_path)
    asked = interrupted(tree)
    before = len(tree.below["north"].sent)
    assert [record["num_clients"] for record in tree.serve()] == [4, 4]
    assert tree.below["north"].sent[before:] == []
    assert tree.said[-1] == "round 2: the same question once more, which has the same answer"
    flat(tree.config, tmp_path / "flat")
    tiny.same(tree.state(), state_of(tmp_path / "flat" / "run"))
    tree.regions["north"].answer(framing.amended(asked[-1], {"room": 5}))
    assert len(tree.below["north"].sent) > before


def test_a_question_is_asked_again_where_a_site_was_absent(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    tree = Tree(settings(bases["bert"], texts, "fedit", privacy=OPEN), tmp_path)
    tree.below["north"].mishap = lambda node, head, content: (
        "gone" if node == "client-0" and head.get("round") == 1 else None
    )
    interrupted(tree)
    tree.below["north"].mishap = None
    assert [record["num_clients"] for record in tree.serve()] == [4, 4]


def test_a_site_with_other_rows_is_left_out_alone_by_a_server_that_has_not_known_the_old_ones(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts, "fedit", privacy=OPEN)
    tree = Tree(config, tmp_path)
    fewer = config.model_copy(update={"data": config.data.model_copy(update={"client_holdout": 0.5})})

    def started_again(node: str, head: dict[str, Any], content: bytes) -> None:
        if node == "node-north" and head.get("round") == 1:
            tree.sites |= make_sites(fewer, ["client-0"], tmp_path / "changed")
            tree.transport.handlers[node] = tree._region("north").answer

    tree.transport.mishap = started_again
    history = tree.serve()
    assert [record["num_clients"] for record in history] == [4, 3]
    (reason,) = history[1]["rejected"].values()
    assert "examples: expected" in history[1]["rejected"]["client-0"], reason
    flat(config, tmp_path / "flat", lambda client, round_num: round_num == 1 and client == "client-0")
    tiny.same(tree.state(), state_of(tmp_path / "flat" / "run"))
