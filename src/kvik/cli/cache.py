"""`kvik cache`: what is stored of earlier runs, whether it is as it should be, and how to be rid of it."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.options import FolderCommand, store_folder
from kvik.cli.terminal import columns, note, seconds, write
from kvik.config import is_shared, parse_bytes
from kvik.errors import InvalidInput
from kvik.units import amount

if TYPE_CHECKING:
    from kvik.store.inventory import ScopeView

app = typer.Typer(no_args_is_help=True, help="See, check and remove what --store keeps between runs.")

Folder = Annotated[str | None, typer.Option("--store", metavar="[DIR]", help="The folder; else kvik's cache folder.")]
Key = Annotated[str | None, typer.Option("--store-key", metavar="FILE", help="The secret that blocks are sealed with.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("ls", cls=FolderCommand)
def list_stored(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the models of which blocks are stored."""
    views = _scopes(_root(folder))
    if as_json:
        _write_json([_told(view) for view in views])
        return
    rows = [("SCOPE", "MODEL", "KV", "BLOCKS", "SIZE", "SESSIONS", "LAST USED")]
    for view in views:
        age = "-" if view.last_used_s is None else f"{seconds(max(0.0, time.time() - view.last_used_s))} ago"
        kv_dtype = str(view.about.get("kv_dtype", "-"))[:8]
        counts = (f"{view.num_blocks:,}", amount(view.num_bytes), f"{view.num_sessions:,}")
        rows.append((view.scope[:8], view.model[:60], kv_dtype, *counts, age))
    write("".join(f"{line}\n" for line in columns(rows, left=3)))


@app.command(cls=FolderCommand)
def stats(folder: Folder = None, as_json: AsJson = False) -> None:
    """Count what is stored, over all models."""
    root = _root(folder)
    views = _scopes(root)
    report = {
        "store": str(root),
        "num_models": len(views),
        "num_blocks": sum(view.num_blocks for view in views),
        "num_bytes": sum(view.num_bytes for view in views),
        "num_sessions": sum(view.num_sessions for view in views),
        "num_quarantined": sum(view.num_quarantined for view in views),
        "disk_free_bytes": shutil.disk_usage(root).free if root.exists() else None,
    }
    if as_json:
        _write_json(report)
        return
    write(
        f"{root}\n{report['num_blocks']:,} blocks of {len(views):,} models, {amount(report['num_bytes'])};"  # type: ignore[arg-type]
        f" {report['num_sessions']:,} saved sessions; {report['num_quarantined']:,} files put aside as damaged\n"
    )


@app.command(cls=FolderCommand)
def verify(
    folder: Folder = None,
    key: Key = None,
    recompute: Annotated[
        int, typer.Option(metavar="N", help="Compute N random blocks again, and compare bit by bit.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Choose the same random blocks again.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every stored block again and check its tag; put aside what is bad, and end with 1 where anything was."""
    from kvik.cache import Identity
    from kvik.engine.open_store import read_secret
    from kvik.store import Fault
    from kvik.store.inventory import verify as verify_scope

    root = _root(folder)
    views = _scopes(root)
    secret = Identity(secret=b"" if key is None else read_secret(Path(key)))
    started_s = time.perf_counter()
    found = [verify_scope(root, view.scope, secret.key(b"tag")) for view in views]
    verify_s = time.perf_counter() - started_s
    faults: Counter[Fault] = sum((each.faults for each in found), Counter())
    foreign = faults.pop(Fault.ALGORITHM, 0)
    num_bytes = sum(each.num_bytes for each in found)
    report: dict[str, Any] = {
        "num_blocks": sum(each.num_blocks for each in found),
        "num_bytes": num_bytes,
        "verify_s": verify_s,
        "bytes_per_s": num_bytes / verify_s,
        "num_of_another_secret": foreign,
        "faults": {fault.name.lower(): count for fault, count in faults.items()},
        "num_recomputed": 0,
        "num_different": 0,
        "num_not_computable": 0,
    }
    if recompute:
        _recompute(root, views, recompute, random.Random(seed), key, report)
    is_good = not faults and not report["num_different"]
    if as_json:
        _write_json(report)
    else:
        write(
            f"{report['num_blocks']:,} blocks, {amount(num_bytes)} in {seconds(verify_s)}"
            f" ({report['bytes_per_s'] / 1e6:,.0f} MB/s): {sum(faults.values()):,} bad"
            + (f", {foreign:,} sealed with another secret" if foreign else "")
            + "".join(f"\n  {count:,}: {fault}" for fault, count in faults.items())
            + "\n"
        )
        if recompute:
            write(
                f"{report['num_recomputed']:,} computed again: {report['num_different']:,} differ"
                f"; of {report['num_not_computable']:,} the beginning is not stored\n"
            )
    if not is_good:
        raise typer.Exit(1)


@app.command("gc", cls=FolderCommand)
def collect(
    folder: Folder = None,
    quota: Annotated[str, typer.Option(metavar="SIZE", help="Keep at most so much, the blocks used last.")] = "2GB",
    as_json: AsJson = False,
) -> None:
    """Remove what is beyond a quota, and what killed processes left."""
    from kvik.store.files import VERSION_FOLDER
    from kvik.store.sweep import sweep

    root = _root(folder)
    num_bytes = parse_bytes("--quota", quota)
    if not (root / VERSION_FOLDER).is_dir():
        raise _nothing(root)
    swept = sweep(root / VERSION_FOLDER, num_bytes)
    if swept is None:
        raise InvalidInput(f"another process sweeps {root} now", hint="try again when it is done")
    if as_json:
        _write_json(asdict(swept))
        return
    write(f"{swept.num_removed:,} files removed, {amount(swept.removed_bytes)} freed\n")


@app.command("rm", cls=FolderCommand)
def remove(
    scope: Annotated[
        str | None, typer.Argument(metavar="SCOPE", help="As `kvik cache ls` shows it; the first digits are enough.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All models.")] = False,
    folder: Folder = None,
) -> None:
    """Remove all blocks and saved sessions of a model."""
    from kvik.store.inventory import remove_scope

    root = _root(folder)
    views = _scopes(root)
    if everything == (scope is not None):
        raise InvalidInput("kvik cache rm takes a SCOPE or --all", hint="`kvik cache ls` shows them")
    chosen = [view for view in views if everything or (scope and view.scope.startswith(scope))]
    if not everything and len(chosen) != 1:
        raise InvalidInput(
            f"{len(chosen):,} scopes begin with {scope!r:.40}", hint="`kvik cache ls` shows them; name one"
        )
    for view in chosen:
        remove_scope(root, view.scope)
        note(f"{view.scope[:8]} ({view.model}): {view.num_blocks:,} blocks removed, {amount(view.num_bytes)} freed")


def _recompute(
    root: Path, views: list[ScopeView], count: int, chance: random.Random, key: str | None, report: dict[str, Any]
) -> None:
    from kvik.engine.recompute import is_as_computed, recomputing_engine
    from kvik.store.inventory import block_files

    paths = [(view, path) for view in views for path in block_files(root, view.scope)]
    chosen = chance.sample(sorted(paths, key=lambda each: each[1]), min(count, len(paths)))
    for view in views:
        digests = [bytes.fromhex(Path(path).name) for of, path in chosen if of is view]
        llm = _model_of(view, root, key) if digests else None
        if llm is None or llm.engine.tier is None:
            report["num_not_computable"] += len(digests)
            continue
        engine = recomputing_engine(llm)
        for digest in digests:
            match is_as_computed(engine, llm.engine.tier.store, digest):
                case None:
                    report["num_not_computable"] += 1
                case is_same:
                    report["num_recomputed"] += 1
                    report["num_different"] += not is_same
                    if not is_same:
                        note(f"{digest.hex()}: its bytes are not those that the model computes")


def _model_of(view: ScopeView, root: Path, key: str | None) -> Any:
    """The model that wrote these blocks, if it is still there and is run as it was then."""
    from kvik.engine.llm import LLM
    from kvik.errors import KvikError

    names = ("kv_dtype", "activations", "weights", "backend", "context")
    settings = {name: view.about.get(name) for name in names if view.about.get(name) is not None}
    try:
        llm = LLM(Path(str(view.about.get("model"))), store=root, store_key=key, **settings)
    except KvikError as error:
        note(f"{view.model}: cannot be loaded: {error.message}")
        return None
    if llm.engine.cache.scope.hex() != view.scope:
        note(f"{view.model}: has changed since, or kvik has: its stored blocks are not used any more")
        return None
    return llm


def _root(folder: str | None) -> Path:
    if folder is not None and is_shared(folder):
        raise InvalidInput("kvik cache shows folders, no servers", hint="ask the server itself: redis-cli INFO memory")
    return store_folder() if folder is None else Path(folder).expanduser()


def _scopes(root: Path) -> list[ScopeView]:
    from kvik.store.inventory import scopes

    return scopes(root)


def _nothing(root: Path) -> InvalidInput:
    return InvalidInput(f"nothing is stored in {root}", hint="`kvik run --store` and `kvik serve --store` store blocks")


def _told(view: ScopeView) -> dict[str, Any]:
    return asdict(view) | {"model": view.model}


def _write_json(report: Any) -> None:
    write(json.dumps(report, indent=2) + "\n")
