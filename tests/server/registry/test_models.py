"""The model registry: versions, lineage, and what is not a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.proto import bundle
from shoal.proto.errors import BundleError, ContractError
from shoal.server.api import summary
from shoal.server.errors import ConflictError, InvalidError, NotFoundError
from shoal.server.registry import ArtefactConfig, Artefacts, Models
from shoal.server.store import Store, audit
from shoal.server.store.tables import Artefact
from tests.sims.server import make_bundle
from tests.sims.stores import fresh_store, statements


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return an empty database."""
    found = fresh_store(tmp_path / "fleet.db")
    yield found
    found.close()


@pytest.fixture
def artefacts(store: Store, tmp_path: Path) -> Artefacts:
    """Return an artefact store."""
    return Artefacts(tmp_path / "artefacts", store, clock=lambda: 7, config=ArtefactConfig())


@pytest.fixture
def models(store: Store, artefacts: Artefacts) -> Models:
    """Return an empty registry."""
    return Models(store, artefacts, clock=lambda: 7)


def test_versions_count_per_name(models: Models, artefacts: Artefacts, store: Store) -> None:
    """The same bundle is one version, however often it is registered."""
    first, second = (artefacts.put(make_bundle(salt=salt), "dataset") for salt in (1, 2))
    other = artefacts.put(make_bundle("pump"), "bundle")
    assert models.register("wearable", first, note="one") == 1
    assert models.register("wearable", second, parent_sha256=first) == 2
    assert models.register("pump", other) == 1
    assert models.register("wearable", first) == 1
    assert [(row.name, row.version) for row in models.list()] == [
        ("pump", 1),
        ("wearable", 1),
        ("wearable", 2),
    ]
    row = models.get(second)
    assert (row.parent_sha256, row.approved_ms, row.manifest["channels"]) == (
        first,
        None,
        ["ax", "ay"],
    )
    with store.read() as session:
        assert audit.verify(session)[0] == 3
        assert session.get_one(Artefact, first).kind == "bundle"


def test_lists_do_not_read_profiles(models: Models, artefacts: Artefacts, store: Store) -> None:
    """They may have 8 MiB each; who wants one asks for it."""
    sha256 = artefacts.put(make_bundle(), "bundle")
    models.register("wearable", sha256)
    with statements(store) as asked:
        models.list()
        models.get(sha256)
        with store.read() as session:
            summary.models(session)
        assert asked and not any("profile" in each for each in asked)
        assert models.profile(sha256) == {}
        assert any("profile" in each for each in asked)


def test_what_is_not_a_bundle_is_not_registered(models: Models, artefacts: Artefacts) -> None:
    """A pickle, a renamed model, a bundle of another model, a profile that is no JSON."""
    with pytest.raises(BundleError):
        models.register("wearable", artefacts.put(b"\x80\x04\x95 pickle", "bundle"))
    sha256 = artefacts.put(make_bundle("pump"), "bundle")
    with pytest.raises(InvalidError, match="of model 'pump'"):
        models.register("wearable", sha256)
    found = bundle.unpack(make_bundle())
    for profile in (b"[]", b"{", b'{"x": NaN}'):
        parts = {**found.parts, "profile.json": profile}
        with pytest.raises(InvalidError, match="profile"):
            models.register("wearable", artefacts.put(bundle.pack(found.manifest, parts), "bundle"))
    assert models.list() == []


def test_references_must_exist(models: Models, artefacts: Artefacts) -> None:
    """Lineage that points nowhere is none."""
    sha256 = artefacts.put(make_bundle(), "bundle")
    with pytest.raises(NotFoundError, match="no artefact"):
        models.register("wearable", "f" * 64)
    with pytest.raises(NotFoundError, match="parent"):
        models.register("wearable", sha256, parent_sha256="f" * 64)
    with pytest.raises(NotFoundError, match="source"):
        models.register("wearable", sha256, source_sha256="f" * 64)
    with pytest.raises(ContractError):
        models.register("wearable", sha256, parent_sha256="../x")
    with pytest.raises(ContractError):
        models.register("Not A Name", sha256)
    with pytest.raises(InvalidError, match="note"):
        models.register("wearable", sha256, note="x" * 501)
    with pytest.raises(NotFoundError):
        models.get(sha256)


def test_one_bundle_has_one_name(models: Models, artefacts: Artefacts) -> None:
    """Who asks for another name for the same bytes is mistaken."""
    sha256 = artefacts.put(make_bundle(), "bundle")
    models.register("wearable", sha256)
    with pytest.raises(ConflictError, match="wearable version 1"):
        models.register("pump", sha256)


def test_approval_is_noted_with_its_evidence(models: Models, artefacts: Artefacts) -> None:
    """Approving again replaces the evidence, and keeps the time of the first approval."""
    sha256 = artefacts.put(make_bundle(), "bundle")
    models.register("wearable", sha256)
    models.approved(sha256, evidence={"accuracy": 0.9}, targets_version=2)
    models.approved(sha256, evidence={"accuracy": 0.8}, targets_version=2)
    row = models.get(sha256)
    assert (row.approved_ms, row.evidence) == (7, {"accuracy": 0.8})
    with pytest.raises(NotFoundError):
        models.approved("f" * 64, evidence={}, targets_version=1)
