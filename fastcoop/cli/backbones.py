"""``backbones``: what backbones there are, and what one of them can do."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from fastcoop.cli.groups import app
from fastcoop.cli.options import AsJson
from fastcoop.cli.output import show


@app.command()
def backbones(
    name: Annotated[str | None, Argument(help="A backbone, part of names, or a folder of models.")] = None,
    as_json: AsJson = False,
) -> None:
    """List backbones, or show one.

    Listed are the embedded backbones, the models in Hugging Face's cache and all that open_clip knows, or those with
    NAME in their names. The whole name of one shows everything about it: its weights and where they are, the commands
    to use it, and how it learns prompts: on the shared path (what prompts have in common is computed once) or the
    plain path (all positions of all prompts), with what a step costs.

    Example:  fastcoop backbones siglip

    Example:  fastcoop backbones ViT-B-16-SigLIP2
    """
    from fastcoop.backbones.catalog import find_backbone, list_backbones, list_lines, page_lines

    if name is not None and (one := find_backbone(name)):
        show(one, page_lines(one), as_json)
        return
    found = list_backbones(name)
    show(found, list_lines(found), as_json)
