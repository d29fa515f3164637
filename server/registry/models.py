"""The models the fleet knows: checked bundles, numbered per name, with their lineage.

Registering says that a bundle is well-formed; it may not be rolled out before it is approved,
which is a second call and a signature (shoal.server.trust.approval).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import func, select

from ...proto import bundle
from ...proto.names import check_digest, check_name
from ..drift.profile import BYTES_MAX as PROFILE_BYTES_MAX
from ..errors import ConflictError, InvalidError, NotFoundError
from ..store import Store, audit
from ..store.tables import Artefact, Model
from .artefacts import Artefacts
from .config import ArtefactConfig


class Models:
    """The model registry. Synchronous and thread-safe."""

    def __init__(
        self,
        store: Store,
        artefacts: Artefacts,
        *,
        clock: Callable[[], int],
        config: ArtefactConfig | None = None,
    ) -> None:
        """Take the database, the artefact store, a clock of Unix ms and the bounds."""
        self._store, self._artefacts, self._clock = store, artefacts, clock
        self._config = config or ArtefactConfig()

    def register(
        self,
        name: str,
        sha256: str,
        *,
        note: str = "",
        parent_sha256: str = "",
        source_sha256: str = "",
    ) -> int:
        """Check a stored bundle and make it the next version of a model.

        The same bundle under the same name is registered once: the call may be repeated.

        Args:
            name: Name of the model; the bundle's manifest must say the same.
            sha256: Artefact of the bundle.
            note: Free text for people.
            parent_sha256: Registered bundle that this one was made from; "" = none.
            source_sha256: Artefact of the float model that it was quantized from; "" = foreign.

        Returns:
            The version, per name, from 1.

        Raises:
            NotFoundError: There is no such artefact, parent or source.
            InvalidError: Name or note are not acceptable, or the bundle is for another model.
            BundleError: The artefact is not a well-formed bundle.
            ConflictError: The bundle is registered under another name.
        """
        check_name(name, what="model name")
        check_digest(sha256)
        if len(note) > self._config.note_chars_max:
            raise InvalidError(f"the note exceeds {self._config.note_chars_max} characters")
        known = self._known(name, sha256)
        if known is not None:
            return known
        data = self._artefacts.read(sha256, bytes_max=self._config.bytes_max)
        found = bundle.unpack(data)
        if found.manifest.name != name:
            raise InvalidError(
                f"the bundle is of model {found.manifest.name!r}, not {name!r}",
                hint=f"register it as {found.manifest.name}",
            )
        profile = _profile(found.parts["profile.json"])
        with self._store.begin() as session:
            if parent_sha256:
                check_digest(parent_sha256, what="parent")
                if session.scalar(select(Model.id).where(Model.sha256 == parent_sha256)) is None:
                    raise NotFoundError(f"the parent {parent_sha256[:12]} is not registered")
            if source_sha256:
                check_digest(source_sha256, what="source")
                if session.get(Artefact, source_sha256) is None:
                    raise NotFoundError(f"there is no source artefact {source_sha256[:12]}")
            row = session.scalars(select(Model).where(Model.sha256 == sha256)).first()
            if row is not None:  # registered by somebody else in the meantime
                return _same(row.name, row.version, name)
            artefact = session.get(Artefact, sha256)
            if artefact is not None:
                artefact.kind = "bundle"  # an upload does not know yet what it is
            newest = session.scalar(select(func.max(Model.version)).where(Model.name == name))
            version = (newest or 0) + 1
            now_ms = self._clock()
            session.add(
                Model(
                    name=name,
                    version=version,
                    sha256=sha256,
                    size=len(data),
                    created_ms=now_ms,
                    note=note,
                    parent_sha256=parent_sha256,
                    source_sha256=source_sha256,
                    manifest=json.loads(json.dumps(asdict(found.manifest))),
                    profile=profile,
                    evidence={},
                    approved_ms=None,
                )
            )
            audit.append(
                session,
                now_ms=now_ms,
                actor="server",
                action="model.registered",
                subject=sha256,
                detail={"name": name, "version": version, "parent_sha256": parent_sha256},
            )
        return version

    def get(self, sha256: str) -> Model:
        """Return a registered model, all but its profile.

        Raises:
            NotFoundError: The bundle is not registered.
        """
        with self._store.read() as session:
            row = session.scalars(select(Model).where(Model.sha256 == sha256)).first()
        if row is None:
            raise _unknown(sha256)
        return row

    def profile(self, sha256: str) -> dict[str, Any]:
        """Return the reference profile of a registered model, as its bundle has it.

        Raises:
            NotFoundError: The bundle is not registered.
        """
        with self._store.read() as session:
            found: dict[str, Any] | None = session.scalars(
                select(Model.profile).where(Model.sha256 == sha256)
            ).first()
        if found is None:
            raise _unknown(sha256)
        return found

    def list(self) -> list[Model]:
        """Return every model, by name and version, all but its profile."""
        with self._store.read() as session:
            return [*session.scalars(select(Model).order_by(Model.name, Model.version))]

    def approved(self, sha256: str, *, evidence: Mapping[str, Any], targets_version: int) -> None:
        """Note that the approval metadata lists the bundle now; may be repeated.

        Args:
            sha256: A registered bundle.
            evidence: Gate results, JSON; they replace those of an earlier approval.
            targets_version: Version of the approval metadata that lists it.

        Raises:
            NotFoundError: The bundle is not registered.
        """
        with self._store.begin() as session:
            row = session.scalars(select(Model).where(Model.sha256 == sha256)).first()
            if row is None:
                raise _unknown(sha256)
            now_ms = self._clock()
            row.approved_ms = row.approved_ms or now_ms
            row.evidence = dict(evidence)
            audit.append(
                session,
                now_ms=now_ms,
                actor="operator",
                action="model.approved",
                subject=sha256,
                detail={"targets_version": targets_version, "evidence": dict(evidence)},
            )

    def _known(self, name: str, sha256: str) -> int | None:
        with self._store.read() as session:
            row = session.scalars(select(Model).where(Model.sha256 == sha256)).first()
        return None if row is None else _same(row.name, row.version, name)


def _unknown(sha256: str) -> NotFoundError:
    return NotFoundError(f"model {sha256[:12]!r} is not registered", hint="shoal models list")


def _same(registered: str, version: int, name: str) -> int:
    if registered != name:
        raise ConflictError(f"the bundle is registered as {registered} version {version} already")
    return version


def _profile(data: bytes) -> dict[str, Any]:
    if len(data) > PROFILE_BYTES_MAX:
        raise InvalidError(
            f"the bundle's profile has {len(data)} bytes, more than {PROFILE_BYTES_MAX}"
        )
    try:
        profile: Any = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        raise InvalidError(f"the bundle's profile is not JSON: {exc!s:.200}") from exc
    if not isinstance(profile, dict):
        raise InvalidError("the bundle's profile is not a JSON object")
    return profile


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
