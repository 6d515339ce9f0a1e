"""The files that an audit leaves: the dossier as a page and for programs, and a section of an adapter's model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedspan.auditing.dossier import Dossier
from fedspan.auditing.findings import interval
from fedspan.auditing.page import MARKER, render
from fedspan.display.own_files import write_own
from fedspan.support import standard_json
from fedspan.support.errors import FedspanError
from fedspan.support.files import write_bytes

PAGE, RECORD = "dossier.html", "dossier.json"
_BEGIN, _END = "<!-- begin of fedspan audit -->", "<!-- end of fedspan audit -->"
_WORDS = {"found": "**Found.**", "not found": "Not found.", "not tried": "Not tried."}


def write(dossier: Dossier, folder: Path) -> tuple[Path, Path]:
    """Write `dossier.html` and `dossier.json` into a folder, in place of those of an earlier audit.

    Returns
    -------
    Path, Path
        The page and the record.

    Raises
    ------
    FedspanError
        When something else is at their paths, or they cannot be written.
    """
    page = render(dossier).encode()
    record = folder / RECORD
    if record.exists() and not _is_record(record):
        raise FedspanError(f"{record} exists and was not made by an audit: expected a new folder, or one to replace")
    written = write_own(folder / PAGE, page, MARKER)
    write_bytes(record, (standard_json.dumps(dossier.as_json(), indent=1) + "\n").encode())
    return written, record


def _is_record(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "findings", "membership"} <= content.keys()


def write_card(dossier: Dossier, folder: Path) -> Path:
    """Write the audit's lines into the model card of an adapter's folder, README.md.

    Everything else in the card stays; only the lines of an earlier audit are replaced.

    Raises
    ------
    FedspanError
        When there is no such folder, or the card cannot be read or written.
    """
    if not folder.is_dir():
        raise FedspanError(f"{folder} is no folder of an adapter: expected one for the model card")
    path = folder / "README.md"
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        write_bytes(path, _with_section(before, section(dossier)).encode())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise FedspanError(f"{path} cannot be written ({reason}): expected a model card in Markdown") from None
    return path


def section(dossier: Dossier) -> str:
    """Return the audit as a section of a model card."""
    best = dossier.membership.strongest
    lines = [
        _BEGIN,
        "## Privacy audit",
        "",
        f"Made on {dossier.made} by fedspan {dossier.version}, on {best.num_members} training rows and "
        f"{best.num_others} "
        "others. “Not found” means that the attacks that were tried failed, not that the model is safe.",
        "",
        *(f"- {one.question} {_WORDS[one.verdict]} {one.answer}" for one in dossier.findings),
        "",
        f"Strongest membership attack: {best.name}, AUC {interval(best.auc)} (0.5 is guessing).",
        _END,
    ]
    return "\n".join(lines)


def _with_section(card: str, new: str) -> str:
    if _BEGIN in card and _END in card:
        return re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", lambda _: new, card, count=1, flags=re.DOTALL)
    return f"{card.rstrip()}\n\n{new}\n" if card.strip() else f"{new}\n"
