"""The table of `docs/models.md`: read, compared with what was found, and written.

python tests/families/family_table.py [NAME ...]     study these families, or all, and write their rows
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
_HEAD = "| family | data | kind of layers | GLoRA | FedFTG | cohort | remark |"
_RULE = "|---|---|---|---|---|---|---|"


def row(findings: object) -> str:
    """Return one line of the table."""
    cells = (getattr(findings, name) for name in ("family", "kind", "layers", "glora", "fedftg", "cohort", "remark"))
    return f"| {' | '.join(str(cell).replace('|', '/').replace('*', chr(92) + '*') for cell in cells)} |"


def rows() -> dict[str, str]:
    """Return the committed lines by family."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(_HEAD) + 2
    found: dict[str, str] = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found[line.split("|")[1].strip()] = line
    return found


def write(new: dict[str, str], order: list[str]) -> None:
    """Replace these families' lines; a family that is in the list of none any more is left out."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_HEAD)
    after = rest.partition("\n\n")[2]
    kept = {**rows(), **new}
    table = "\n".join([_HEAD, _RULE, *(kept[name] for name in order if name in kept)])
    PAGE.write_text(f"{before}{table}\n" + (f"\n{after}" if after else ""), encoding="utf-8")


def main(names: list[str]) -> None:
    """Study the families and write their rows."""
    import torch
    from families import FAMILIES
    from family_runs import study

    torch.set_num_threads(1)
    for family in FAMILIES:
        if names and family.name not in names:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            line = row(study(family, Path(folder)))
        write({family.name: line}, [one.name for one in FAMILIES])
        print(f"{line} {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main(sys.argv[1:])
