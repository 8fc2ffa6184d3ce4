"""A pass over the captured calls of a step: what one native op does at once becomes one call, with the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvik.ops.base import Batch, Linear, Norm, QKVWeights, slots_of
from kvik.ops.table import Value


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One op: its name in `OPS`, the arguments it was called with, the values it gave."""

    name: str
    arguments: tuple[Any, ...]  # `Value`s and fields of the batch among what is the same in each step
    results: tuple[Value, ...]

    @property
    def inputs(self) -> list[Value]:
        """The values among the arguments."""
        return [argument for argument in self.arguments if isinstance(argument, Value)]


def fuse(calls: Sequence[Call], batch: Batch, kept: Sequence[Value]) -> list[Call]:
    """The same step in fewer calls; `batch` stands for the step's, and `kept` are values that somebody wants to see."""
    fusion = _Fusion(calls, kept)
    for call in calls:
        if call.name == "write_kv":
            fusion.fuse_qkv(call, batch)
    for call in calls:
        if call.name == "activate":
            fusion.fuse_gated(call)
        elif call.name == "project":
            fusion.fuse_linear(call)
    for call in calls:
        if call.name == "add":
            fusion.fuse_residual(call)
    return fusion.calls


class _Fusion:
    def __init__(self, calls: Sequence[Call], kept: Sequence[Value]) -> None:
        self.calls = list(calls)
        self._num_uses = Counter(value.id for call in calls for value in call.inputs)
        self._num_uses.update(value.id for value in kept)
        self._made_by = {value.id: call for call in calls for value in call.results}
        self._used_by = {value.id: call for call in calls for value in call.inputs}

    def _source(self, value: Any, name: str) -> Call | None:
        """The call of that name that made a value for one other call alone."""
        call = self._made_by.get(value.id) if isinstance(value, Value) and self._num_uses[value.id] == 1 else None
        return call if call is not None and call.name == name else None

    def _next(self, value: Value, name: str) -> Call | None:
        """The call of that name that alone uses a value."""
        call = self._used_by.get(value.id) if self._num_uses[value.id] == 1 else None
        return call if call is not None and call.name == name else None

    def _replace(self, old: Sequence[Call | None], new: Call) -> None:
        """Put one call where the last of some others stands."""
        gone = [call for call in old if call is not None]
        at = max(index for index, call in enumerate(self.calls) if call in gone)
        self.calls[at] = new
        self.calls = [call for call in self.calls if call not in gone]
        for call in gone:
            for value in call.results:
                self._made_by.pop(value.id, None)
        self._made_by |= {value.id: new for value in new.results}

    def _chain(self, end: Value) -> tuple[Value, list[Call]]:
        """What a value was made from by norms and rotations alone, and these in their order."""
        calls: list[Call] = []
        while (call := self._source(end, "norm") or self._source(end, "rope")) is not None:
            calls.insert(0, call)
            end = call.arguments[0]
        return end, calls

    def _is_used_before(self, value: Value, call: Call) -> bool:
        before = self.calls[: self.calls.index(call)]
        return any(used.id == value.id for one in before for used in one.inputs)

    def _normed(self, x: Value) -> tuple[Value, Norm | None, Call | None]:
        """What a value is the norm of, if it is one of whole rows."""
        call = self._source(x, "norm")
        if call is None or len(call.arguments[1].weight) != x.width:
            return x, None, None
        return call.arguments[0], call.arguments[1], call

    def fuse_qkv(self, write: Call, batch: Batch) -> None:
        """norm, project, norms of heads, rope, write_kv: `norm_qkv`, whose result is the queries."""
        kv, keys, values, *slots = write.arguments
        value_norm, (key, of_keys) = self._source(values, "norm"), self._chain(keys)
        value = values if value_norm is None else value_norm.arguments[0]
        project, made = self._made_by.get(key.id), dict.fromkeys((key.id, value.id))  # one where values are the keys
        if project is None or project.name != "project" or (*slots,) != slots_of(kv, batch):
            return
        if [result.id for result in project.results[1:]] != [*made] or sum(self._num_uses[one] for one in made) != 2:
            return
        names = [call.name for call in of_keys]
        if len(set(names)) < len(names):
            return
        query, of_queries = project.results[0], list[Call]()
        for name in names:
            call = self._next(query, name)
            if call is None:
                return
            of_queries.append(call)
            query = call.results[0]
        if self._is_used_before(query, write):
            return
        by_name = dict(zip(names, zip(of_queries, of_keys, strict=True), strict=True))
        tables = [call.arguments[1:] for call in by_name.get("rope", ())]
        if tables and not all(positions is batch.positions and table is tables[0][1] for positions, table in tables):
            return
        head_dim = keys.shape[1]
        query = Value(query.id, (query.width // head_dim, head_dim))
        x, norm_before, before = self._normed(project.arguments[0])
        query_norm, key_norm = [call.arguments[1] for call in by_name.get("norm", ())] or [None, None]
        q_linear, k_linear, *v_linear = project.arguments[1]
        weights = QKVWeights(
            query=q_linear,
            key=k_linear,
            value=v_linear[0] if v_linear else None,
            head_dim=head_dim,
            query_norm=query_norm,
            key_norm=key_norm,
            value_norm=None if value_norm is None else value_norm.arguments[1],
            norm_after_rope=names == ["rope", "norm"],
        )
        table = tables[0][1] if tables else None
        gone = [before, project, *of_queries, *of_keys, value_norm, write]
        self._replace(gone, Call("norm_qkv", (x, norm_before, weights, table, kv, batch), (query,)))

    def fuse_gated(self, activate: Call) -> None:
        """norm, project, activate: `norm_gated`."""
        gated, activation, raised = activate.arguments
        project = self._source(gated, "project")
        if project is None or raised is None or self._source(raised, "project") is not project:
            return
        if [value.id for value in project.results] != [gated.id, raised.id]:
            return
        gate, up = project.arguments[1]
        x, norm, before = self._normed(project.arguments[0])
        self._replace(
            [before, project, activate], Call("norm_gated", (x, norm, gate, up, activation), activate.results)
        )

    def fuse_linear(self, project: Call) -> None:
        """norm, project: `norm_linear`, or `linear` without a norm."""
        if project not in self.calls or len(project.results) != 1:
            return
        linear: Linear = project.arguments[1][0]
        x, norm, before = self._normed(project.arguments[0])
        name, arguments = ("linear", (x, linear, None)) if norm is None else ("norm_linear", (x, norm, linear))
        self._replace([before, project], Call(name, arguments, project.results))

    def fuse_residual(self, add: Call) -> None:
        """linear, add: `linear` with a residual."""
        residual, product, scale = add.arguments
        linear = self._source(product, "linear")
        if linear is None or linear.arguments[2] is not None or residual.id == product.id or scale != 1.0:
            return
        x, matrix, _ = linear.arguments
        self._replace([linear, add], Call("linear", (x, matrix, residual), add.results))
