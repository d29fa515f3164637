"""Merge rows of one dataset by group: counters add, extremes meet, moments and sketches combine.

Rule 1: counters merge exactly, in any order and grouping: merging merges is merging all at once.
Rule 2: no Python runs per row; the columns are summed over Arrow's buffers.

Axes: R rows, G groups, V values of all lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...ext.frequent import FrequentItems
from ...ext.hll import HllSketch
from . import kll, sets
from .schema import FEATURES, Dataset


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows belong together."""

    group__r: NDArray[np.int64]
    """Group of each row, 0 to G - 1."""
    first__g: NDArray[np.int64]
    """A row of each group: its keys are those of all."""

    def __len__(self) -> int:
        return len(self.first__g)


def group(table: pa.Table, keys: Sequence[str], extra: Sequence[NDArray[np.int64]] = ()) -> Groups:
    """Group rows by columns, and by numbers that are no column.

    Args:
        table: R rows.
        keys: Columns of text or whole numbers without null.
        extra: More to group by, shape (R,) each.

    Returns:
        The groups, in ascending order of their keys, the first key first.
    """
    code__r = np.zeros(table.num_rows, np.int64)
    size = 1
    for key in (*(table[name] for name in keys), *extra):
        part__r, count = _codes(key)
        if size * count >= 1 << 62:  # two long keys: number what there is, then go on
            _, code__r = np.unique(code__r, return_inverse=True)
            size = int(code__r.max(initial=-1)) + 1
        code__r = code__r * count + part__r
        size *= count
    _, first, group__r = np.unique(code__r, return_index=True, return_inverse=True)
    return Groups(group__r.astype(np.int64), first.astype(np.int64))


def _codes(column: Any) -> tuple[NDArray[np.int64], int]:
    """Return the rank of each row's value among the column's values, and how many there are."""
    if isinstance(column, np.ndarray):
        values, codes = np.unique(column, return_inverse=True)
        return codes.astype(np.int64), max(1, len(values))
    if pa.types.is_dictionary(column.type):
        merged = column.unify_dictionaries().combine_chunks()
        if isinstance(merged, pa.ChunkedArray):  # of no chunk
            return np.zeros(0, np.int64), 1
        names = merged.dictionary
        rank = np.empty(len(names), np.int64)
        rank[pc.sort_indices(names).to_numpy()] = np.arange(len(names))
        indices = merged.indices.to_numpy(zero_copy_only=False)
        return rank[indices] if len(names) else indices.astype(np.int64), max(1, len(names))
    return _codes(column.to_numpy())


def merged(
    table: pa.Table,
    dataset: Dataset,
    groups: Groups,
    *,
    time__r: NDArray[np.int64],
    k: int,
) -> pa.Table:
    """Return one row per group.

    Args:
        table: Rows of the dataset.
        dataset: Says how columns merge.
        groups: Of the rows.
        time__r: New time of each row, the same within a group.
        k: KLL parameter of merged sketches.

    Raises:
        SketchDamagedError: A sketch is damaged.
    """
    found: dict[str, Any] = {
        key: table[key].take(pa.array(groups.first__g)) for key in dataset.keys
    }
    found["time_ms"] = time__r[groups.first__g]
    for name in dataset.ones:
        found[name] = pa.nulls(len(groups), dataset.schema.field(name).type)
    found |= counters(table, dataset, groups)
    if dataset is FEATURES:
        blobs, variance = kll.merge(
            table["kll"], reals(table["kll_variance"]), groups.group__r, len(groups), k=k
        )
        found["kll"] = blobs
        found["kll_variance"] = pa.array(
            variance, mask=blobs.is_null().to_numpy(zero_copy_only=False)
        )
        found["hll"] = sets.merge(table["hll"], HllSketch, groups.group__r, len(groups))
        found["frequent"] = sets.merge(
            table["frequent"], FrequentItems, groups.group__r, len(groups)
        )
    return pa.table([_as(found[each.name], each.type) for each in dataset.schema], dataset.schema)


def counters(table: pa.Table, dataset: Dataset, groups: Groups) -> dict[str, Any]:
    """Return the merged counters and moments of each group by column; what is not read is not."""
    had = set(table.column_names)
    if "sketched" in had:
        place = table.schema.get_field_index("sketched")
        table = table.set_column(place, "sketched", _sketched(table))
    found: dict[str, Any] = {}
    for name in dataset.sums:
        if name in had:
            found[name] = _sum(whole(table[name]), groups)
    for names, ufunc, start in (
        (dataset.lows, np.minimum, np.inf),
        (dataset.highs, np.maximum, -np.inf),
    ):
        for name in names:
            if name in had:
                found[name] = _extreme(table[name], groups, ufunc, start)
    for name in dataset.lists:
        if name in had:
            found[name] = _sum_lists(table[name], groups, np.int64)
    for name in dataset.reals:
        if name in had:
            found[name] = _sum_lists(table[name], groups, np.float64)
    if "mean" in had:
        found["mean"], found["variance"] = _moments(table, groups)
    return found


def _sketched(table: pa.Table) -> Any:
    """Return how many values the moments of each row are of; older files do not say."""
    return pc.coalesce(table["sketched"], table["n"])


def whole(column: Any) -> NDArray[np.int64]:
    """Return a column of whole numbers; a null is 0."""
    values = pc.fill_null(column, 0) if column.null_count else column
    return np.asarray(values.to_numpy(), np.int64)


def reals(column: Any) -> NDArray[np.float64]:
    """Return a column of real numbers; a null is NaN."""
    values = pc.fill_null(column, np.nan) if column.null_count else column
    return np.asarray(values.to_numpy(), np.float64)


def in_order(table: pa.Table, dataset: Dataset) -> pa.Table:
    """Return the rows in the order of files: by the keys, then by time."""
    found = group(table, dataset.keys, [whole(table["time_ms"])])
    return table.take(pa.array(np.argsort(found.group__r, kind="stable")))


def _sum(values__r: NDArray[np.int64], groups: Groups) -> NDArray[np.int64]:
    total__g = np.zeros(len(groups), np.int64)
    np.add.at(total__g, groups.group__r, values__r)
    return total__g


def _extreme(column: Any, groups: Groups, ufunc: Any, start: float) -> Any:
    """Return the extreme of each group, in the type of the column; null where all is null."""
    kind = np.float64 if pa.types.is_floating(column.type) else np.int64
    if kind is np.int64:
        start = int(np.iinfo(np.int64).max if start > 0 else np.iinfo(np.int64).min)
    there = column.is_valid().to_numpy()
    values = column.drop_null().to_numpy()
    best__g = np.full(len(groups), start, kind)
    ufunc.at(best__g, groups.group__r[there], np.asarray(values, kind))
    some__g = np.zeros(len(groups), np.bool_)
    some__g[groups.group__r[there]] = True
    return pa.array(best__g, mask=~some__g)


def _sum_lists(column: Any, groups: Groups, kind: type[np.int64] | type[np.float64]) -> Any:
    """Return the lists of each group added place by place, as long as its longest."""
    size__r = whole(pc.list_value_length(column))
    size__g = np.zeros(len(groups), np.int64)
    np.maximum.at(size__g, groups.group__r, size__r)
    begin__g = np.cumsum(size__g) - size__g
    total = np.zeros(int(size__g.sum()), kind)
    row = 0
    for chunk in column.chunks:  # as they are: putting them together would copy all values
        values__v = np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), kind)
        size__c = size__r[row : row + len(chunk)]
        group__c = groups.group__r[row : row + len(chunk)]
        _add_lists(total, begin__g, values__v, size__c, group__c)
        row += len(chunk)
    offsets = np.append(begin__g, len(total)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(total))


def _add_lists(
    total: NDArray[Any],
    begin__g: NDArray[np.int64],
    values__v: NDArray[Any],
    size__r: NDArray[np.int64],
    group__r: NDArray[np.int64],
) -> None:
    """Add lists that follow each other to those of their groups, which begin where it is said."""
    begin__r = np.cumsum(size__r) - size__r
    # Lists of one length are a matrix; there are few lengths, as features of a model have.
    for size in np.unique(size__r[size__r > 0]).tolist():
        rows = np.flatnonzero(size__r == size)
        rows = rows[np.argsort(group__r[rows], kind="stable")]
        group__s = group__r[rows]
        first = np.flatnonzero(np.diff(group__s, prepend=-1))
        if len(rows) * size == len(values__v):
            lists = values__v.reshape(-1, size)[begin__r[rows] // size]
        else:
            lists = values__v[begin__r[rows, None] + np.arange(size)]
        where = begin__g[group__s[first], None] + np.arange(size)
        total[where] += np.add.reduceat(lists, first, axis=0)


def _moments(table: pa.Table, groups: Groups) -> tuple[Any, Any]:
    """Return mean and variance of each group, in two passes: nothing cancels.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979, for any number of parts at once.
    """
    n__r = whole(table["sketched"]).astype(np.float64)
    mean__r, variance__r = reals(table["mean"]), reals(table["variance"])
    some = n__r > 0
    rows, size = groups.group__r[some], len(groups)
    n__g = np.bincount(rows, n__r[some], size)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean__g = np.bincount(rows, n__r[some] * mean__r[some], size) / n__g
        apart = mean__r[some] - mean__g[rows]
        square__g = np.bincount(rows, n__r[some] * (variance__r[some] + apart * apart), size)
        variance__g = square__g / n__g
    nothing = n__g == 0
    return pa.array(mean__g, mask=nothing), pa.array(variance__g, mask=nothing)


def _as(column: Any, kind: Any) -> Any:
    if isinstance(column, np.ndarray):
        column = pa.array(column)
    return column if column.type == kind else column.cast(kind)
