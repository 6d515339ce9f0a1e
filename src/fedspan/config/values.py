"""The types of settings, and the base class of the sections that hold them."""

from __future__ import annotations

import os
from typing import Annotated, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
# A system ends a program that asks for a million threads.
Parallel = Annotated[int, Field(ge=1, le=1024)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
PartialFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PATTERN_SIGNS = "\\*+?[](){}|^$"
"""Characters that regular expressions have and names of layers do not."""


def as_tuple(value: object) -> object:
    """Return a single name as a list of one, and paths as names."""
    names = [value] if isinstance(value, str | os.PathLike) else value
    return [as_name(name) for name in names] if isinstance(names, list | tuple) else names


def as_pattern(value: object) -> object:
    """Return a regular expression as it is, and a single name as a list of one."""
    if isinstance(value, str) and any(sign in value for sign in PATTERN_SIGNS):
        return value
    return as_tuple(value)


def as_name(value: object) -> object:
    """Return a path as a name."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_none(value: object) -> object:
    """Return None for the word `none`, since TOML has no null."""
    return None if value == "none" else value


Names = Annotated[
    tuple[str, ...],
    BeforeValidator(as_tuple),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Paths = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(as_tuple),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Indices = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, int) and not isinstance(value, bool) else value),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "array", "items": {"type": "integer", "minimum": 0}}]}
    ),
]
NamesOrPattern = Annotated[
    str | tuple[str, ...],
    BeforeValidator(as_pattern),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
PositiveFloatOrNone = Annotated[
    PositiveFloat | None,
    BeforeValidator(as_none),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "none"}, {"type": "null"}]}),
]


class Section(BaseModel):
    """Settings that belong together: frozen, and without room for a key that is not one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: object, info: ValidationInfo) -> object:
        # Pydantic would take true as 1.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("input should not be true or false")
        return value
