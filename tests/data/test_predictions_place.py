"""The place of a file of predictions."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedspan.data.predictions_file import check_out
from fedspan.support.errors import FedspanError


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["rows.csv", "new.csv", "deeper/new.jsonl"])
def test_a_file_in_a_folder_of_the_data_is_refused(tmp_path: Path, name: str, force: bool) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    with pytest.raises(FedspanError, match=r"is (in .*a folder of --data|one of)"):
        check_out(tmp_path / name, [str(tmp_path)], force)


def test_a_file_beside_the_data_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    check_out(tmp_path / "new.csv", [str(tmp_path / "rows"), str(tmp_path / "rows.csv")], False)
