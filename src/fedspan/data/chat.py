"""Chat templates: one user turn as a prompt, and the token that ends the turn that answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fedspan.data.special_tokens import special_tokens
from fedspan.support.errors import FedspanError, first_line

DATE = datetime(2024, 7, 26)
"""The date that templates print as today's, so that a run has the same bits tomorrow; Llama's templates take this one
where they are told none."""
ANOTHER_DATE = datetime(1999, 12, 31, 23, 59, 58)
"""A date by which a template that prints today's is told from one that does not."""
_CODES = "aAbBcdfGHIjmMpSuUVwWxXyYzZ"
_CALL = "strftime_now"
_ANSWER = "fedspan answers"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A tokenizer's chat template for one user turn, which an assistant's turn follows.

    A template may open the assistant's turn otherwise in a prompt than in a finished conversation, with a block of
    thoughts that is empty there, or that is begun in the prompt alone. The prompt then ends as the finished
    conversation does before its answer, so that the answer stands where the base expects one.
    """

    tokenizer: Any
    system: str
    """Text of a system turn before the user's; none where it is empty."""
    end: str | None
    """The special token that ends the assistant's turn; none where the template writes no such token."""
    added: str
    """The text that a finished conversation has between the prompt and the answer."""
    removed: str
    """The text at the end of the prompt that a finished conversation does not have."""
    uses_date: bool
    """The template prints a date."""

    @classmethod
    def of(cls, tokenizer: Any, system: str = "", ends: Sequence[int] = ()) -> ChatFormat:
        """Try a tokenizer's template with one conversation.

        Parameters
        ----------
        ends
            Ids of the tokens that the base says end its texts: one of them ends a turn rather than another token.

        Raises
        ------
        FedspanError
            Where there is no template, it refuses the conversation, or it leaves out the system turn.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise FedspanError(
                "data.template = 'chat': this tokenizer has no chat template; expected a text "
                "with {instruction} and {input}"
            )
        plain = cls(tokenizer, system, None, "", "", False)
        prompt = plain.prompt("Hello")
        if system and system.strip() not in prompt:
            raise FedspanError(
                f"data.system = {system!r}: the base's chat template leaves out the system turn; "
                f"expected an empty data.system"
            )
        opened, rest = plain._finished("Hello")
        added, removed = _difference(prompt, opened)
        uses_date = prompt != plain.prompt("Hello", ANOTHER_DATE)
        return cls(tokenizer, system, _end_of(tokenizer, rest, ends), added, removed, uses_date)

    def prompt(self, content: str, date: datetime = DATE) -> str:
        """Return the text that an answer to `content` follows.

        Raises
        ------
        FedspanError
            Where the template refuses it.
        """
        try:
            text = self._rendered([*self._system(), {"role": "user", "content": content}], True, date)
        except Exception as error:  # a template is a program: it may raise anything
            hint = "" if self.system else ", a text in data.system for one that needs a system turn"
            kind = "one user turn" if not self.system else "a system and a user turn"
            raise FedspanError(
                f"data.template = 'chat': the base's chat template refuses {kind} ({first_line(error)}); expected a "
                f"template that takes it{hint}, or a text with {{instruction}} and {{input}}"
            ) from None
        return text.removesuffix(self.removed) + self.added

    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _finished(self, content: str) -> tuple[str | None, str]:
        """Return a finished conversation before and after its answer; None and nothing where there is no telling."""
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": _ANSWER}]
        try:
            before, found, after = self._rendered([*self._system(), *turns], False, DATE).rpartition(_ANSWER)
        except Exception:  # as above; a template for prompts alone is none the worse for it
            return None, ""
        return (before, after) if found else (None, "")

    def _rendered(self, turns: list[dict[str, str]], prompt: bool, date: datetime) -> str:
        return str(self.tokenizer.apply_chat_template(turns, **template_options(self.tokenizer, prompt, date)))


def template_options(tokenizer: Any, prompt: bool, date: datetime = DATE) -> dict[str, Any]:
    """Return the options of `apply_chat_template` for text, in which a template prints `date` as today's.

    Parameters
    ----------
    prompt
        The text is one that an answer follows; otherwise it is a whole conversation.
    """
    # Thinking is off: answers are trained and generated without it. Templates that know no such switch ignore it.
    options = {"add_generation_prompt": prompt, "tokenize": False, "enable_thinking": False}
    template = str(tokenizer.get_chat_template())
    return options | ({"chat_template": _fixed_date(date) + template} if _CALL in template else {})


def _fixed_date(date: datetime) -> str:
    """Return the beginning of a template in which its function for today's date gives this one."""
    # A function could not be given to a template: transformers turns it into text.
    codes = {f"%{code}": date.strftime(f"%{code}") for code in _CODES}
    codes |= {f"%-{code}": text.lstrip("0") or "0" for code, text in zip(_CODES, codes.values(), strict=True)}
    replaced = "".join(f"|replace({code!r}, {text!r})" for code, text in codes.items())
    # The line break is one that Jinja drops, after which the template begins a line as it did.
    return f"{{% macro {_CALL}(form) %}}{{{{ form{replaced}|replace('%%', '%') }}}}{{% endmacro %}}\n"


def _difference(prompt: str, opened: str | None) -> tuple[str, str]:
    """Return what a finished conversation adds to the prompt, and what it lacks of it, apart from white space."""
    if opened is None:
        return "", ""
    if opened.startswith(prompt) and opened[len(prompt) :].strip():
        return opened[len(prompt) :], ""
    if prompt.startswith(opened) and prompt[len(opened) :].strip():
        return "", prompt[len(opened) :]
    return "", ""


def _end_of(tokenizer: Any, rest: str, ends: Sequence[int]) -> str | None:
    """Return the special token that `rest`, the text after an answer, begins to end the turn with."""
    known = special_tokens(tokenizer)
    found = sorted((rest.index(token), -len(token), token) for token in known if token in rest)
    names = [token for _, _, token in found]
    stated = {tokenizer.convert_ids_to_tokens(end) for end in ends}
    return next((name for name in names if name in stated), names[0] if names else None)
