"""``shoal drift``: which devices drift, in which features, now and back then."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from .failure import CommandError, Status
from .output import output_option
from .target import Target, targeted
from .times import Moment, moment_ms

if TYPE_CHECKING:
    from ...proto import operator_pb2 as pb
    from .client import Operator

GROUPS: Final = ("device", "site", "hardware", "slice", "fleet", "day", "hour")
STEPS: Final = ("day", "hour")
ITEMS_SHOWN: Final = 3  # new or vanished items in one line, the most frequent first
WIDER_MAX: Final = 1.2  # times the range that was asked for, until the one answered is told
RUNNING: Final = "what runs: shoal devices list"
CHANCE_MAX: Final = 0.001  # p-value below which an item or a mix is worth a line …
MIX_MIN: Final = 0.1  # … and Cramér's V from which on a mix is: Cohen's "small" effect
FRACTION_MIN: Final = 0.001  # share of values from which fractions are worth a line

HISTORY_COLUMNS: Final[tuple[tuple[str, Callable[[Any], str]], ...]] = (
    ("feature", lambda row: row["feature"]),
    ("windows", lambda row: str(row["windows"])),
    ("values", lambda row: str(row["n"])),
    ("nulls", lambda row: str(row["nulls"])),
    ("p50", lambda row: _number(row.get("p50"))),
    ("psi", lambda row: _places(row.get("psi"), "z.4f")),
    ("distance", lambda row: _places(row.get("hellinger"), "z.4f")),
    ("moved", lambda row: _places((row.get("wasserstein") or {}).get("normalised"), "z.4f")),
    ("direction", lambda row: _places(row.get("direction"), "+z.3f")),
)


@click.group()
def drift() -> None:
    """Which devices drift, and in which features."""


@drift.command()
@click.option(
    "--model",
    help="Name, name:version or digest; by default every model. With --group-by a name means the "
    "newest version that devices run.",
)
@click.option(
    "--group-by",
    type=click.Choice(GROUPS),
    help="Merge the windows of a range of time; day and hour are of the whole fleet.",
)
@click.option("--every", type=click.Choice(STEPS), help="One row for each day or hour.")
@click.option(
    "--since", type=Moment(), default="7d", show_default=True, help="Start: 7d, 12h, 2026-03-01."
)
@click.option("--until", type=Moment(), default="now", show_default=True, help="End, excluded.")
@click.option("--reference", help="Model whose profile to compare with; by default its own.")
@output_option("table", "json", "name")
@targeted
def show(
    target: Target,
    model: str | None,
    group_by: str | None,
    every: str | None,
    since: str,
    until: str,
    reference: str | None,
    output: str,
) -> None:
    """Show the verdict on each device, or with --group-by the history of a model.

    ``-o name`` lists the devices that drift, or the groups, the most unlike first.
    """
    if group_by is None:
        given = [name for name in ("every", "since", "until", "reference") if _given(name)]
        if given:
            raise CommandError(
                f"--{given[0]} goes with --group-by", hint="e.g. --group-by site",
                status=Status.USAGE,
            )  # fmt: skip
        _verdicts(target, model, output)
    elif model is None:
        raise CommandError(
            "--group-by needs --model", hint="shoal models list", status=Status.USAGE
        )
    else:
        _history(target, model, group_by, every or "", since, until, reference, output)


def _given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not click.core.ParameterSource.DEFAULT


def _verdicts(target: Target, model: str | None, output: str) -> None:
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        versions = operator.versions(model) if model else []
        sha256 = versions[0]["sha256"] if len(versions) == 1 else ""
        found = operator.json("ShowDrift", pb.ShowDriftRequest(model_sha256=sha256))
        models = versions
        if found.get("retraining") and not models:  # their names are told
            models = operator.json("ListModels", pb.ListModelsRequest())["models"]
    if versions:
        meant = {each["sha256"] for each in versions}
        for name in ("devices", "untold", "retraining"):
            found[name] = [row for row in found.get(name, []) if row["model_sha256"] in meant]
    if output == "json":
        out.document(found)
    elif output == "name":
        out.names([row["device"] for row in found["devices"] if row["drifting"]])
    else:
        out.rows(
            found["devices"],
            [
                ("device", lambda row: row["device"]),
                ("drifting", _drifting),
                ("features", _features),
                ("windows", lambda row: str(row["windows"])),
                ("verdict", lambda row: row.get("text", "")),
            ],
            empty="no device has sent a telemetry window"
            + (f" of {', '.join(map(_version, versions))}" if versions else "")
            + " yet",
        )
        for each in found["untold"]:
            out.say(f"{each['device']} does not tell all: {each['text']}")
        for each in found.get("retraining", []):
            if each["trigger"]:
                did = {"start": "started", "propose": "proposed", "nothing": "held back"}
                known = [row for row in models if row["sha256"] == each["model_sha256"]]
                name = _version(known[0]) if known else each["model_sha256"][:12]
                out.say(f"retraining of {name} {did[each['action']]}: {'; '.join(each['reasons'])}")


def _history(
    target: Target,
    model: str,
    group_by: str,
    every: str,
    since: str,
    until: str,
    reference: str | None,
    output: str,
) -> None:
    import time

    from ...proto import operator_pb2 as pb
    from . import output as out

    if group_by in STEPS:
        if every not in ("", group_by):
            raise CommandError(
                f"--group-by {group_by} is --group-by fleet --every {group_by}",
                hint="leave one of them out",
                status=Status.USAGE,
            )
        group_by, every = "fleet", group_by
    now_ms = int(time.time() * 1000)
    since_ms, until_ms = (moment_ms(text, now_ms=now_ms) for text in (since, until))
    if since_ms >= until_ms:
        raise CommandError(
            "the range of time is empty: "
            + (
                "it starts in the future"
                if since_ms > now_ms
                else "it ends where it starts, or before"
            ),
            status=Status.USAGE,
        )
    with target.connect() as operator:
        asked = _meant(operator, model)
        compared = operator.model(reference) if reference else asked
        request = pb.ShowDriftRequest(
            model_sha256=asked["sha256"],
            group_by=f"DRIFT_GROUPING_{group_by.upper()}",
            every=f"DRIFT_STEP_{every.upper() or 'UNSPECIFIED'}",
            since_unix_ms=since_ms,
            until_unix_ms=until_ms,
            reference_sha256=compared["sha256"],
        )
        found = operator.json("ShowDrift", request)
    nameless = "fleet" if group_by == "fleet" else f"no {group_by}"

    def named(row: dict[str, Any]) -> str:
        return row["group"] or nameless

    rows = sorted(found["rows"], key=_unlike)
    if output == "json":
        out.document(found)
    elif output == "name":
        out.names(list(dict.fromkeys(map(named, rows))))
    else:
        out.rows(
            sorted(rows, key=lambda row: (row["bucket_ms"], row["group"])),
            [
                ("group", named),
                *([("from (UTC)", lambda row: _bucket(row, every))] if every else []),
                *HISTORY_COLUMNS,
            ],
            empty=f"no sketch of {_version(asked)} within that time; {RUNNING}",
        )
        if model == asked["name"]:
            out.say(f"of {_version(asked)}")
        if rows:
            _say_range(request, rows[0])
        _say_incomparable(rows, compared)
        models = found.get("models", [])
        for row, what, said in [
            *((row, f" {row['feature']}", _items(row)) for row in rows),
            *((row, "", _model(row)) for row in models),
            *((row, "", _refused(row)) for row in models),
        ]:
            if said:
                at = f" from {_bucket(row, every)}" if every else ""
                out.say(f"{named(row)}{what}{at}: {said}")


def _bucket(row: dict[str, Any], every: str) -> str:
    """Return when a row begins, as exactly as its step is."""
    from . import output as out

    return out.moment(row["bucket_ms"])[: 10 if every == "day" else 16]


def _meant(operator: Operator, model: str) -> dict[str, Any]:
    """Return the model that a text names: of all versions of a name the newest that runs."""
    from ...proto import operator_pb2 as pb

    versions = operator.versions(model)
    if len(versions) > 1:
        found = operator.json("ShowDrift", pb.ShowDriftRequest())
        running = {row["model_sha256"] for row in found["devices"]}
        versions = [each for each in versions if each["sha256"] in running] or versions
    return versions[-1]


def _say_incomparable(rows: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Say why features have no distance, if some have none although they have values."""
    from . import output as out

    lacking = [row["feature"] for row in rows if row["n"] and row.get("psi") is None]
    if lacking:
        out.say(
            f"{', '.join(dict.fromkeys(lacking))}: not comparable with {_version(reference)}, "
            "which has no such feature, or other bins than what devices counted in and no sketch "
            "says the rest"
        )


def _say_range(asked: pb.ShowDriftRequest, row: dict[str, Any]) -> None:
    """Say what range was answered where it is noticeably longer than what was asked for."""
    from . import output as out

    span_ms = row["until_ms"] - row["since_ms"]
    if span_ms > WIDER_MAX * (asked.until_unix_ms - asked.since_unix_ms):
        out.say(
            f"answered for {out.moment(row['since_ms'])} to {out.moment(row['until_ms'])} UTC: "
            "that time can be asked for no more exactly"
        )


def _version(model: dict[str, Any]) -> str:
    return f"{model['name']}:{model['version']}"


def _items(row: dict[str, Any]) -> str:
    """Return what the whole numbers or codes of a row tell, "" if nothing."""
    broken = row.get("fraction_share") or 0.0
    fractions = [f"no whole number in {broken:.1%}"] if broken >= FRACTION_MIN else []
    mix = row.get("frequent")
    if mix is None:
        return "".join(fractions)
    new, gone = (
        [each for each in mix[name] if each["p_value"] < CHANCE_MAX][:ITEMS_SHOWN]
        for name in ("new", "vanished")
    )
    parts = fractions + [f"new {each['item']} ({each['share']:.1%})" for each in new]
    parts += [f"gone {each['item']} (was {each['share']:.1%})" for each in gone]
    if mix["cramers_v"] >= MIX_MIN and mix["p_value"] < CHANCE_MAX:
        most = ", ".join(map(str, mix["largest"]))
        parts.append(f"another mix (Cramér's V {mix['cramers_v']:.2f}), most of all {most}")
    if parts and (seen := row.get("distinct")):
        known = "" if seen["reference"] is None else f" (reference {seen['reference']})"
        parts.append(f"{seen['estimate']:.0f} different values{known}")
    return "; ".join(parts)


def _model(row: dict[str, Any]) -> str:
    """Return what a group tells of the model as a whole, "" if nothing."""
    from . import output as out

    parts = []
    if share := row.get("accuracy"):
        parts.append(
            f"accuracy {share['estimate']:.1%} ({share['low']:.1%} to {share['high']:.1%} "
            f"of {share['labelled']} labels)"
        )
    if share := row.get("expected_accuracy"):
        parts.append(
            f"expected without labels {share['estimate']:.1%} (reference {share['reference']:.1%})"
        )
    if error := row.get("calibration_error"):
        parts.append(f"calibration error {error['low']:.3f} to {error['high']:.3f}")
    if far := row.get("mmd"):
        p_value, among = far["groups_p_value"], " among the training data's groups"
        if p_value is None:
            p_value, among = far["p_value"], ""
        parts.append(f"MMD² {far['squared']:.2g} (p {out.chance(p_value)}{among})")
    return ", ".join(parts)


def _refused(row: dict[str, Any]) -> str:
    """Return how many windows of a group are in no feature's row, "" if all are."""
    count = row.get("refused", 0)
    if not count:
        return ""
    sketches = "sketch" if count == 1 else "sketches"
    return f"{count:,} {sketches} refused (damaged, or binned for another model)"


def _unlike(row: dict[str, Any]) -> float:
    distance = row.get("hellinger")
    return 1.0 if distance is None else -distance


def _number(bounds: list[float | None] | None) -> str:
    """Return an estimate that comes with its bounds: some four digits, of any size."""
    value = bounds[0] if bounds else None
    size = abs(value or 0.0)
    return _places(value, ".0f" if 1e4 <= size < 1e9 else ".2g" if size < 1e-3 else ".4g")


def _places(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _drifting(row: dict[str, Any]) -> str:
    if not row["drifting"]:
        return "no"
    return str(row.get("kind") or "yes")


def _features(row: dict[str, Any]) -> str:
    return ", ".join(row.get("features", [])) or "–"
