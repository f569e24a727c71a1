"""The settings of a config: as a JSON Schema, with which editors complete and check YAML files, or as a list.

lmtune schema > lmtune.schema.json
lmtune schema --list
"""

import json
from typing import Annotated

import typer
from rich.table import Table

from lmtune.config.json_schema import REQUIRED, every_kind, json_schema
from lmtune.io.console import escape, out
from lmtune.run import run


def main(
    as_json: Annotated[bool, typer.Option("--json", help="JSON Schema, draft 2020-12; the default.")] = False,
    as_list: Annotated[bool, typer.Option("--list", help="Every setting with its default and meaning.")] = False,
) -> None:
    """Print the JSON Schema of a config; or with --list every setting, its default and what it means.

    An editor with a YAML language server uses it for a file that begins with the line
    `# yaml-language-server: $schema=lmtune.schema.json`.

    Example: lmtune schema > lmtune.schema.json
    """
    if as_json or not as_list:
        typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("setting", "default", "meaning"):
        table.add_column(title, overflow="fold", no_wrap=title == "setting")
    for setting in (setting for *_, known in every_kind() for setting in known):
        default = "" if setting.default is REQUIRED else "null" if setting.default is None else str(setting.default)
        table.add_row(setting.key, escape(default), escape(setting.meaning))
    out.print(table, soft_wrap=False)


if __name__ == "__main__":
    run(main)
