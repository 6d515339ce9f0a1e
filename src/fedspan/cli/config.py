"""`fedspan config`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedspan.cli.arguments import ConfigFile, Settings


def config(
    config: ConfigFile = None,
    settings: Settings = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of a settings file instead, for editors.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Print nothing but the reason why a run of these settings would be refused."),
    ] = False,
) -> None:
    """Print every setting with its value and explanation as TOML: a file to start from.

    \b
    Examples:
      fedspan config > my.toml
      fedspan config my.toml --set federation.rounds=30
      fedspan config --schema > fedspan.schema.json
      fedspan config my.toml --check   exit code 2 if a run would be refused

    A setting that is unset is commented out. `fedspan methods NAME` lists the options of [method].
    """
    from fedspan.config import json_schema, load, to_toml

    loaded = load(config, settings or ())
    if check:
        from fedspan.federation import requirements

        requirements.chosen(loaded)
    elif schema:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    else:
        print(to_toml(loaded), end="")
