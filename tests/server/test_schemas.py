"""One side whose version writes messages of another schema: it is refused by both numbers, and the others go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from signed import IDS, Signed, settings

from fedspan.wire import framing


@pytest.mark.parametrize("other", [framing.SCHEMA - 1, framing.SCHEMA + 1], ids=["older", "newer"])
def test_a_site_of_another_schema_is_refused_by_its_number(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: int
) -> None:
    own = framing.SCHEMA
    fed = Signed(settings(bases["bert"], texts, privacy={"secure_sums": False}), tmp_path)
    answer = fed.transport.handlers["node-3"]

    def upgraded(content: bytes) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(framing, "SCHEMA", other)
            return answer(content)

    fed.transport.handlers["node-3"] = upgraded
    fed.transport.bound = {f"node-{k}": name for k, name in enumerate(IDS)}
    (record,) = fed.serve()
    assert record["num_clients"] == 3
    (line,) = (line for line in fed.lines if "client-3" in line)
    same = "both sides need the same version of fedspan"
    assert (
        line == f"a node is not taken in: node node-3 (client-3): a message of schema {other}: expected {own}; {same}"
    )
    assert any(f"a message of schema {own}: expected {other}; {same}" in said for said in fed.said)
