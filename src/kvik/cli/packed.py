"""`kvik cache packed`: which models' packed weights are kept, and how to be rid of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from kvik.cli.options import packed_folder
from kvik.cli.terminal import columns, seconds, write
from kvik.units import amount


def packed(
    folder: Annotated[
        str | None, typer.Option("--packed-cache", metavar="DIR", help="The folder; else kvik's cache folder.")
    ] = None,
    remove: Annotated[bool, typer.Option("--rm", help="Remove them all: the next start packs again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models whose packed weights --packed-cache keeps."""
    from kvik.store.packed import packed_files

    views = packed_files(packed_folder() if folder is None else Path(folder).expanduser())
    if remove:
        for view in views:
            view.path.unlink(missing_ok=True)
    if as_json:
        told = [
            {"path": str(view.path), "model": view.model, "layout_version": view.layout_version}
            | {"num_bytes": view.num_bytes, "last_used_s": view.used_s, "removed": remove}
            for view in views
        ]
        write(json.dumps(told, indent=2) + "\n")
        return
    rows = [("MODEL", "LAYOUT", "SIZE", "LAST USED")]
    for view in views:
        age = f"{seconds(max(0.0, time.time() - view.used_s))} ago"
        rows.append((Path(view.model).name[:60], str(view.layout_version), amount(view.num_bytes), age))
    write("".join(f"{line}\n" for line in columns(rows, left=1)))
    if remove:
        write(f"{len(views):,} files removed, {amount(sum(view.num_bytes for view in views))} freed\n")
