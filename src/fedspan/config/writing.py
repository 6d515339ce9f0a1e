"""Settings as commented TOML, and their JSON Schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from fedspan.config.aliases import ALIASES
from fedspan.config.sections import Config
from fedspan.config.values import Section

_WIDTH = 100


def to_toml(config: Config) -> str:
    """Return every setting with its explanation as TOML; `load` reads the same settings from it.

    A setting that is unset, as it is by default, is commented out, with an example of a value.
    """
    values = config.model_dump(mode="json")
    top: list[str] = []
    blocks = [["# Settings of a fedspan run. One that is commented out is unset; its value is an example."], top]
    for name, field in type(config).model_fields.items():
        section = getattr(config, name)
        if isinstance(section, Section):
            blocks.append([*_comment(section.__doc__), f"[{name}]", *_section(section, values[name])])
        elif isinstance(section, dict):
            blocks.append([*_comment(field.description), f"[{name}]", *_options(values[name])])
        else:
            top += _setting(name, field, values[name])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _section(section: Section, values: dict[str, Any]) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        yield from _setting(name, field, values[name])


def _setting(name: str, field: FieldInfo, value: object) -> Iterator[str]:
    yield from _comment(field.description)
    # An absent key means its default: "none" is written only where the default is a value.
    if value is None and field.default is None:
        assert field.examples, f"{name} can be unset: expected Field(examples=...)"
        yield f"#{name} = {_toml_value(field.examples[0])}"
    else:
        yield f"{name} = {_toml_value(value)}"


def _options(method: dict[str, Any]) -> Iterator[str]:
    # Which options there are depends on the method, which is known only to the layer above.
    yield from (f"{name} = {_toml_value(value)}" for name, value in method.items())


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(
        " ".join((text or "").split()),
        _WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(each)}" for key, each in value.items()) + "}"
    # JSON's strings, numbers, booleans and arrays are TOML's too.
    return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a settings file, with explanations, defaults and aliases."""
    schema = Config.model_json_schema()
    sections = {
        name: schema["$defs"][prop["$ref"].rpartition("/")[2]]
        for name, prop in schema["properties"].items()
        if "$ref" in prop
    }
    for alias, ours in ALIASES.items():
        (section, name), (our_section, our_name) = alias.split("."), ours.split(".")
        target = {
            k: v for k, v in sections[our_section]["properties"][our_name].items() if k not in ("default", "title")
        }
        sections[section]["properties"][name] = {**target, "description": f"Another name of `{ours}`."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
