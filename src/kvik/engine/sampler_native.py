"""All rows of a step in one native call; what each number means is told by `sampler_reference`."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from kvik.config import SamplingParams
from kvik.engine.output import TokenLogprobs
from kvik.engine.sampling import DrawSettings, FloatArray, Sampled, SampleRow, logprobs_entry, no_logprobs
from kvik.ops.base import RowSampler

# SampleRow of native/sample.h: what differs from row to row, then what the params say.
OWN_FIELDS = struct.Struct("=qQq qqq qq qq q q")
PARAMS_FIELDS = struct.Struct("=d dd Q q q f i")
MAX_KNOWN_PARAMS = 4096

GREEDY_FIELDS = PARAMS_FIELDS.pack(0.0, 0.0, 0.0, 2**53, 0, 0, 1.0, 0)


@dataclass(frozen=True, slots=True)
class _Known:
    """Params as the core reads them, kept because a sequence's are the same at every step."""

    params: SamplingParams  # held, so that no others get its identity
    fields: bytes
    is_plain: bool  # the most likely token and nothing else
    reads_history: bool
    reads_prompt: bool


class NativeSampler:
    """`Sampler` over the core of the native ops."""

    def __init__(self, core: RowSampler) -> None:
        self._core = core
        self._known: dict[int, _Known] = {}

    def sample(self, logits: FloatArray, rows: SequenceOf[SampleRow]) -> list[Sampled]:
        """One token for each row; see `Sampler`."""
        known = [self._known.get(id(row.params)) or self._learn(row.params) for row in rows]
        for row, own in zip(rows, known, strict=True):
            if not own.is_plain or row.mask is not None or row.forbidden_ids:
                return self._sample(logits, rows, known)
        out = np.empty(len(rows), np.int32)
        self._core.argmax(logits, np.array([row.row for row in rows], np.int32), out)
        return [Sampled(token_id, None) for token_id in out.tolist()]

    def prompt_logprobs(self, logits: FloatArray, next_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
        """Those of the tokens that follow; see `Sampler`."""
        fields = GREEDY_FIELDS[:-4] + struct.pack("=i", num_top)
        packed = [
            OWN_FIELDS.pack(index, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, token_id) + fields
            for index, (_, token_id) in enumerate(zip(logits, next_ids, strict=True))
        ]
        results = _Results(len(packed), num_top, logits.shape[1])
        self._call(logits, packed, array("i"), array("f"), [], results)
        return [
            results.logprobs(index, token_id, num_top) if results.chosen[index] >= 0 else no_logprobs(token_id)
            for index, token_id in enumerate(next_ids)
        ]

    def _sample(self, logits: FloatArray, rows: SequenceOf[SampleRow], known: SequenceOf[_Known]) -> list[Sampled]:
        ids, biases, bias_ranges = array("i"), array("f"), {}
        for own in known:
            if own.params.biases and id(own) not in bias_ranges:
                first = len(ids)
                ids.extend(token_id for token_id, _ in own.params.biases)
                biases.extend(bias for _, bias in own.params.biases)
                bias_ranges[id(own)] = (first, len(ids))
        masks: list[bytes] = []
        num_mask_bytes = 0
        packed: list[bytes] = []
        for row, own in zip(rows, known, strict=True):
            history = completion = end = len(ids)
            if own.reads_history:
                # Of a list the core would need a copy in any case; this one is the fastest that Python has.
                read = row.token_ids if own.reads_prompt else row.token_ids[row.num_prompt_tokens :]
                ids.extend(read)
                end = len(ids)
                completion = history + (row.num_prompt_tokens if own.reads_prompt else 0)
            forbidden = end
            ids.extend(row.forbidden_ids)
            mask = -1
            if row.mask is not None:
                mask = num_mask_bytes
                masks.append(row.mask)
                num_mask_bytes += len(row.mask)
            bias = bias_ranges.get(id(own), (0, 0))
            packed.append(
                OWN_FIELDS.pack(
                    row.row, row.seed, row.position, history, completion, end, forbidden, len(ids), *bias, mask, -1
                )
                + own.fields
            )
        num_top = max((own.params.logprobs or 0 for own in known), default=0)
        results = _Results(len(rows), num_top, logits.shape[1])
        self._call(logits, packed, ids, biases, masks, results)
        return [
            Sampled(
                token_id,
                None
                if own.params.logprobs is None or token_id < 0
                else results.logprobs(index, token_id, own.params.logprobs),
            )
            for index, (token_id, own) in enumerate(zip(results.chosen.tolist(), known, strict=True))
        ]

    def _call(
        self,
        logits: FloatArray,
        packed: list[bytes],
        ids: array[int],
        biases: array[float],
        masks: list[bytes],
        results: _Results,
    ) -> None:
        size = OWN_FIELDS.size + PARAMS_FIELDS.size
        self._core.sample(
            logits,
            np.frombuffer(bytearray().join(packed), np.uint8).reshape(len(packed), size),
            np.frombuffer(ids, np.int32) if ids else np.empty(0, np.int32),
            np.frombuffer(biases, np.float32) if biases else np.empty(0, np.float32),
            np.frombuffer(bytearray().join(masks), np.uint8),
            results.chosen,
            results.totals,
            results.top_ids,
            results.top_logits,
            results.highest_and_own,
        )

    def _learn(self, params: SamplingParams) -> _Known:
        settings = DrawSettings.of(params)
        num_top = -1 if params.logprobs is None else params.logprobs
        fields = PARAMS_FIELDS.pack(
            settings.scale,
            params.presence_penalty,
            params.frequency_penalty,
            settings.top_p,
            settings.top_k,
            settings.min_weight,
            params.repetition_penalty,
            num_top,
        )
        is_plain = settings.scale == 0.0 and not (params.has_penalties or params.biases) and num_top < 0
        if len(self._known) >= MAX_KNOWN_PARAMS:
            self._known.clear()
        known = self._known[id(params)] = _Known(
            params, fields, is_plain, params.has_penalties, params.repetition_penalty != 1.0
        )
        return known


class _Results:
    """What the core writes to."""

    def __init__(self, num_rows: int, num_top: int, vocab_size: int) -> None:
        self._most = vocab_size
        self.chosen = np.empty(num_rows, np.int32)
        self.totals = np.empty(num_rows, np.int64)
        self.top_ids = np.empty((num_rows, num_top), np.int32)
        self.top_logits = np.empty((num_rows, num_top), np.float32)
        self.highest_and_own = np.empty((num_rows, 2), np.float32)

    def logprobs(self, index: int, token_id: int, num_top: int) -> TokenLogprobs:
        highest, logit = self.highest_and_own[index].tolist()
        count = min(num_top, self._most)
        top_ids, top_logits = self.top_ids[index, :count].tolist(), self.top_logits[index, :count].tolist()
        total: int = self.totals[index].item()
        return logprobs_entry(token_id, logit, highest, total, zip(top_ids, top_logits, strict=True))
