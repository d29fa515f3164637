"""Ask the lake: merged counters of any group, over any range, at any granularity.

    Query --rules.plan--> spans --manifest--> files + rows not exported yet --merge--> Answer

Every stored window within the range counts once: the files and the rows come from one snapshot of
the database, and a window is in one file of those that answer a span (see ``rules``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from sqlalchemy import select

from ...ext.frequent import FrequentItems
from ...ext.hll import HllSketch
from ..drift.errors import ProfileError
from ..drift.profile import ReferenceProfile
from ..errors import BusyError, InvalidError
from ..store import Store
from ..store.tables import Model
from . import comparison, manifest, merge, rules, sets
from .config import LakeConfig
from .files import Files
from .kll import Sketches
from .query import EVERY, Answer, Query
from .rows import Memo, waiting
from .rules import Grain, Tier
from .schema import DATASETS, FEATURES, LABELS, WINDOWS, Dataset

_NAMES: Final = {FEATURES.name: ("position", "feature"), LABELS.name: ("split",)}
_SKETCHES: Final = ("kll", "kll_variance", "hll", "frequent")


class History:
    """Answers questions. Any thread may ask; nothing is changed."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        *,
        clock: Callable[[], int],
        config: LakeConfig,
        memo: Memo | None = None,
    ) -> None:
        """Take the database and the folder of the lake.

        Args:
            store: The metadata database.
            folder: Of the lake.
            clock: The wall clock, Unix ms.
            config: What is kept for how long, and bounds.
            memo: Of the worker of the same lake, so that each window is read once.
        """
        self.store, self._clock, self._config = store, clock, config
        self._memo = memo or Memo(windows_max=5 * config.export_rows_min)
        self._files = Files(folder)

    def features(self, query: Query) -> Answer:
        """Return bins, moments, nulls and sketches of each feature and group.

        Raises:
            InvalidError: The range is empty, or is not kept as finely as asked.
            BusyError: Too many windows wait for the lake, or there are more groups than allowed.
            LakeError: A file cannot be read.
        """
        return self._merged(FEATURES, query)

    def windows(self, query: Query) -> Answer:
        """Return predictions, errors, classes and latencies of each group; raises as above."""
        return self._merged(WINDOWS, query)

    def labels(self, query: Query) -> Answer:
        """Return the late labels of each group and split; raises as above."""
        return self._merged(LABELS, query)

    def single(self, query: Query, *, dataset: str = "windows") -> list[dict[str, Any]]:
        """Return single windows as they were stored, in the order of time.

        Args:
            query: Exactly its range, to the millisecond, which must still be kept in windows;
                ``group_by`` and ``every`` say nothing. ``where`` names the device.
            dataset: windows, features or labels.

        Returns:
            One dict per window (and feature, or split), with the columns of the dataset.

        Raises:
            InvalidError: Only hours are kept of a part of the range.
            BusyError: More rows than ``groups_max``, or too many windows wait for the lake.
            LakeError: A file cannot be read.
        """
        kind, now_ms = DATASETS[dataset], self._clock()
        self._check_kept(query.since_ms, Tier.FINE, now_ms)
        spans = [rules.Span(Tier.FINE, query.since_ms, query.until_ms)]
        rows = self._rows(kind, query, Grain.DEVICE, spans, kind.schema.names)
        if rows.num_rows > self._config.groups_max:
            raise BusyError(
                f"{rows.num_rows} rows are more than {self._config.groups_max} at once",
                hint="ask for one device, or a shorter time",
            )
        order = [("time_ms", "ascending"), ("stream", "ascending"), ("number", "ascending")]
        found: list[dict[str, Any]] = rows.sort_by(order).to_pylist()
        return found

    def drift_table(
        self,
        model: str,
        group_by: str,
        since_ms: int,
        until_ms: int,
        profile: ReferenceProfile,
        *,
        every: str = "",
    ) -> list[dict[str, Any]]:
        """Return how far each group's features are from a reference, now or back then.

        Args:
            model: Digest, hex.
            group_by: fleet, device, site, hardware or slice.
            since_ms: Begin, Unix ms.
            until_ms: End, exclusive.
            profile: The model's own, or another one: then bins are computed anew from sketches.
            every: hour or day: one row for each; "" = one for the whole range.

        Returns:
            One dict per group, bucket and feature, see :func:`comparison.compare`.

        Raises:
            InvalidError: The range is empty, or is not kept as finely as asked.
            BusyError: Too many windows wait for the lake, or there are too many groups.
            LakeError: A file cannot be read.
        """
        query = Query(
            model=model, group_by=group_by, since_ms=since_ms, until_ms=until_ms, every=every
        )
        with self.store.read() as session:
            raw = session.scalars(select(Model.profile).where(Model.sha256 == model)).first()
        try:
            own = ReferenceProfile.from_dict(raw) if raw else None
        except ProfileError:
            own = None
        return comparison.compare(self.features(query), own=own, profile=profile)

    def model_table(
        self,
        model: str,
        group_by: str,
        since_ms: int,
        until_ms: int,
        profile: ReferenceProfile,
        *,
        every: str = "",
    ) -> list[dict[str, Any]]:
        """Return how the model does in each group: accuracy, expected accuracy, MMD.

        Args and Raises: As :meth:`drift_table`; ``profile`` is the model's own.

        Returns:
            One dict per group and bucket, see :func:`comparison.assess_groups`.
        """
        query = Query(
            model=model, group_by=group_by, since_ms=since_ms, until_ms=until_ms, every=every
        )
        return comparison.assess_groups(self.windows(query), self.labels(query), profile=profile)

    def _merged(self, dataset: Dataset, query: Query) -> Answer:
        now_ms, every_ms = self._clock(), EVERY[query.every]
        if query.every == "hour":
            self._check_kept(query.since_ms, Tier.HOUR, now_ms)
        try:
            since_ms, until_ms = rules.widen(
                query.since_ms, query.until_ms, now_ms, every_ms=every_ms, config=self._config
            )
        except ValueError as exc:
            raise InvalidError(str(exc)) from exc
        coarsest = Tier.HOUR if query.every == "hour" else Tier.DAY
        single = query.group_by == "device" or "device" in query.where
        keys = () if query.group_by == "fleet" else (query.group_by,)
        names = _NAMES.get(dataset.name, ())
        rows = self._rows(
            dataset,
            query,
            Grain.DEVICE if single else Grain.COHORT,
            rules.plan(since_ms, until_ms, coarsest=coarsest),
            [*keys, *names, "time_ms", *_counters(dataset)],
        )
        time__r = merge.whole(rows["time_ms"])
        bucket__r = time__r - time__r % every_ms if every_ms else np.full_like(time__r, since_ms)
        groups = merge.group(rows, [*keys, *names], [bucket__r])
        if len(groups) > self._config.groups_max:
            raise BusyError(
                f"{len(groups)} groups are more than {self._config.groups_max} in one answer",
                hint="ask for fewer features, a longer bucket or a coarser group",
            )
        first = pa.array(groups.first__g)
        shown: dict[str, Any] = {name: rows[name].take(first) for name in names}
        shown["group"] = (
            rows[query.group_by].take(first).cast(pa.string()) if keys else [""] * len(groups)
        )
        shown["bucket_ms"] = bucket__r[groups.first__g]
        shown |= merge.counters(rows, dataset, groups)
        sketches = None
        if dataset is FEATURES:
            variance__r = merge.reals(rows["kll_variance"])
            sketches = Sketches(rows["kll"], variance__r, groups.group__r)
            shown |= {
                name: sets.merge(rows[name], kind, groups.group__r, len(groups))
                for name, kind in (("hll", HllSketch), ("frequent", FrequentItems))
            }
        return Answer(
            since_ms=since_ms, until_ms=until_ms, table=pa.table(shown), sketches=sketches
        )

    def _rows(
        self,
        dataset: Dataset,
        query: Query,
        grain: Grain,
        spans: Sequence[rules.Span],
        columns: Sequence[str],
    ) -> pa.Table:
        """Return all rows that answer spans, of files and of the database."""
        low_ms, high_ms = spans[0].since_ms, spans[-1].until_ms
        limit = 4 * self._config.export_rows_max
        with manifest.snapshot(self.store) as session:
            files = manifest.live(
                session,
                dataset=dataset.name,
                grain=grain,
                model=query.model,
                since_ms=low_ms,
                until_ms=high_ms,
            )
            fresh = waiting(
                session,
                self._memo,
                limit=limit + 1,
                clock=self._config.clock,
                model=query.model,
                datasets=[dataset.name],
            )
        if max(len(fresh.windows), len(fresh.labels)) > limit:
            raise BusyError(
                f"more than {limit} windows wait for the lake: an answer would lack them",
                hint="ask again in a minute",
            )
        only = _filter(query, dataset)
        parts = []
        entire: list[str] = []
        for span in spans:
            some: list[str] = []
            for each in files:
                if rules.answers(each, span):
                    # A file has one model, which the manifest knows whole.
                    is_all = rules.is_within(each, span) and _takes_all(query, dataset)
                    (entire if is_all else some).append(each.path)
            when = (ds.field("time_ms") >= span.since_ms) & (ds.field("time_ms") < span.until_ms)
            parts.append(self._files.read(dataset, some, columns=columns, where=only & when))
        # Filtering copies every row: it costs as much as reading them.
        parts.append(self._files.read(dataset, entire, columns=columns))
        when = (ds.field("time_ms") >= low_ms) & (ds.field("time_ms") < high_ms)
        for table in fresh.tables().values():
            parts.append(table.filter(only & when).select(list(columns)))
        return pa.concat_tables(parts).unify_dictionaries()

    def _check_kept(self, since_ms: int, tier: Tier, now_ms: int) -> None:
        kept_ms = rules.horizon_ms(tier, now_ms, config=self._config)
        if since_ms < kept_ms:
            raise InvalidError(
                f"single {'hours' if tier is Tier.HOUR else 'windows'} are kept since "
                f"{rules.day_name(kept_ms)} only",
                hint="ask for a later time or a coarser answer, or raise keep_days",
            )


def _counters(dataset: Dataset) -> list[str]:
    """Return the columns that an answer is made of."""
    names = [*dataset.sums, *dataset.lows, *dataset.highs, *dataset.lists, *dataset.reals]
    return [*names, "mean", "variance", *_SKETCHES] if dataset is FEATURES else names


def _takes_all(query: Query, dataset: Dataset) -> bool:
    """Tell whether a question leaves out no row of its model and time."""
    return not query.where and not (query.features and dataset is FEATURES)


def _filter(query: Query, dataset: Dataset) -> ds.Expression:
    """Return what rows must be like: of the model whole, not of its first 12 digits alone."""
    terms = [ds.field("model_sha256") == query.model]
    terms += [ds.field(name) == value for name, value in query.where.items()]
    if query.features and dataset is FEATURES:
        terms.append(ds.field("feature").isin(list(query.features)))
    found: ds.Expression = functools.reduce(operator.and_, terms)
    return found
