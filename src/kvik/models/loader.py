"""From a GGUF file to a decoder that runs: names, shapes and numbers are checked before any is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvik.errors import InvalidInput, ModelError
from kvik.models.chat_template import ChatTemplate
from kvik.models.decoder import Decoder, DecoderWeights, LayerWeights
from kvik.models.gguf import GGUFFile, GGUFTensor, dequantize, read_gguf
from kvik.models.spec import DecoderSpec, RopeSpec
from kvik.models.tokenizer import Tokenizer
from kvik.models.tokenizer_gguf import GGUFTokenizer
from kvik.ops.base import Norm, Ops, QKVWeights, Weight

ARCHITECTURES = ("llama",)
PLAIN_TYPES = ("F32", "F16", "BF16")
QUANTIZED_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types that the packed weights hold exactly; a tensor of any other type is refused."""

MOST = 1 << 24  # of any one dimension or count: far above every published model
MOST_HEAD_DIM = 1024


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    context: int  # most tokens of a sequence


Approve = Callable[[DecoderSpec, int], None]
"""Called with the decoder's shape and the context before anything large is allocated; may raise."""


def load_model(
    path: Path,
    ops: Ops,
    *,
    context: int | None = None,
    approve: Approve = lambda spec, context: None,
) -> LoadedModel:
    """Read, check and pack a GGUF model; `context` None means the model's own. Raises `ModelError`, `InvalidInput`."""
    file = read_gguf(path)
    spec = read_spec(file)
    if context is None:
        context = spec.context_length
    if context > spec.context_length:
        raise InvalidInput(
            f"context is {context:,}, {path.name} was made for {spec.context_length:,} tokens",
            hint=f"give at most {spec.context_length}",
        )
    approve(spec, context)
    tokenizer = GGUFTokenizer(file.metadata, path.name)
    if tokenizer.vocab_size != spec.vocab_size:
        raise ModelError(
            f"{path}: the vocabulary has {tokenizer.vocab_size:,} tokens, the embedding {spec.vocab_size:,} rows",
            hint="the file's parts do not belong together; take another GGUF of this model",
        )
    weights = _WeightReader(file, spec, ops).read()
    return LoadedModel(
        path=path,
        decoder=Decoder(spec, weights, ops, spec.rope.table(context)),
        tokenizer=tokenizer,
        chat_template=_chat_template(file, tokenizer),
        context=context,
    )


def read_spec(file: GGUFFile) -> DecoderSpec:
    """The decoder's shape from the metadata. Raises `ModelError` for what kvik does not run."""
    architecture = file.get_str("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: architecture {architecture!r:.60} is not one that kvik runs",
            hint=f"kvik runs {', '.join(ARCHITECTURES)}: SmolLM, SmolLM2, Llama, TinyLlama, Mistral and their kin",
        )

    def count(key: str, default: int | None = None, *, most: int = MOST) -> int:
        return file.get_int(f"{architecture}.{key}", default, minimum=1, maximum=most)

    hidden_size = count("embedding_length")
    num_heads = count("attention.head_count", most=hidden_size)
    num_kv_heads = count("attention.head_count_kv", num_heads, most=num_heads)
    head_dim = count("attention.key_length", max(1, hidden_size // num_heads), most=MOST_HEAD_DIM)
    rope_dims = count("rope.dimension_count", head_dim, most=head_dim)
    embedding = _tensor(file, "token_embd.weight")
    spec = DecoderSpec(
        architecture=architecture,
        num_layers=count("block_count", most=1 << 16),
        hidden_size=hidden_size,
        intermediate_size=count("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        context_length=count("context_length"),
        norm_eps=file.get_float(f"{architecture}.attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0),
        rope=RopeSpec(
            theta=file.get_float(f"{architecture}.rope.freq_base", 10_000.0, minimum=1.0, maximum=1e12),
            num_dims=rope_dims,
            adjacent_pairs=True,  # the converter of Llama-family files reorders q and k rows for it
            factors=_rope_factors(file, architecture, rope_dims // 2),
        ),
        tied_head="output.weight" not in file.tensors,
    )
    _check_supported(file, spec, value_dim=count("attention.value_length", head_dim))
    return spec


def _check_supported(file: GGUFFile, spec: DecoderSpec, *, value_dim: int) -> None:
    def refuse(what: str) -> ModelError:
        return ModelError(f"{file.path}: {what}", hint="take a model that kvik runs: `kvik models ls` shows some")

    if spec.num_heads % spec.num_kv_heads:
        raise refuse(f"{spec.num_heads} query heads do not divide among {spec.num_kv_heads} KV heads")
    if spec.head_dim % 8 or value_dim != spec.head_dim:
        raise refuse(f"head_dim {spec.head_dim} (values {value_dim}) must be one multiple of 8 for keys and values")
    if spec.rope.num_dims % 2:
        raise refuse(f"rope.dimension_count {spec.rope.num_dims} is odd")
    if file.get_int(f"{spec.architecture}.expert_count", 0):
        raise refuse("a mixture of experts, which kvik does not run yet")
    window = file.get_int(f"{spec.architecture}.attention.sliding_window", 0)
    if 0 < window < spec.context_length:
        raise refuse(f"a sliding window of {window:,} tokens, which kvik does not run yet")


def _rope_factors(file: GGUFFile, architecture: str, num_pairs: int) -> tuple[float, ...] | float:
    """Linear scaling divides all frequencies alike; Llama 3's own file has a divisor for each."""
    factor_key = f"{architecture}.rope.scaling.factor"
    if factor_key not in file.metadata:
        factor_key = f"{architecture}.rope.scale_linear"  # of files from before 2024
    kind = file.get_str(f"{architecture}.rope.scaling.type", "linear" if factor_key in file.metadata else "none")
    if kind not in ("none", "linear"):
        raise ModelError(
            f"{file.path}: rope scaling {kind!r:.60} is not one that kvik runs",
            hint="kvik runs none, linear and llama3",
        )
    factor = 1.0
    if kind == "linear":
        factor = file.get_float(factor_key, 1.0, minimum=1e-3, maximum=1e6)
    if "rope_freqs.weight" not in file.tensors:
        return factor
    factors = _vector(file, "rope_freqs.weight", num_pairs)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(
            f"{file.path}: tensor 'rope_freqs.weight' holds values that are not positive numbers",
            hint="the file is damaged; download it again",
        )
    return tuple(factor * value for value in factors.tolist())


class _WeightReader:
    """Takes tensors by name and checks that each is what the decoder needs."""

    def __init__(self, file: GGUFFile, spec: DecoderSpec, ops: Ops) -> None:
        self.file = file
        self.spec = spec
        self.ops = ops

    def read(self) -> DecoderWeights:
        spec = self.spec
        self.check_names()
        embedding = self.matrix("token_embd.weight", spec.vocab_size, spec.hidden_size)
        return DecoderWeights(
            embedding=embedding,
            layers=[self.layer(index) for index in range(spec.num_layers)],
            norm=self.norm("output_norm.weight"),
            lm_head=embedding if spec.tied_head else self.matrix("output.weight", spec.vocab_size, spec.hidden_size),
        )

    def layer(self, index: int) -> LayerWeights:
        spec = self.spec
        q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

        def matrix(name: str, rows: int, columns: int) -> Weight:
            return self.matrix(f"blk.{index}.{name}.weight", rows, columns)

        return LayerWeights(
            attn_norm=self.norm(f"blk.{index}.attn_norm.weight"),
            qkv=QKVWeights(
                query=matrix("attn_q", q_rows, spec.hidden_size),
                key=matrix("attn_k", kv_rows, spec.hidden_size),
                value=matrix("attn_v", kv_rows, spec.hidden_size),
                head_dim=spec.head_dim,
            ),
            o_proj=matrix("attn_output", spec.hidden_size, q_rows),
            mlp_norm=self.norm(f"blk.{index}.ffn_norm.weight"),
            gate_proj=matrix("ffn_gate", spec.intermediate_size, spec.hidden_size),
            up_proj=matrix("ffn_up", spec.intermediate_size, spec.hidden_size),
            down_proj=matrix("ffn_down", spec.hidden_size, spec.intermediate_size),
        )

    def check_names(self) -> None:
        """A tensor that the decoder would not use means that it is not the decoder that the file was made for."""
        known = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}
        parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
        known |= {f"blk.{index}.{part}.weight" for index in range(self.spec.num_layers) for part in parts}
        for name in self.file.tensors:
            if name not in known:
                raise ModelError(
                    f"{self.file.path}: tensor {name!r:.80} has no place in a {self.spec.architecture} decoder"
                    f" of {self.spec.num_layers} layers",
                    hint="the model has a part that kvik does not run yet; take another model",
                )

    def matrix(self, name: str, rows: int, columns: int) -> Weight:
        tensor = _tensor(self.file, name)
        _check_shape(self.file, tensor, (rows, columns))
        _check_type(self.file, tensor, PLAIN_TYPES + QUANTIZED_TYPES)
        weight = self.ops.load_weight(tensor.type.name, tensor.data, rows, columns)
        self.file.drop_pages(tensor)  # packed, it lies in memory twice
        return weight

    def norm(self, name: str) -> Norm:
        return Norm(_vector(self.file, name, self.spec.hidden_size), self.spec.norm_eps)


def _tensor(file: GGUFFile, name: str) -> GGUFTensor:
    if name not in file.tensors:
        raise ModelError(f"{file.path}: tensor {name!r} is missing", hint="the file is not whole; download it again")
    return file.tensors[name]


def _check_shape(file: GGUFFile, tensor: GGUFTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ModelError(
            f"{file.path}: tensor {tensor.name!r} has shape {tensor.shape}, the metadata asks for {shape}",
            hint="the file's parts do not belong together; take another GGUF of this model",
        )


def _check_type(file: GGUFFile, tensor: GGUFTensor, allowed: tuple[str, ...]) -> None:
    if tensor.type.name not in allowed:
        raise ModelError(
            f"{file.path}: tensor {tensor.name!r} is of type {tensor.type.name}, which kvik does not run",
            hint=f"take a file of one of these types: {', '.join(allowed)}",
        )


def _vector(file: GGUFFile, name: str, length: int) -> npt.NDArray[np.float32]:
    tensor = _tensor(file, name)
    _check_shape(file, tensor, (length,))
    _check_type(file, tensor, PLAIN_TYPES)
    return np.array(dequantize(tensor))  # a view would keep the file mapped, a run of pages for each vector


def _chat_template(file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate | None:
    source = file.get_str("tokenizer.chat_template", "")
    if not source:
        return None

    def text(key: str) -> str:
        token_id = file.get_int(f"tokenizer.ggml.{key}_token_id", -1)
        return tokenizer.token_text(token_id) if 0 <= token_id < tokenizer.vocab_size else ""

    return ChatTemplate(source, bos_token=text("bos"), eos_token=text("eos"), name=file.path.name)
