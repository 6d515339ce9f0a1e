"""Laws of training on conversations: losses and text are those of plain transformers on the same conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from fedspan.cli.main import main
from fedspan.client.evaluation import evaluate
from fedspan.client.setup import prepare
from fedspan.client.training import Assignment, TrainingSettings, train
from fedspan.config import DataConfig, LocalConfig
from fedspan.data import Encoded, load
from fedspan.methods.messages import Broadcast

# The end of a turn is not the tokenizer's end token, as in many bases that were not tuned to chat.
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<unk>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [["copy 1", "1", "twice 2", "22"], ["twice 3", "33"], ["next 4", "5", "copy 6", "6", "twice 7", "77"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save("llama", tmp_path_factory.mktemp("chat") / "llama")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"messages": messages(texts)} for texts in TURNS * 6]
    return tiny.write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def data(base: Path, chats: Path) -> Encoded:
    config = DataConfig(task="files", train=(str(chats),), test=(str(chats),))
    return prepare(str(base), config, load(config, 0)).data["train"]


def messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def labelled(tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a conversation, and -100 outside the answers and their ends, put together by hand."""
    ids, labels = [1], [-100]
    for i, text in enumerate(texts):
        head = tokenizer("<user>" if i % 2 == 0 else "<assistant>", add_special_tokens=False)["input_ids"]
        turn = [*tokenizer(text, add_special_tokens=False)["input_ids"], 3]
        ids += head + turn
        labels += [-100] * len(head) + (turn if i % 2 else [-100] * len(turn))
    return torch.tensor([ids]), torch.tensor([labels])


@torch.no_grad()
def plain_loss(model: Any, tokenizer: Any, rows: list[list[str]]) -> float:
    total, count = 0.0, 0
    for texts in rows:
        ids, labels = labelled(tokenizer, texts)
        tokens = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return total / count


def test_the_loss_is_that_of_plain_transformers_one_conversation_at_a_time(base: Path, data: Encoded) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny.load(base, "instruction"), tiny.processor(base, "instruction")
    figures = evaluate(model, data.subset([0, 1, 2]), (), tokenizer, batch_size=2, max_new_tokens=0)
    expected = plain_loss(AutoModelForCausalLM.from_pretrained(str(base)).eval(), tokenizer, TURNS)
    assert abs(figures["loss"] - expected) < 1e-5 * expected


def test_a_base_that_has_learnt_its_conversations_scores_one(base: Path, data: Encoded) -> None:
    """It writes the last answer, and stops at the end of the turn, which is not the tokenizer's end token."""
    model, tokenizer = tiny.load(base, "instruction", trains="all"), tiny.processor(base, "instruction")
    work = Assignment("client-0", Broadcast({}, model.dense()), np.arange(3), 60, 1.0)
    local = LocalConfig(learning_rate=5e-3, batch_size=3)
    result = train(model, work, data, TrainingSettings(local=local), 0)
    model.load(Broadcast({}, result.update.dense))
    figures = evaluate(model, data.subset([0, 1, 2]), ("exact_match",), tokenizer, batch_size=2, max_new_tokens=8)
    assert figures["exact_match"] == 1.0


def test_the_command_trains_on_a_file_of_conversations(
    base: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From `fedspan run` to an adapter that plain PEFT loads, with the loss that the summary states."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = [
        f"model.name={base}",
        "data.task=files",
        f'data.train=["{chats}"]',
        f'data.test=["{chats}"]',
        "federation.num_clients=3",
        "federation.rounds=2",
        "federation.partition=iid",
        "federation.ranks=4",
        "local.steps=2",
        "local.learning_rate=0.01",
        "engine.workers=1",
        "evaluation.local=false",
        "evaluation.max_new_tokens=4",
    ]
    sets = [part for option in options for part in ("--set", option)]
    code = main(["run", *sets, "--out", str(tmp_path / "run")])
    assert code == 0, capsys.readouterr().err
    plain = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "run" / "adapter")).eval()
    expected = plain_loss(loaded, tiny.processor(base, "instruction"), TURNS)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["encoding"]["template_date"] == "2024-07-26"  # conversations are written by the chat template
    stated = summary["metrics"]["server"]["loss"]
    assert abs(stated - expected) < 1e-4 * expected
