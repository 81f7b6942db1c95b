"""`marrow config show`: a recipe resolved, each value with its origin."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from marrow.cli.recipe import SCHEMA, read_recipe
from marrow.core.config import Recipe
from marrow.core.flat_toml import join_key, quoted
from marrow.core.hashes import canonical_json


@click.group("config")
def command() -> None:
    """Show recipes."""


@command.command("show")
@click.argument("path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print every value of RECIPE and where it came from, as TOML that can be read again."""
    recipe = read_recipe(path, overrides)
    if as_json:
        origins = {key: str(origin) for key, origin in recipe.origins.items()}
        sections = json.loads(canonical_json(dict(recipe.sections)))
        click.echo(json.dumps({"hash": recipe.hash, "values": sections, "origins": origins}, indent=2))
    else:
        click.echo("\n".join(lines(recipe)))


def lines(recipe: Recipe) -> list[str]:
    """Write a recipe as TOML lines with origins as comments."""
    values = json.loads(canonical_json(dict(recipe.sections)))
    out = [f"# {recipe.path}, hash {recipe.hash[:12]}"]
    for table in SCHEMA:
        out += ["", f"[{table}]"]
        out += table_lines(recipe, table, "", values[table])
    return out


def table_lines(recipe: Recipe, table: str, prefix: str, values: Mapping[str, Any]) -> list[str]:
    """Write the values of a table; those of a table within it under dotted keys."""
    out: list[str] = []
    for name, value in values.items():
        key = f"{prefix}{join_key(name)}"
        if value and isinstance(value, dict):
            out += table_lines(recipe, table, f"{key}.", value)
            continue
        written = f"{key} = {toml(value)}"
        comment = "# " if value is None else ""  # TOML has no way to write it
        out.append(f"{comment + written:<44} # {recipe.origins[f'{table}.{key}']}")
    return out


def toml(value: Any) -> str:
    """Write one value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, str):
        return quoted(value)
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
