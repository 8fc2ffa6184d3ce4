"""`kvik serve`: models behind the HTTP API."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvik.cli.options import (
    ENGINE,
    KV_DTYPE_HELP,
    PACKED_HELP,
    StoreOptions,
    check_count,
    check_utf8,
    spell_out,
    value,
)
from kvik.cli.terminal import note
from kvik.config import ActivationDType, WeightFormat, is_shared, parse_bytes
from kvik.errors import InvalidInput
from kvik.machine import available_memory_bytes, available_threads
from kvik.units import amount

if TYPE_CHECKING:
    from kvik.server.served import ServedModel
    from kvik.server.settings import ServerConfig
    from kvik.server.watch.event_socket import EventSocket
    from kvik.server.watch.kv_events import KVEventFeed

MAX_REPLICAS = 64

SERVER, ACCESS, LIMITS, ROUTERS = "Server", "Who may call it", "Limits", "Routers"


@spell_out
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...", help="Models to serve, each as `kvik run -m` takes it; ALIAS=MODEL names it."
        ),
    ] = None,
    *,
    host: Annotated[str, value(SERVER, "ADDRESS", "Where to listen.", show_default=True)] = "127.0.0.1",
    port: Annotated[int, value(SERVER, "N", "0 takes any free port.", show_default=True)] = 8000,
    replicas: Annotated[
        int, value(SERVER, "N", "Processes that share threads and memory, behind one address.", show_default=True)
    ] = 1,
    log_format: Annotated[
        Literal["text", "json"], value(SERVER, "text|json", "Format of the log.", show_default=True)
    ] = "text",
    drain: Annotated[
        float, value(SERVER, "S", "Seconds that running requests have after SIGTERM.", show_default=True)
    ] = 30.0,
    hang: Annotated[
        float, value(SERVER, "S", "Seconds of a step after which the engine counts as hung.", show_default=True)
    ] = 10.0,
    ping: Annotated[
        float, value(SERVER, "S", "Seconds after which a silent stream gets a comment.", show_default=True)
    ] = 10.0,
    no_access_log: Annotated[
        bool, typer.Option("--no-access-log", help="Log no line for each request.", rich_help_panel=SERVER)
    ] = False,
    api_key: Annotated[
        list[str] | None,
        value(ACCESS, "KEY", "A key, NAME=KEY or @FILE of such lines; may be repeated. Else KVIK_API_KEYS, of lines."),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Listen beyond this machine without asking for a key.", rich_help_panel=ACCESS),
    ] = False,
    shared_cache: Annotated[
        bool, typer.Option("--shared-cache", help="Let all keys share one prefix cache.", rich_help_panel=ACCESS)
    ] = False,
    read_only: Annotated[
        bool,
        typer.Option(
            "--read-only",
            help="The page only shows: it can compute nothing and abort no request.",
            rich_help_panel=ACCESS,
        ),
    ] = False,
    redact: Annotated[
        bool,
        typer.Option("--redact", help="Hide the text of tokens on the page.", rich_help_panel=ACCESS),
    ] = False,
    cors_origin: Annotated[
        list[str] | None, value(ACCESS, "ORIGIN", "Pages that may call it; localhost: those of this machine.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, value(ACCESS, "NAME", "Another name that clients use for this server.")
    ] = None,
    max_body: Annotated[str, value(LIMITS, "SIZE", "Largest body of a request.", show_default=True)] = "16MiB",
    max_running: Annotated[int, value(LIMITS, "N", "Sequences that run at once.", show_default=True)] = 64,
    max_waiting: Annotated[int, value(LIMITS, "N", "Requests that may wait; more get 429.", show_default=True)] = 1024,
    max_prompts: Annotated[
        int, value(LIMITS, "N", "Prompts of one request for completions or embeddings.", show_default=True)
    ] = 2048,
    work_limit: Annotated[
        int, value(LIMITS, "N", "Tokens that one request may ask for, over all completions.", show_default=True)
    ] = 1 << 20,
    pin_share: Annotated[
        float, value(LIMITS, "SHARE", "Share of a cache that pins and breakpoints may keep, 0 to 1.", show_default=True)
    ] = 0.25,
    max_sessions: Annotated[int, value(LIMITS, "N", "Sessions of each key.", show_default=True)] = 256,
    session_ttl: Annotated[
        float, value(LIMITS, "S", "Seconds after which an unused session ends.", show_default=True)
    ] = 3600.0,
    max_remembered: Annotated[
        int, value(LIMITS, "N", "Answers of each key that later ones can be compared with.", show_default=True)
    ] = 1024,
    drop_billing_line: Annotated[
        bool,
        typer.Option(
            "--drop-billing-line",
            help="Leave out of Claude Code's requests the first line, which is another each time and keeps them from"
            " the cache.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    kv_events: Annotated[
        str | None, value(ROUTERS, "ENDPOINT", "Tell routers which blocks are cached, such as at tcp://127.0.0.1:*.")
    ] = None,
    kv_events_replay: Annotated[str | None, value(ROUTERS, "ENDPOINT", "Where they ask for what they missed.")] = None,
    kv_events_topic: Annotated[
        str, value(ROUTERS, "NAME", "What its messages are filed under.", show_default=True)
    ] = "",
    kv_memory: Annotated[
        str, value(ENGINE, "SIZE", "For keys and values of all models, in equal shares.", show_default=True)
    ] = "auto",
    context: Annotated[
        int | None, value(ENGINE, "N", "Most tokens of prompt and answer; default: the model's own limit.")
    ] = None,
    threads: Annotated[int | None, value(ENGINE, "N", "Default: one for each processor.")] = None,
    token_budget: Annotated[int | None, value(ENGINE, "N", "Most tokens that one step computes.")] = None,
    kv_dtype: Annotated[str, value(ENGINE, "TYPE", KV_DTYPE_HELP, show_default=True)] = "f16",
    activations: Annotated[
        ActivationDType, value(ENGINE, "int8|int16", "int16 is slower and as accurate as float32.", show_default=True)
    ] = "int8",
    weights: Annotated[
        WeightFormat | None, value(ENGINE, "q8|q4", "Quantise a checkpoint folder's weights as they are loaded.")
    ] = None,
    packed_cache: Annotated[str | None, value(ENGINE, "DIR", PACKED_HELP)] = None,
    store_options: StoreOptions,
) -> None:
    """Serve models over HTTP: OpenAI's API, Anthropic's, and kvik's own.

    One cache serves all requests; each answer says what was reused. SIGTERM or Ctrl-C ends it when what runs is done.
    """
    from kvik.cli.serve_logs import set_up_logs
    from kvik.server.front.parent import READY, end_with_parent
    from kvik.server.listening import bind
    from kvik.server.origin import MAX_TOKENS_BYTES
    from kvik.server.settings import ServerConfig

    store = store_options.settings()
    is_replica = end_with_parent()
    config = ServerConfig(
        is_replica=is_replica,
        host=host,
        port=port,
        api_keys=read_keys(api_key, os.environ.get("KVIK_API_KEYS", "")),
        no_auth=no_auth,
        shared_cache=shared_cache,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        max_body_bytes=parse_bytes("--max-body", max_body) + (MAX_TOKENS_BYTES if is_replica else 0),
        max_prompts=max_prompts,
        work_limit=work_limit,
        ping_s=ping,
        drain_s=drain,
        hang_s=hang,
        pin_share=pin_share,
        max_sessions=max_sessions,
        session_ttl_s=session_ttl,
        max_remembered=max_remembered,
        log_format=log_format,
        access_log=not no_access_log,
        read_only=read_only,
        redact=redact,
        kv_events=kv_events,
        kv_events_replay=kv_events_replay,
        kv_events_topic=kv_events_topic,
        drop_billing_line=drop_billing_line,
    )
    check_count("--replicas", replicas, 1, MAX_REPLICAS)
    if replicas > 1 and kv_events is not None:
        raise InvalidInput(
            "--kv-events is for routers in front of this server, and with --replicas it has one of its own",
            hint="leave out --replicas and start a server for each replica",
        )
    listening = bind(config.host, config.port)  # before all that takes time: a port that is taken is known at once
    set_up_logs(log_format)
    names = models or ["smollm2"]
    share: int | str = "auto" if kv_memory == "auto" else parse_bytes("--kv-memory", kv_memory) // len(names)
    engine: dict[str, Any] = {
        "kv_memory": share,
        "context": context,
        "threads": threads,
        "kv_dtype": kv_dtype,
        "activations": activations,
        "weights": weights,
        "packed_cache": packed_cache,
        "max_running": max_running,
        "max_waiting": max_waiting,
        **({} if token_budget is None else {"token_budget": token_budget}),
        **store,
    }
    try:
        import msgspec  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InvalidInput(
            f"the server needs {error.name}, which is not installed", hint="pip install 'kvik[server]'"
        ) from None
    if replicas > 1:
        from kvik.server.front.run import serve_replicas

        shares = replica_shares(replicas, threads, kv_memory)
        port = listening.getsockname()[1]
        serve_replicas(
            config,
            listening,
            [replica_command(sys.argv[1:], *each) for each in shares],
            lambda: welcome_front(config, port, shares),
        )
        return
    from kvik.server.run import serve as run_server
    from kvik.server.served import Models
    from kvik.server.state import ServerState

    state = ServerState(config)
    state.events = event_feed(config, len(names))

    def load_all() -> Models:
        loaded = load(names, **engine)
        if state.events is not None:
            state.events.watch(loaded[0].llm.engine)
        if store_options.store is not None:
            from kvik.engine.open_store import salts_secret

            state.secret = salts_secret(loaded[0].llm.config)
        return Models(loaded)

    port = listening.getsockname()[1]
    run_server(
        state,
        listening,
        load=load_all,
        on_ready=lambda: (
            note(READY.format(port)) if is_replica else welcome(config, port, list(state.models), state.events)
        ),
    )


def replica_shares(num_replicas: int, threads: int | None, kv_memory: str) -> list[tuple[int, int]]:
    """Threads and bytes for keys and values of each replica: all that there is, divided."""
    num_threads = threads or available_threads()
    if num_threads < num_replicas:
        raise InvalidInput(
            f"--replicas is {num_replicas}, and there are {num_threads} threads", hint="give each replica one at least"
        )
    num_bytes = available_memory_bytes() // 2 if kv_memory == "auto" else parse_bytes("--kv-memory", kv_memory)
    return [
        (num_threads // num_replicas + (index < num_threads % num_replicas), max(1, num_bytes // num_replicas))
        for index in range(num_replicas)
    ]


def replica_command(arguments: list[str], threads: int, kv_bytes: int) -> list[str]:
    """The command of a replica: this process's own, with its share, on a port of its own."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own = ["--host", "127.0.0.1", "--port", "0", "--replicas", "1", "--no-access-log"]
    own += ["--threads", str(threads), "--kv-memory", str(kv_bytes)]
    # The last of an option's values counts.
    return [sys.executable, "-m", "kvik", *arguments[:at], *own, *arguments[at:]]


def welcome_front(config: ServerConfig, port: int, shares: list[tuple[int, int]]) -> None:
    """Where it is, what each replica has, and how it is watched."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host if config.host not in ('0.0.0.0', '::') else '127.0.0.1'}:{port}"
    least, most = shares[-1][0], shares[0][0]
    threads = f"{most} thread{'s' * (most > 1)}" if least == most else f"{least} or {most} threads"
    note(f"kvik serves at {url}/v1 through {len(shares)} replicas")
    note(f"  Each has {threads} and {amount(shares[0][1])} for keys and values")
    note(f"  Watch {url}/health; SIGHUP restarts them one by one, Ctrl-C ends all when what runs is done")


def event_feed(config: ServerConfig, num_models: int) -> KVEventFeed | None:
    """What routers will hear, where they are to hear something."""
    if config.kv_events is None:
        return None
    if num_models > 1:
        raise InvalidInput(
            f"--kv-events tells of the blocks of one model, and {num_models} are served",
            hint="start a server for each model",
        )
    from kvik.server.watch.event_socket import EventSocket
    from kvik.server.watch.kv_events import KVEventFeed

    return KVEventFeed(EventSocket(config.kv_events, config.kv_events_replay, config.kv_events_topic))


def load(names: list[str], **engine: Any) -> list[ServedModel]:
    """All models, by the names that they are served by; of memory of automatic size each gets its share."""
    from kvik.engine.llm import LLM
    from kvik.server.served import ServedModel

    loaded = [(*alias_of(name), LLM(model_of(name), **engine)) for name in names]
    share = available_memory_bytes() // 2 // len(loaded)
    for _, _, llm in loaded:
        if engine["kv_memory"] == "auto" and len(loaded) > 1 and llm.cache.num_bytes > share:
            llm.engine = llm.new_engine(kv_memory=share)
    return [
        ServedModel(alias, llm, aliases=[*([] if model is None else [model]), llm.model.path.stem])
        for alias, model, llm in loaded
    ]


def model_of(name: str) -> str:
    """The model of an argument, without the alias that it may have."""
    return name if Path(name).exists() else name.partition("=")[2] or name


def alias_of(name: str) -> tuple[str, str | None]:
    """What a model of the command line is called, and its name where that is not a path of this machine's."""
    alias, equals, model = name.partition("=")
    if not equals or Path(name).exists():
        equals, alias, model = "", name, name
    is_path = model.endswith(".gguf") or Path(model).exists()
    if not equals and is_path:
        alias = Path(model).stem if model.endswith(".gguf") else Path(model).resolve().name
    return alias, None if is_path else model


def read_keys(given: list[str] | None, environment: str) -> Mapping[str, str]:
    """Keys with the names of whom they were given to; those that have none are numbered."""
    lines: list[str] = []
    for each in given or environment.splitlines():
        if each.startswith("@"):
            path = Path(each[1:])
            try:
                data = path.read_bytes()
            except OSError as error:
                raise InvalidInput(
                    f"cannot read the keys in {path}: {error.strerror}", hint="give @FILE, lines of NAME=KEY"
                ) from error
            lines += check_utf8(str(path), data).splitlines()
        else:
            lines.append(each)
    keys: dict[str, str] = {}
    for line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = line.partition("=")
        if not key.strip("=") or not re.fullmatch(r"[\w .@-]+", name):  # the sign is the key's own, as at base64's end
            name, key = f"key {len(keys) + 1}", line
        if key in keys:
            raise InvalidInput(f"an API key is given twice, to {keys[key]!r} and {name!r}", hint="leave out one")
        keys[key] = name
    return keys


def welcome(config: ServerConfig, port: int, served: list[ServedModel], events: KVEventFeed | None = None) -> None:
    """One screen of 80 columns: where it is, what it serves, how it is watched and called."""
    from kvik.store.resp import parse_address

    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host if config.host not in ('0.0.0.0', '::') else '127.0.0.1'}:{port}"
    note(f"kvik serves at {url}/v1" + ("" if config.is_local else f" and listens on {host}"))
    note(f"  Talk to it and watch its cache: {url}/")
    for model in served:
        cache, weights = model.llm.cache, model.llm.model.decoder.weights
        note(f"  {model.id}" + (f" (or {', '.join(model.aliases)})" if model.aliases else ""))
        note(
            f"    context {model.llm.model.context:,}; weights {amount(weights.num_bytes)}, cache"
            f" {amount(cache.num_bytes)} for {cache.num_blocks * model.llm.engine.kv_spec.block_size:,} tokens"
        )
        note(f"    grammars at most {amount(model.llm.max_grammar_bytes)} more, where requests have any")
        if (store := model.llm.config.store) is not None:
            where = str(parse_address(store)) if is_shared(store) else store
            note(f"    stores what it computes in {where}: keys and values, which reveal prompts")
    if events is not None:
        tell_events(config, events.socket)
    num_keys = len(config.api_keys)
    who = "with a key" if num_keys == 1 else f"with one of {num_keys} keys" if num_keys else "by anybody who reaches it"
    note(f"  Called {who}. All routes: {url}/docs")
    note("  Watch /health, /metrics and this log; Ctrl-C ends it when what runs is done")
    if num_keys:
        note("  For this line, kvik run --url and kvik bench --url: export KVIK_API_KEY=KEY")
    key = ' -H "Authorization: Bearer $KVIK_API_KEY"' if num_keys else ""
    if served[0].llm.is_chat_model:
        path, data = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}'
    else:
        path, data = "completions", '{"prompt": "Once upon a time", "max_tokens": 32}'
    note(f"Try: curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{data}'")


def tell_events(config: ServerConfig, events: EventSocket) -> None:
    """Where routers hear of blocks, and what that gives away."""
    replay = "" if events.replay_address is None else f", repeated at {events.replay_address}"
    note(f"  Tells routers of cached blocks at {events.address}{replay}")
    if events.is_exposed:
        note("    who reads that reads the tokens of all prompts that have no salt")
    if config.api_keys and not config.shared_cache:
        note("    but of none so far: each key's blocks are its own (--shared-cache lets all keys share)")
