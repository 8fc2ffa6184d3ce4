"""`kvik plan`: what a model needs, what fits, how fast it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvik.cli.options import KV_DTYPE_HELP, flag, parse_list, value
from kvik.cli.report import write_report
from kvik.cli.terminal import write
from kvik.errors import InvalidInput

LOAD, MACHINE, OUTPUT = "What is served", "On what", "Output"
MAX_COMPARED = 20


def plan(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A catalogue name, .gguf path, folder with config.json, or Hub id.")
    ] = "smollm2",
    context: Annotated[int | None, value(LOAD, "N", "Tokens of a sequence; default: the model's limit.")] = None,
    users: Annotated[int, value(LOAD, "N", "Sequences at once.", show_default=True)] = 1,
    prefix: Annotated[int, value(LOAD, "N", "First tokens that all of them share.", show_default=True)] = 0,
    replicas: Annotated[int, value(LOAD, "N", "Processes among which the users are divided.", show_default=True)] = 1,
    kv: Annotated[str, value(LOAD, "TYPE", KV_DTYPE_HELP, show_default=True)] = "f16",
    weights: Annotated[str | None, value(LOAD, "TYPE", "Like bf16, q8_0, q4_k; else the file's, or bf16.")] = None,
    memory: Annotated[
        str | None, value(MACHINE, "SIZE", "The memory that it must fit into, like 24GB or 16GiB.")
    ] = None,
    device: Annotated[
        str | None, value(MACHINE, "NAME", "Like h100, 4090, m2-ultra; `here` measures this machine.")
    ] = None,
    compare: Annotated[str | None, value(OUTPUT, "A,B,…", "Compare these models, instead of MODEL.")] = None,
    plot: Annotated[Path | None, value(OUTPUT, "FILE", "Draw memory by context as .png or .svg.")] = None,
    list_all: Annotated[
        Literal["models", "devices"] | None, value(OUTPUT, "models|devices", "List the catalogue.", "--list")
    ] = None,
    as_json: Annotated[bool, flag(OUTPUT, "--json", "Print one JSON object.")] = False,
) -> None:
    """Plan before loading: memory, what fits and speed, without the weights and without the network."""
    if plot is not None:
        from kvik.cli.plot import check_plot_path

        check_plot_path("--plot", plot)
    from kvik.cli import plan_report, plan_view

    if list_all is not None:
        listed = plan_report.listing(list_all)
        if as_json:
            write_report(listed)
        else:
            write("\n".join(plan_view.listing_lines(list_all)) + "\n")
        return
    from kvik.planner.plan import Plan, plan_shape
    from kvik.planner.sources import find_shape

    def planned(shape_name: str, tokens: int | None) -> Plan:
        return plan_shape(
            find_shape(shape_name),
            context=tokens,
            users=users,
            kv=kv,
            weights=weights,
            memory=memory,
            device=device,
            prefix=prefix,
            replicas=replicas,
        )

    if compare is None:
        plans = [planned(model, context)]
    else:
        if model != "smollm2":
            raise InvalidInput(f"--compare takes the place of MODEL, {model:.60}", hint="put it among those compared")
        names = parse_list("--compare", compare)
        if len(names) > MAX_COMPARED:
            raise InvalidInput(f"--compare has {len(names)} models", hint=f"give at most {MAX_COMPARED}")
        # Side by side they have the same context: the shortest of their own.
        tokens = context if context is not None else min(find_shape(name).max_context for name in names)
        plans = [planned(name, tokens) for name in names]
    if plot is not None:
        from kvik.cli.plan_plot import draw

        draw(plot, plans)
    if as_json:
        write_report(plan_report.comparison_report(plans) if compare else plan_report.plan_report(plans[0]))
    else:
        write("\n".join(plan_view.comparison_lines(plans) if compare else plan_view.plan_lines(plans[0])) + "\n")
