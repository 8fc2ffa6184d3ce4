"""A small random model whose chat template writes tool calls as Hermes does, or any other template."""

from __future__ import annotations

from pathlib import Path

from checkpoints import tiny_config, tiny_tensors, write_checkpoint
from tool_templates import SUPPORTED, ToolTemplate, make


def write_tool_model(folder: Path, made: ToolTemplate = SUPPORTED["qwen2.5"]) -> Path:
    """Its checkpoint folder."""
    template, tokenizer = make(folder / "tokenizer", made)
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    write_checkpoint(folder, config, tiny_tensors(config, seed=3))
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / path.name)
    (folder / "chat_template.jinja").write_text(template.source)
    return folder
