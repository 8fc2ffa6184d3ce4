"""What a GGUF file holds, as a decoder's shape and its tensors: checked before any of it is used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvik.errors import ModelError
from kvik.models.gguf import GGUFFile, GGUFTensor, dequantize
from kvik.models.spec import DecoderSpec, LayerSpec, RopeSpec
from kvik.ops.base import Ops, Vector, Weight

ARCHITECTURES = ("llama",)
PLAIN_TYPES = ("F32", "F16", "BF16")
QUANTIZED_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types that the packed weights hold exactly; a tensor of any other type is refused."""

MOST = 1 << 24  # of any one dimension or count: far above every published model
MOST_HEAD_DIM = 1024
MOST_LAYERS = 1 << 12


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
    rope = RopeSpec(
        theta=file.get_float(f"{architecture}.rope.freq_base", 10_000.0, minimum=1.0, maximum=1e12),
        num_dims=rope_dims,
        adjacent_pairs=True,  # the converter of Llama-family files reorders q and k rows for it
        factors=_rope_factors(file, architecture, rope_dims // 2),
    )
    spec = DecoderSpec(
        architecture=architecture,
        layers=(LayerSpec(rope),) * count("block_count", most=MOST_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=count("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        context_length=count("context_length"),
        norm_eps=file.get_float(f"{architecture}.attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0),
        tied_head="output.weight" not in file.tensors,
    )
    _check_supported(file, spec, value_dim=count("attention.value_length", head_dim))
    return spec


def _check_supported(file: GGUFFile, spec: DecoderSpec, *, value_dim: int) -> None:
    def refuse(what: str) -> ModelError:
        return ModelError(f"{file.path}: {what}", hint="take a model that kvik runs: `kvik models ls` shows some")

    if problem := spec.problem():
        raise refuse(problem)
    if value_dim != spec.head_dim:
        raise refuse(f"keys have {spec.head_dim} dimensions, values {value_dim}: they must have as many")
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


class GGUFSource:
    """The tensors of a GGUF file, under the names that it gives them."""

    def __init__(self, file: GGUFFile, spec: DecoderSpec, ops: Ops) -> None:
        self.file = file
        self.spec = spec
        self.ops = ops
        self.shapes = spec.tensors()
        self._check_names()

    def _check_names(self) -> None:
        """A tensor that the decoder would not use means that it is not the decoder that the file was made for."""
        for name in self.file.tensors:
            if name not in self.shapes and name != "rope_freqs.weight":
                raise ModelError(
                    f"{self.file.path}: tensor {name!r:.80} has no place in a {self.spec.architecture} decoder"
                    f" of {self.spec.num_layers} layers",
                    hint="the model has a part that kvik does not run yet; take another model",
                )
        for name, shape in self.shapes.items():
            tensor = _tensor(self.file, name)
            _check_shape(self.file, tensor, shape)
            _check_type(self.file, tensor, PLAIN_TYPES + QUANTIZED_TYPES if len(shape) == 2 else PLAIN_TYPES)

    def matrix(self, name: str) -> Weight:
        """A matrix, packed; the file's own pages are dropped."""
        tensor = self.file.tensors[name]
        weight = self.ops.load_weight(tensor.type.name, tensor.data, *self.shapes[name])
        self.file.drop_pages(tensor)  # packed, it lies in memory twice
        return weight

    def vector(self, name: str) -> Vector:
        """A vector, float32."""
        return np.array(dequantize(self.file.tensors[name]))  # a view would keep the file mapped, pages for each vector


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
