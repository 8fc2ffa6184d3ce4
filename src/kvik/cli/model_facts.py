"""What `kvik models show` tells of a model: what is in its file, what kvik makes of it, what its cache is like."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from kvik.errors import ModelError
from kvik.files.gguf import GGUFFile, read_gguf
from kvik.hub.folder import model_bytes
from kvik.planner.shape import ModelShape
from kvik.planner.sources import find_shape


def model_facts(name: str, path: Path) -> dict[str, Any]:
    """The facts, as `--json` prints them. Raises `ModelError` for a file that cannot be read at all."""
    shape = find_shape(str(path))
    facts: dict[str, Any] = {
        "name": name,
        "path": str(path),
        "size_bytes": model_bytes(path),
        "runs": shape.runs,
        "why_not": None if shape.runs else _why_not(path),
        "num_layers": shape.num_layers,
        "num_params": shape.num_params,
        "num_active_params": shape.num_active_params if shape.is_mixture else shape.num_params,
        "num_experts": shape.num_experts,
        "num_chosen_experts": shape.num_chosen_experts,
        "context": shape.max_context,
        "vocab_size": shape.vocab_size,
        "cache": _cache(shape),
        "notes": [shape.note] if shape.note else [],
    }
    return facts | (_of_gguf(path, facts["notes"]) if path.is_file() else {})


def _cache(shape: ModelShape) -> dict[str, Any]:
    """Of f16 keys and values."""
    return {
        "token_bytes": shape.token_bytes("f16"),
        "groups": [
            {
                "kind": group.kind,
                "window": group.window,
                "layers": list(group.layers),
                "num_kv_heads": group.num_kv_heads,
                "key_dim": group.key.num_items,
                "value_dim": None if group.value is None else group.value.num_items,
                "token_bytes": group.token_bytes,
            }
            for group in shape.groups
        ],
        "shared_layers": [list(pair) for pair in shape.shared_layers],
    }


def _why_not(path: Path) -> str:
    """The first thing for which kvik refuses to run it."""
    from kvik.models.checkpoint import decoder_parts, read_checkpoint
    from kvik.models.gguf_source import find_tensors
    from kvik.models.gguf_spec import read_spec
    from kvik.models.hf_spec import read_hf_spec

    try:
        if path.is_file():
            file = read_gguf(path)
            find_tensors(file, read_spec(file))
        else:
            checkpoint = read_checkpoint(path)
            decoder_parts(checkpoint, read_hf_spec(checkpoint.config, checkpoint.config_path))
    except ModelError as error:
        return error.message.removeprefix(f"{path}: ")
    raise AssertionError("kvik runs it")


def _of_gguf(path: Path, notes: list[str]) -> dict[str, Any]:
    from kvik.text.tokenizer_gguf import GGUFTokenizer

    file = read_gguf(path)
    types = Counter(tensor.type.name for tensor in file.tensors.values())
    facts: dict[str, Any] = {
        "size_bytes": file.file_bytes,
        "architecture": file.get_str("general.architecture"),
        "tensor_types": dict(types),
    }
    try:
        tokenizer = GGUFTokenizer(file.metadata, path.name)
    except ModelError as error:
        return facts | {"tokenizer": None, "notes": [*notes, error.message]}
    given = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")}
    ends = sorted(tokenizer.eos_token_ids)
    special = {"bos_token_id": tokenizer.bos_token_id, "add_bos": tokenizer.add_bos, "eos_token_ids": ends}
    extra = [*notes, *tokenizer.notes, *_template_notes(file, tokenizer.add_bos, tokenizer.bos_token_id)]
    return facts | {"tokenizer": given | special, "notes": extra}


def _template_notes(file: GGUFFile, add_bos: bool, bos_token_id: int | None) -> list[str]:
    """On the chat template and the token that begins a text."""
    template = file.get_str("tokenizer.chat_template", "")
    if not template:
        return ["no chat template: chats need --template or a model that has one"]
    text = "" if bos_token_id is None else file.get_list("tokenizer.ggml.tokens", str)[bos_token_id]
    if add_bos and "bos_token" not in template and (not text or text not in template):
        return [f"texts begin with {text!r}, which the chat template does not write: kvik puts it there"]
    return []


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [f"{facts['name']}: {facts['path']}, {facts['size_bytes']:,} bytes"]
    if "architecture" in facts:
        types = ", ".join(f"{count} {kind}" for kind, count in facts["tensor_types"].items())
        lines.append(f"architecture {facts['architecture']}, tensors: {types}")
    params = "an unknown number of" if facts["num_params"] is None else f"{facts['num_params']:,}"
    active = ""
    if facts["num_experts"] and facts["num_active_params"] is not None:
        chosen = f"{facts['num_chosen_experts']} of {facts['num_experts']} experts"
        active = f" ({facts['num_active_params']:,} of them for a token, {chosen})"
    lines.append(
        f"{facts['num_layers']} layers, {params} weights{active}, {facts['vocab_size']:,} tokens,"
        f" context {facts['context']:,}"
    )
    lines.append("kvik runs it" if facts["runs"] else f"kvik does not run it: {facts['why_not']}")
    lines.append(f"cache: {facts['cache']['token_bytes']:,} bytes a token in f16")
    for group in facts["cache"]["groups"]:
        window = "" if group["window"] is None else f" {group['window']:,}"
        heads = f"{group['num_kv_heads']} KV heads, keys of {group['key_dim']}, values of {group['value_dim']}"
        lines.append(f"  {len(group['layers'])} layers {group['kind']}{window}: {heads}")
    if shared := facts["cache"]["shared_layers"]:
        lines.append(f"  {len(shared)} layers read the keys and values of others")
    if tokenizer := facts.get("tokenizer"):
        rule = f", words by {tokenizer['pre']}" if tokenizer["pre"] else ""
        begin = f"begins with token {tokenizer['bos_token_id']}" if tokenizer["add_bos"] else "no token before a text"
        lines.append(f"tokenizer: {tokenizer['model']}{rule}; {begin}, ends at {tokenizer['eos_token_ids']}")
    return [*lines, *(f"note: {note}" for note in facts["notes"])]
