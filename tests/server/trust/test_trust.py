"""Faults C: who may join; who may be let run what. Real database, real keys, injected clock."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from shoal.agent.identity import EnrolmentToken
from shoal.proto import assignment
from shoal.proto.errors import ContractError
from shoal.server.errors import (
    BusyError,
    ConfigError,
    ConflictError,
    DeniedError,
    InvalidError,
    NotFoundError,
)
from shoal.server.store import Store, audit
from shoal.server.store.tables import Alert, AssignmentRow, Audit, Certificate, Device, Model, Token
from shoal.server.trust import director as directors
from shoal.server.trust import tokens
from shoal.server.trust.ca import CaConfig, FleetCa, read_request
from shoal.server.trust.director import Director, DirectorConfig
from shoal.server.trust.enrolment import Enrolment, EnrolmentConfig
from shoal.server.trust.tokens import AttemptLimit, LimitConfig
from tests.sims.stores import fresh_store

START_MS = 1_790_000_000_000
DAY_MS = 86_400_000


@dataclass
class Fleet:
    """A fleet's trust with a clock that a test moves."""

    state: Path
    store: Store
    now_ms: int = START_MS

    def __post_init__(self) -> None:
        """Open it."""
        self.ca = FleetCa.open(self.state, "demo", config=CaConfig(), clock=self.clock)
        self.enrolment = Enrolment(self.store, self.ca, config=EnrolmentConfig(), clock=self.clock)

    def clock(self) -> int:
        """Return Unix ms."""
        return self.now_ms

    def token(self, device: str = "wrist-01") -> EnrolmentToken:
        """Return a new token as the device reads it."""
        return EnrolmentToken.parse(self.enrolment.mint(device, host="127.0.0.1", port=7443).token)

    def enrol(self, token: EnrolmentToken, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        """Show a token with a key."""
        issued = self.enrolment.enrol(token.device, token.secret, csr(key), agent_version="0.1")
        return x509.load_pem_x509_certificate(issued)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A fleet in a folder."""
    store = fresh_store(tmp_path / "fleet.db")
    yield Fleet(tmp_path / "state", store)
    store.close()


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def csr(key: ec.EllipticCurvePrivateKey, name: str = "somebody-else") -> bytes:
    """Return a request that asks for more than it will get."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


# --- the CA ------------------------------------------------------------------------------------


def test_a_certificate_says_what_the_ca_decides(fleet: Fleet) -> None:
    """The request's subject and extensions are worth nothing."""
    key = new_key()
    certificate = fleet.enrol(fleet.token(), key)
    certificate.verify_directly_issued_by(fleet.ca.certificate)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert [name.value for name in names] == ["wrist-01"]
    extensions = certificate.extensions
    alternative = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = alternative.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == ["spiffe://demo/device/wrist-01"]
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.public_key() == key.public_key()
    life = certificate.not_valid_after_utc.timestamp() * 1000 - START_MS
    assert life == 90 * DAY_MS
    with fleet.store.read() as session:
        row = session.get(Certificate, f"{certificate.serial_number:x}")
        assert row is not None and row.expires_ms == START_MS + 90 * DAY_MS


def test_the_ca_is_made_once_and_kept(fleet: Fleet) -> None:
    """A restart finds the same CA; its key is for the owner alone."""
    again = FleetCa.open(fleet.state, "demo", config=CaConfig(), clock=fleet.clock)
    assert again.sha256 == fleet.ca.sha256
    path = fleet.state / "ca" / "key.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="read by others"):
        FleetCa.open(fleet.state, "demo", config=CaConfig(), clock=fleet.clock)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="fleet"):
        FleetCa.open(fleet.state, "other", config=CaConfig(), clock=fleet.clock)
    path.write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="damaged"):
        FleetCa.open(fleet.state, "demo", config=CaConfig(), clock=fleet.clock)


def test_the_servers_certificate_is_kept_until_it_is_time(fleet: Fleet) -> None:
    """The same at every start; another when two thirds are over, or names changed."""
    key, chain = fleet.ca.server_identity()
    assert (key, chain) == fleet.ca.server_identity()
    leaf, root = x509.load_pem_x509_certificates(chain)
    leaf.verify_directly_issued_by(root)
    assert root == fleet.ca.certificate
    fleet.now_ms += 250 * DAY_MS
    renewed = fleet.ca.server_identity()
    assert renewed[1] != chain
    config = CaConfig(names=("fleet.example", "10.0.0.7"))
    named = FleetCa.open(fleet.state, "demo", config=config, clock=fleet.clock).server_identity()[1]
    found = x509.load_pem_x509_certificates(named)[0].extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert found.value.get_values_for_type(x509.DNSName) == ["localhost", "fleet.example"]
    assert "10.0.0.7" in [str(ip) for ip in found.value.get_values_for_type(x509.IPAddress)]


# --- joining -----------------------------------------------------------------------------------


def test_a_lost_reply_is_harmless(fleet: Fleet) -> None:
    """Fault 30: the same token with the same key gets the same certificate."""
    token, key = fleet.token(), new_key()
    first = fleet.enrol(token, key)
    fleet.now_ms += 3_600_000
    assert fleet.enrol(token, key) == first
    with fleet.store.read() as session:
        assert len(session.scalars(select(Certificate)).all()) == 1
        assert len(session.scalars(select(Device)).all()) == 1


def test_a_used_token_is_refused_to_another_key(fleet: Fleet) -> None:
    """Fault 29: refused, alarmed once, and the first device keeps what it has."""
    token = fleet.token()
    key = new_key()
    first = fleet.enrol(token, key)
    for _ in range(3):
        with pytest.raises(DeniedError):
            fleet.enrol(token, new_key())
    assert fleet.enrol(token, key) == first
    with fleet.store.read() as session:
        (alert,) = session.scalars(select(Alert)).all()
        assert (alert.kind, alert.state, alert.evidence["attempts"]) == ("key_conflict", "open", 3)
        actions = session.scalars(select(Audit.action)).all()
        assert actions == ["token.made", "device.enrolled", "enrolment.refused"]
        audit.verify(session)


def test_no_other_token_is_worth_anything(fleet: Fleet) -> None:
    """Unknown, expired, of another device: one and the same answer."""
    token, key = fleet.token(), new_key()
    messages = set()
    fleet.token("wrist-02")
    for device, secret in (
        ("wrist-01", tokens.new_secret()), ("wrist-02", token.secret), ("wrist-01", ""),
        ("wrist-01", token.secret[:-1]), ("wrist-01", "x" * 100_000),
    ):  # fmt: skip
        with pytest.raises(DeniedError) as caught:
            fleet.enrolment.enrol(device, secret, csr(key))
        messages.add(str(caught.value))
    fleet.now_ms += 25 * 3_600_000
    with pytest.raises(DeniedError) as caught:
        fleet.enrol(token, key)
    assert messages == {str(caught.value)}
    with fleet.store.read() as session:
        assert session.scalars(select(Device)).all() == []


def test_a_token_may_live_shorter_and_never_longer(fleet: Fleet) -> None:
    """A life of 0 is the configured one, which is also the bound."""
    for ttl_s, life_s in ((0, 86_400), (60, 60), (10**9, 86_400)):
        minted = fleet.enrolment.mint("wrist-01", host="h", port=1, ttl_s=ttl_s)
        assert minted.expires_ms == START_MS + 1000 * life_s


def test_the_secret_is_not_stored(fleet: Fleet) -> None:
    """Neither in the table nor in the audit log, nor in the repr that a log may print."""
    token = fleet.token()
    with fleet.store.read() as session:
        row = session.scalars(select(Token)).one()
        assert token.secret not in row.secret_sha256
        assert token.secret not in str(session.scalars(select(Audit)).one().detail)
    assert token.secret not in repr(token)


def test_bad_requests_are_refused(fleet: Fleet) -> None:
    """Garbage, oversize, a foreign curve, a broken signature, an illegal id."""
    token, key = fleet.token(), new_key()
    good = csr(key)
    broken = good[:-8] + bytes(8)
    foreign = csr(ec.generate_private_key(ec.SECP384R1()))
    for request in (b"", b"garbage", bytes(5000), good[:50], broken, foreign):
        with pytest.raises(InvalidError):
            fleet.enrolment.enrol("wrist-01", token.secret, request)
    with pytest.raises(InvalidError):
        fleet.enrolment.enrol("../wrist", token.secret, good)
    assert fleet.enrol(token, key)


@given(st.binary(max_size=300))
def test_whatever_comes_as_a_request(data: bytes) -> None:
    """A request is read, or InvalidError is raised: nothing else comes out."""
    with pytest.raises(InvalidError):
        read_request(data)


def test_revocation_shuts_everything(fleet: Fleet) -> None:
    """Certificates, tokens in use and tokens not yet used; a new token lets it in again."""
    token, unused, key = fleet.token(), fleet.token(), new_key()
    fleet.enrol(token, key)
    fleet.enrolment.revoke("wrist-01")
    for each in (token, unused):
        with pytest.raises(DeniedError):
            fleet.enrol(each, key)
    with fleet.store.read() as session:
        device = session.scalars(select(Device)).one()
        assert device.revoked_ms == START_MS
        assert [row.revoked_ms for row in session.scalars(select(Certificate))] == [START_MS]
    with pytest.raises(DeniedError):
        fleet.enrolment.renew(device.id, csr(new_key()), key_sha256="0" * 64)
    fleet.enrol(fleet.token(), new_key())
    with fleet.store.read() as session:
        assert session.scalars(select(Device)).one().revoked_ms is None
    with pytest.raises(NotFoundError):
        fleet.enrolment.revoke("nobody")


def test_tokens_are_bounded(fleet: Fleet) -> None:
    """An endless loop in an operator's script fills nothing."""
    for _ in range(100):
        fleet.token()
    with pytest.raises(BusyError):
        fleet.token()


def test_a_token_comes_back_from_its_text() -> None:
    """The device reads what the server writes, for names and both kinds of addresses."""
    for host in ("localhost", "fleet.example.org", "127.0.0.1", "::1"):
        secret = tokens.new_secret()
        made = tokens.text("wrist-01", secret, ca_sha256="ab" * 32, host=host, port=7443)
        found = EnrolmentToken.parse(f" {made}\n")
        assert found == EnrolmentToken("wrist-01", secret, "ab" * 32, 7443, host)
    assert len({tokens.new_secret() for _ in range(100)}) == 100
    with pytest.raises(ContractError):
        tokens.text("Wrist 1", tokens.new_secret(), ca_sha256="ab" * 32, host="h", port=1)
    with pytest.raises(InvalidError):
        tokens.text("w", tokens.new_secret(), ca_sha256="ab" * 32, host="a b", port=1)


# --- the limit -----------------------------------------------------------------------------------


def test_guessing_is_bounded() -> None:
    """Fault 31: ten thousand guesses in a minute, of which the burst and the refill pass."""
    limit, passed = AttemptLimit(LimitConfig(source_per_minute=60)), 0
    for number in range(10_000):
        try:
            limit.check("10.0.0.1", now_ms=number * 6)
            passed += 1
        except BusyError as exc:
            assert exc.retry and "try again in" in exc.hint
    assert 119 <= passed <= 121


def test_one_source_does_not_shut_out_another() -> None:
    """Until the limit for all is reached."""
    limit = AttemptLimit(LimitConfig(source_per_minute=2, total_per_minute=5, sources_max=3))
    for source in ("a", "a", "b", "b"):
        limit.check(source, now_ms=0)
    with pytest.raises(BusyError):
        limit.check("a", now_ms=0)
    limit.check("c", now_ms=0)
    with pytest.raises(BusyError):
        limit.check("d", now_ms=0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30_000)), max_size=200))
def test_a_bucket_never_gives_more_than_its_rate(steps: list[tuple[int, int]]) -> None:
    """In any span: burst + rate x time, and what it answers to wait is enough."""
    bucket, now_ms, taken = tokens.Bucket(10, 10, 0), 0, 0
    for _, step_ms in steps:
        now_ms += step_ms
        wait_ms = bucket.take(now_ms)
        taken += not wait_ms
        if wait_ms:
            level = bucket.level + wait_ms * 10 / 60_000
            assert level >= 1
    assert taken <= 10 + now_ms * 10 / 60_000 + 1e-6


# --- the director --------------------------------------------------------------------------------


def make_director(fleet: Fleet) -> tuple[Director, ed25519.Ed25519PrivateKey]:
    """Return a director with a key from the state folder."""
    key = directors.load_key(fleet.state)
    made = Director(fleet.store, key, clock=fleet.clock, config=DirectorConfig())
    return made, key


def add_model(fleet: Fleet, version: int, *, approved: bool = True) -> Model:
    """Register a model."""
    model = Model(
        name="demo", version=version, sha256=f"{version:064x}", size=100, created_ms=START_MS,
        manifest={}, profile={}, approved_ms=START_MS if approved else None,
    )  # fmt: skip
    with fleet.store.begin() as session:
        session.add(model)
    return model


def test_counters_grow_and_signatures_verify(fleet: Fleet) -> None:
    """Every assignment of a device has a counter of its own; the desired version grows too."""
    director, key = make_director(fleet)
    fleet.enrol(fleet.token(), new_key())
    found = []
    for version in (1, 2, 3):
        model = add_model(fleet, version)
        with fleet.store.begin() as session:
            device = session.scalars(select(Device)).one()
            row = director.assign(session, device, model, f"r{version}")
            found.append(assignment.verify(row.payload, row.signature, key.public_key()))
            assert device.desired_version == version
    assert [each.counter for each in found] == [1, 2, 3]
    assert found[2].path == f"models/demo/{3:064x}.shoal"
    assert found[2].expires_unix_ms == START_MS + 7 * DAY_MS
    assert director.public_key == key.public_key().public_bytes_raw()
    assert directors.load_key(fleet.state).private_bytes_raw() == key.private_bytes_raw()


def test_a_rolled_back_transaction_uses_no_counter(fleet: Fleet) -> None:
    """What was not committed was never sent; the next one is in order."""
    director, _ = make_director(fleet)
    fleet.enrol(fleet.token(), new_key())
    model = add_model(fleet, 1)
    with pytest.raises(RuntimeError), fleet.store.begin() as session:
        director.assign(session, session.scalars(select(Device)).one(), model, "r1")
        raise RuntimeError
    with fleet.store.begin() as session:
        device = session.scalars(select(Device)).one()
        assert director.assign(session, device, model, "r1").counter == 1


def test_an_old_assignment_is_signed_again(fleet: Fleet) -> None:
    """The same counter and bundle with a later expiry, so that who was away can act on it."""
    director, key = make_director(fleet)
    fleet.enrol(fleet.token(), new_key())
    assert director.current(1) is None
    model = add_model(fleet, 1)
    with fleet.store.begin() as session:
        device = session.scalars(select(Device)).one()
        director.assign(session, device, model, "r1")
    row = director.current(device.id)
    assert row is not None
    fresh = row.payload
    again = director.current(device.id)
    assert again is not None and again.payload == fresh
    fleet.now_ms += 4 * DAY_MS
    row = director.current(device.id)
    assert row is not None and row.payload != fresh
    found = assignment.verify(row.payload, row.signature, key.public_key())
    assert (found.counter, found.expires_unix_ms) == (1, fleet.now_ms + 7 * DAY_MS)
    with fleet.store.read() as session:
        kept = session.get(AssignmentRow, device.id)
        assert kept is not None and kept.payload == row.payload


def test_the_director_refuses_what_it_must_not_sign(fleet: Fleet) -> None:
    """A model that is not approved, a device that is revoked."""
    director, _ = make_director(fleet)
    fleet.enrol(fleet.token(), new_key())
    unapproved, approved = add_model(fleet, 1, approved=False), add_model(fleet, 2)
    with pytest.raises(ConflictError, match="approve"), fleet.store.begin() as session:
        director.assign(session, session.scalars(select(Device)).one(), unapproved, "r")
    fleet.enrolment.revoke("wrist-01")
    with pytest.raises(ConflictError, match="revoked"), fleet.store.begin() as session:
        director.assign(session, session.scalars(select(Device)).one(), approved, "r")


def test_a_foreign_ca_is_not_this_fleets(fleet: Fleet, tmp_path: Path) -> None:
    """Fault 13: a certificate of another CA does not verify, whatever it says."""
    other = FleetCa.open(tmp_path / "other", "demo", config=CaConfig(), clock=fleet.clock)
    leaf = x509.load_pem_x509_certificates(other.server_identity()[1])[0]
    with pytest.raises(InvalidSignature):
        leaf.verify_directly_issued_by(fleet.ca.certificate)
