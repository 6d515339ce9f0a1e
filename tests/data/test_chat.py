"""Chat templates: the prompt, the token that ends a turn, and templates that refuse, date or think."""

from __future__ import annotations

from typing import Any

import bigram
import pytest

from fedspan.config import DataConfig
from fedspan.data import Rows, encode
from fedspan.data.base_facts import BaseFacts
from fedspan.data.chat import ChatFormat

ROWS = Rows("instruction", [("hi", "")], ["yes"], [""])
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn is needed') }}{% endif %}" + PLAIN
)
NO_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}]{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + PLAIN
# As Qwen's: without thoughts a prompt opens with an empty block, and a finished turn has the same.
THINKS_IF_TOLD = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALWAYS_EMPTY = THINKS_IF_TOLD.replace("enable_thinking is false", "enable_thinking == 'never'")
ALWAYS_OPEN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def made(chat: str) -> Any:
    return bigram.tokenizer(chat)


def shown(chat: str, system: str = "", ends: tuple[int, ...] = ()) -> tuple[str, str]:
    """The prompt and the learnt answer, as text."""
    tokenizer = made(chat)
    encoded = encode(ROWS, tokenizer, DataConfig(template="chat", system=system), BaseFacts(end_tokens=ends))
    row, prompt = encoded.batch([0])["input_ids"][0], encoded.prompts([0])["input_ids"][0]
    return tokenizer.decode(prompt), tokenizer.decode(row[len(prompt) :])


@pytest.mark.parametrize(
    ("chat", "answer"),
    [
        (bigram.CHAT, "yes<|im_end|>"),
        (PLAIN, "yes</s>"),
        (PLAIN.replace("{% endfor", "{{ eos_token }}{% endfor"), "yes</s>"),
        (PLAIN.replace("{% endfor", "{{ pad_token }}<|im_end|>{% endfor"), "yes<pad>"),
    ],
)
def test_an_answer_ends_as_the_assistant_s_turn_does(chat: str, answer: str) -> None:
    assert shown(chat)[1] == answer


def test_of_several_special_tokens_the_base_s_end_token_ends_the_turn() -> None:
    chat = PLAIN.replace("{% endfor", "{{ pad_token }}<|im_end|>{% endfor")
    end = made(chat).convert_tokens_to_ids(bigram.TURN_END)
    assert shown(chat, ends=(2, end))[1] == "yes<|im_end|>"


def test_a_system_turn_is_put_first() -> None:
    assert shown(SYSTEM_FIRST, system="Be kind")[0] == "[system]Be kind[user]hi>"


def test_a_system_turn_needs_a_chat_template() -> None:
    with pytest.raises(ValueError, match=r"data.system = 'Be kind' with another template than 'chat'"):
        encode(ROWS, made(PLAIN), DataConfig(system="Be kind"))


@pytest.mark.parametrize(
    ("chat", "system", "message"),
    [
        (SYSTEM_FIRST, "", r"refuses one user turn \(a system turn is needed\).*data.system"),
        (NO_SYSTEM, "Be kind", r"data.system = 'Be kind': .* leaves out the system turn"),
        ("{{ raise_exception('no') }}", "Be kind", r"refuses a system and a user turn \(no\)"),
        ("{{ messages[7]['content'] }}", "", "refuses one user turn"),
        ("{% for", "", "refuses one user turn"),
        ("{{ 1 / 0 }}", "", "refuses one user turn"),
    ],
)
def test_a_template_that_refuses_is_named_in_one_line(chat: str, system: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        shown(chat, system)
    assert "\n" not in str(caught.value)


def test_the_date_is_the_same_in_every_run() -> None:
    prompt, _ = shown(DATED)
    assert prompt == "26 Jul 2024\n[user]hi>"
    encoded = encode(ROWS, made(DATED), DataConfig(template="chat"))
    assert encoded.notes == ("the chat template prints today's date: 2024-07-26 stands for it in every run",)
    assert not encode(ROWS, made(PLAIN), DataConfig(template="chat")).notes


@pytest.mark.parametrize("chat", [THINKS_IF_TOLD, ALWAYS_EMPTY])
def test_an_answer_follows_an_empty_block_of_thoughts(chat: str) -> None:
    """Prompt and answer together are the finished conversation, token by token."""
    prompt, answer = shown(chat)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert prompt + answer == made(chat).apply_chat_template(turns, tokenize=False)
    assert prompt == "<user>hi<|im_end|><assistant><think>\n\n</think>\n\n"


def test_an_answer_does_not_stand_in_an_open_block_of_thoughts() -> None:
    assert shown(ALWAYS_OPEN) == ("<user>hi<|im_end|><assistant>", "yes<|im_end|>")


def test_a_template_for_prompts_alone_is_used_as_it_is() -> None:
    chat = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}[{{ messages[0]['content'] }}]"
    assert shown(chat) == ("[hi]", "yes</s>")
    assert ChatFormat.of(made(chat)).end is None
