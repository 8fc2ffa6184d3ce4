"""A small random model whose chat template writes tool calls as Hermes does."""

from __future__ import annotations

from pathlib import Path

from checkpoints import tiny_config, tiny_tensors, write_checkpoint
from tool_templates import SUPPORTED, make


def write_tool_model(folder: Path) -> Path:
    """Its checkpoint folder."""
    template, tokenizer = make(folder / "tokenizer", SUPPORTED["qwen2.5"])
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    write_checkpoint(folder, config, tiny_tensors(config, seed=3))
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / path.name)
    (folder / "chat_template.jinja").write_text(template.source)
    return folder
