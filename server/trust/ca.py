"""The fleet's certificate authority: its key, the server's certificate, those of the devices.

    ca/key.pem, ca/certificate.pem           P-256, self-signed; its SHA-256 is in every token
    tls/key.pem, tls/chain.pem               the server: leaf + CA, so that a device can pin the CA

A device's certificate says what this file decides, never what the request asks: CN = device id,
SAN = ``spiffe://<fleet>/device/<id>``, client authentication, nothing else. Its serial is in the
``certificate`` table; a serial that is not there, or revoked, is refused at every call.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sqlalchemy.orm import Session

from ...proto.names import check_name
from ..errors import ConfigError, InvalidError
from ..store.tables import Certificate, Device
from . import files

CSR_BYTES_MAX: Final = 4096
DAY_MS: Final = 86_400_000
BACKDATE_MS: Final = 3_600_000  # a device whose clock is up to an hour behind may start at once


@dataclass(frozen=True, slots=True, kw_only=True)
class CaConfig:
    """Names and lifetimes."""

    names: tuple[str, ...] = ()
    """DNS names and IP addresses by which devices reach this server, besides localhost."""
    device_days: int = 90
    """Life of a device's certificate; it renews itself at two thirds."""
    server_days: int = 365
    """Life of the server's certificate; made again at start, after two thirds."""
    ca_days: int = 3650
    """Life of the fleet CA."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.device_days <= self.ca_days or not 1 <= self.server_days <= self.ca_days:
            raise ValueError("device_days and server_days must be 1 to ca_days")
        if self.ca_days > 36_500:
            raise ValueError("ca_days must be at most 36500")
        for name in self.names:
            if not name.isascii() or not name or any(char.isspace() for char in name):
                raise ValueError(f"{name!r:.80} is no DNS name or IP address")


def common_name(certificate: x509.Certificate) -> str:
    """Return the CN of a certificate, "" if it has not exactly one."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def public_key_sha256(key: ec.EllipticCurvePublicKey) -> str:
    """Return the hex digest of a key's SubjectPublicKeyInfo."""
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, spki)).hexdigest()


def read_request(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate signing request; nothing else of it is used.

    Raises:
        InvalidError: Not a PKCS#10 of at most 4 KiB with a P-256 key and its own signature.
    """
    if not 1 <= len(csr_der) <= CSR_BYTES_MAX:
        raise InvalidError(f"a signing request has 1 to {CSR_BYTES_MAX} bytes, not {len(csr_der)}")
    try:
        request = x509.load_der_x509_csr(csr_der)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise InvalidError("the signing request cannot be read") from exc
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidError("the signing request's key is not P-256")
    if not valid:
        raise InvalidError("the signing request's signature is not by its own key")
    return key


class FleetCa:
    """The CA of one fleet. Thread-safe: nothing in it changes after :meth:`open`."""

    def __init__(
        self,
        root: Path,
        fleet: str,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        *,
        config: CaConfig,
        clock: Callable[[], int],
    ) -> None:
        self.fleet, self.certificate = fleet, certificate
        self._root, self._key, self._config, self._clock = root, key, config, clock

    @classmethod
    def open(cls, root: Path, fleet: str, *, config: CaConfig, clock: Callable[[], int]) -> FleetCa:
        """Return the CA of a state folder; the first time it is made.

        Args:
            root: The server's state folder.
            fleet: Name of the fleet.
            config: Names and lifetimes.
            clock: Unix ms.

        Raises:
            ConfigError: The files are damaged, readable by others, or of another fleet.
        """
        check_name(fleet, what="fleet name")
        folder = root / "ca"
        key_path, certificate_path = folder / "key.pem", folder / "certificate.pem"
        if not certificate_path.exists():  # it is written last: no device can know this CA yet
            files.make_private_dir(folder)
            key = ec.generate_private_key(ec.SECP256R1())
            files.write(key_path, _pem(key))
            made = _self_signed(key, fleet, clock(), config.ca_days)
            files.write(certificate_path, made.public_bytes(serialization.Encoding.PEM))
        try:
            loaded = serialization.load_pem_private_key(files.read_private(key_path), None)
            certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        except ValueError as exc:
            raise ConfigError(
                f"the CA in {folder} is damaged", hint="restore the folder from its backup"
            ) from exc
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or (
            loaded.public_key() != certificate.public_key()
        ):
            raise ConfigError(f"key and certificate in {folder} do not belong together")
        if common_name(certificate) != fleet:
            raise ConfigError(
                f"the CA in {folder} is of the fleet {common_name(certificate)!r}, not {fleet!r}",
                hint="set the fleet's name back, or start with an empty state folder",
            )
        return cls(root, fleet, loaded, certificate, config=config, clock=clock)

    @property
    def certificate_pem(self) -> bytes:
        """The CA's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def sha256(self) -> str:
        """Hex digest of the CA's certificate (DER): what a token pins."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def server_identity(self) -> tuple[bytes, bytes]:
        """Return (key, chain) in PEM for the server's ports; made again when it is time.

        The chain is the leaf and the CA.
        """
        folder = self._root / "tls"
        files.make_private_dir(folder)
        try:
            chain = (folder / "chain.pem").read_bytes()
            key = files.read_private(folder / "key.pem")
            leaf = x509.load_pem_x509_certificates(chain)[0]
            matches = (
                serialization.load_pem_private_key(key, None).public_key() == leaf.public_key()
            )
        except (OSError, ValueError, ConfigError):
            matches = False
        if matches and self._is_current(leaf):
            return key, chain
        made = ec.generate_private_key(ec.SECP256R1())
        certificate = self._server_certificate(made)
        key = _pem(made)
        chain = certificate.public_bytes(serialization.Encoding.PEM) + self.certificate_pem
        files.write(folder / "key.pem", key)
        files.write(folder / "chain.pem", chain)
        return key, chain

    def issue_device(
        self, session: Session, device: Device, key: ec.EllipticCurvePublicKey
    ) -> bytes:
        """Return a certificate (PEM) for a device's key, recorded in the caller's transaction."""
        now_ms = self._clock()
        uri = x509.UniformResourceIdentifier(f"spiffe://{self.fleet}/device/{device.name}")
        certificate = (
            _builder(device.name, self.fleet, key, now_ms, self._config.device_days)
            .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_authority(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        session.add(
            Certificate(
                serial=f"{certificate.serial_number:x}",
                device_id=device.id,
                issued_ms=now_ms,
                expires_ms=now_ms + self._config.device_days * DAY_MS,
            )
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def _names(self) -> list[x509.GeneralName]:
        found: list[x509.GeneralName] = []
        for name in dict.fromkeys(("localhost", "127.0.0.1", "::1", *self._config.names)):
            try:
                found.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                found.append(x509.DNSName(name))
        return found

    def _is_current(self, leaf: x509.Certificate) -> bool:
        try:
            leaf.verify_directly_issued_by(self.certificate)
            found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return False
        until_ms = leaf.not_valid_after_utc.timestamp() * 1000
        due_ms = until_ms - self._config.server_days * DAY_MS / 3
        return list(found) == self._names() and self._clock() < due_ms

    def _server_certificate(self, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        builder = _builder(
            "shoal-server", self.fleet, key.public_key(), self._clock(), self._config.server_days
        )
        return (
            builder.add_extension(x509.SubjectAlternativeName(self._names()), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_authority(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _time(now_ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(now_ms // 1000, datetime.UTC)


def _name(common: str, fleet: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _builder(
    common: str, fleet: str, key: ec.EllipticCurvePublicKey, now_ms: int, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common, fleet))
        .issuer_name(_name(fleet, fleet))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_ms - BACKDATE_MS))
        .not_valid_after(_time(now_ms + days * DAY_MS))
    )


def _self_signed(
    key: ec.EllipticCurvePrivateKey, fleet: str, now_ms: int, days: int
) -> x509.Certificate:
    public = key.public_key()
    return (
        _builder(fleet, fleet, public, now_ms, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _authority(key: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
