"""The public identities of a federation's sites, as the server reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedspan.privacy.identities import read_identities


def test_keys_are_read_by_client(tmp_path: Path) -> None:
    path = tmp_path / "sites.json"
    path.write_text(json.dumps({"a": "00" * 32, "b": "ff" * 32}))
    assert read_identities(path) == {"a": bytes(32), "b": b"\xff" * 32}


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": "zz"}', '{"a": "00"}', '{"a": null}'])
def test_anything_else_is_one_clear_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sites.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"sites.json") as refused:
        read_identities(path)
    assert "\n" not in str(refused.value)
