"""Set-up that all tests share: one thread, and tiny bases that are built once."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny local bases by architecture: llama, gpt2, bert, vit."""
    import tiny

    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny.save(name, folder / name) for name in tiny.KIND}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classification data as JSONL."""
    import tiny

    return tiny.write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", tiny.words())


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instruction data as JSONL."""
    import tiny

    return tiny.write_jsonl(tmp_path_factory.mktemp("instructions") / "tasks.jsonl", tiny.questions())
