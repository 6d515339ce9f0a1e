"""Bad inputs by subject: one line that names the value and what was expected, exit code 2, nothing on the disk."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from adapter_cases import ADAPTERS
from data_cases import DATA
from run_cases import RUNS
from setting_cases import SETTINGS
from tables import COMMANDS, Case, Content

from fedspan.cli.main import main
from fedspan.runs.execution import run

CASES: list[Case] = [*SETTINGS, *DATA, *ADAPTERS, *RUNS]
AT_LEAST = 250
CHECKED = ("run", "RUN")
"""Commands whose refusals `run --check` gives in the same words."""
_PATIENCE = 60  # seconds, on a busy machine; an answer takes a fraction of one
PARAMETERS = [pytest.param(case, id=f"{case.subject}: {case.args}"[:100]) for case in CASES]


@pytest.fixture(scope="module")
def place(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is not bad about the cases: bases, data, adapters and a finished run."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("battery")
    for name in ("bert", "llama", "vit"):
        shutil.copytree(bases[name], folder / name)
    tiny.write_jsonl(folder / "texts.jsonl", tiny.words(12))
    tiny.write_jsonl(folder / "tasks.jsonl", tiny.questions(12))
    for name, rank in (("a", 2), ("b", 3)):
        (folder / name).mkdir()
        module = "base_model.model.layer.q_proj"
        factors = {f"{module}.lora_A.weight": torch.ones(rank, 6), f"{module}.lora_B.weight": torch.ones(5, rank)}
        save_file(factors, folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": "base"}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    config = tiny.config(folder / "bert", folder / "texts.jsonl", "glora", federation={"rounds": 1})
    run(config, folder / "finished")
    return folder


def test_there_are_enough_cases_and_none_twice() -> None:
    assert len(CASES) >= AT_LEAST
    given = [(case.args, str(sorted(case.files.items(), key=str))) for case in CASES]
    assert [twice for twice, count in Counter(given).items() if count > 1] == []
    assert len(Counter(case.subject for case in CASES)) >= 10


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_bad_input(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("TMPDIR", str(place))
    for name, content in case.files.items():
        write(place / name, content)
    try:
        before = listing(place)
        line = refused(arguments(case), capfd)
        for part in case.parts:
            assert part in line
        if shlex.split(case.args)[0] in CHECKED:
            command, *rest = arguments(case)
            assert refused([command, "--check", *rest], capfd) == line
        assert listing(place) == before
    finally:
        for name in case.files:
            remove(place / name)
        remove(place / "new")


def refused(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    with ended_after(_PATIENCE):
        code = main(args)
    done = capfd.readouterr()
    # On a busy machine lines about what is being read may come first.
    lines = [line for line in done.err.splitlines() if not line.endswith(" …")]
    assert (code, len(lines), done.out) == (2, 1, ""), done.err[-2000:] or done.out
    assert lines[0].startswith("fedspan: ")
    assert len(lines[0]) < 1000, f"{len(lines[0])} characters are no line to read"
    return lines[0]


@contextmanager
def ended_after(seconds: int) -> Iterator[None]:
    def end(*_: object) -> None:
        pytest.fail(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def arguments(case: Case) -> list[str]:
    first, *rest = shlex.split(case.args)
    return [*shlex.split(COMMANDS.get(first, first)), *rest]


def write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def listing(folder: Path) -> dict[str, int]:
    """Every file and folder with its size; a lock that a refused `resume` has taken and left is no content."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            if path.name != ".lock":
                found[str(path)] = path.lstat().st_size if not path.is_dir() else 0
    return found
