"""Who this device is: its key, its certificate, and the fleet it belongs to.

    identity/pending.pem       key of an enrolment or renewal in progress; the same one is used
                               again after a crash or a lost reply, so that nothing is lost
    identity/<serial>/         key.pem  certificate.pem  ca.pem  root.json  fleet
    identity/current           names the folder above that counts; replaced by one rename

The first connection is pinned: the token carries the SHA-256 of the fleet's CA, the server shows
its chain, and nothing is sent before the CA of that hash has verified the connection. A renewed
pair counts only after the server has accepted it once; until then the old one does.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .. import __version__
from ..proto import enrolment_pb2, enrolment_pb2_grpc, twin_pb2, twin_pb2_grpc
from ..proto.errors import ContractError
from ..proto.names import check_digest, check_name
from .errors import AgentError, StateError
from .updates.errors import DamagedStateError
from .updates.fs import Disk, FileSystem, load_document, save, save_document

MESSAGE_BYTES_MAX: Final = 1 << 20  # of one gRPC message; an artefact's chunk has 256 KiB
KEY_BYTES_MAX: Final = 4096
FILE_BYTES_MAX: Final = 512 << 10
_SECRET: Final = re.compile(r"[a-z2-7]{26}")


class IdentityError(AgentError):
    """The device has no usable identity; nothing of what it has was changed."""

    code = "agent.identity"


class TokenError(IdentityError):
    """The text is not an enrolment token; nothing was sent."""

    code = "agent.identity.token"


class PinError(IdentityError):
    """The server is not of the token's fleet; nothing was sent to it."""

    code = "agent.identity.pin"


class EnrolmentRefusedError(IdentityError):
    """The server refused; a new token is needed."""

    code = "agent.identity.refused"


class EnrolmentUnavailableError(IdentityError):
    """The server cannot be reached now; the same token works later."""

    code = "agent.identity.unavailable"
    retry = True


@dataclass(frozen=True, slots=True)
class EnrolmentToken:
    """What a token says; its grammar is in ``shoal.server.trust.tokens``."""

    device: str
    secret: str
    ca_sha256: str
    port: int
    host: str

    def __repr__(self) -> str:
        return f"EnrolmentToken({self.device} at {self.host}:{self.port})"  # never the secret

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        """Return the token of a text ``shoal1.<device>.<secret>.<ca>.<port>.<host>``.

        Raises:
            TokenError: It is none. The message does not repeat it.
        """
        parts = text.strip().split(".", 5)
        hint = "paste the whole line that `shoal devices token` printed"
        if len(parts) != 6 or parts[0] != "shoal1":
            raise TokenError("this is not an enrolment token", hint=hint)
        _, device, secret, ca_sha256, port, host = parts
        try:
            check_name(device)
            check_digest(ca_sha256)
        except ContractError as exc:
            raise TokenError("the token is damaged", hint=hint) from exc
        if not _SECRET.fullmatch(secret) or not port.isdecimal() or not host:
            raise TokenError("the token is damaged", hint=hint)
        if not 1 <= int(port) <= 65535:
            raise TokenError("the token's port is out of range", hint=hint)
        return cls(device, secret, ca_sha256, int(port), host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A loaded identity; immutable."""

    device: str
    fleet: str
    broker_url: str
    server_address: str
    """host:port of the device port."""
    director_key: bytes
    """Public ed25519 key of the director, 32 bytes."""
    tuf_root: bytes
    """First root metadata of the approval repository."""
    folder: Path
    """Where the files below are."""
    issued_ms: int
    expires_ms: int

    @property
    def key_path(self) -> Path:
        """The private key, PEM."""
        return self.folder / "key.pem"

    @property
    def certificate_path(self) -> Path:
        """The device's certificate, PEM."""
        return self.folder / "certificate.pem"

    @property
    def ca_path(self) -> Path:
        """The fleet CA's certificate, PEM."""
        return self.folder / "ca.pem"

    @classmethod
    def load(cls, state_dir: Path, *, fs: FileSystem | None = None) -> Identity:
        """Return the identity in a state folder.

        Raises:
            IdentityError: There is none, or it is damaged.
            StateError: Others may read the key.
        """
        fs, root = fs or Disk(), state_dir / "identity"
        try:
            pointer = load_document(fs, root / "current")
        except DamagedStateError as exc:
            raise IdentityError(str(exc), hint="enrol the device again") from exc
        if pointer is None:
            raise IdentityError(
                "this device is not enrolled",
                hint="shoal-agent enroll --config <file> --token <token>",
            )
        return _load(fs, root / str(pointer["folder"]))

    def channel(self, address: str = "") -> grpc.Channel:
        """Return a mutual-TLS channel to the server; the caller closes it.

        Args:
            address: host:port, by default ``server_address``.
        """
        return grpc.secure_channel(
            address or self.server_address, self._credentials(), CHANNEL_OPTIONS
        )

    def aio_channel(self) -> grpc.aio.Channel:
        """Return the same channel for an event loop; the caller closes it."""
        return grpc.aio.secure_channel(self.server_address, self._credentials(), CHANNEL_OPTIONS)

    def _credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca_path.read_bytes(),
            private_key=self.key_path.read_bytes(),
            certificate_chain=self.certificate_path.read_bytes(),
        )

    def is_renewal_due(self, now_ms: int) -> bool:
        """Return whether two thirds of the certificate's life are over."""
        return now_ms >= self.issued_ms + (self.expires_ms - self.issued_ms) * 2 // 3


CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", 64 << 20),  # a federated round's delta goes up in one stream
    ("grpc.keepalive_time_ms", 120_000),  # notices a dead NAT entry; servers allow 60 s
)


def enroll(
    token: str, state_dir: Path, *, timeout_s: float = 30.0, fs: FileSystem | None = None
) -> Identity:
    """Exchange a token for an identity, and keep it in ``state_dir/identity``.

    Safe to repeat after any crash with the same token: the key is kept until the certificate is.

    Args:
        token: The text that an operator made.
        state_dir: The agent's state folder; made with mode 0700.
        timeout_s: For each of the two connections.
        fs: The disk.

    Raises:
        TokenError: The text is not a token.
        PinError: The server is not of the token's fleet.
        EnrolmentRefusedError: The server refuses the token.
        EnrolmentUnavailableError: The server cannot be reached now.
    """
    parsed, fs = EnrolmentToken.parse(token), fs or Disk()
    ca_pem = _pinned_ca(parsed, timeout_s=timeout_s)
    root = _prepare(fs, state_dir)
    key = _pending_key(fs, root)
    host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
    credentials = grpc.ssl_channel_credentials(root_certificates=ca_pem)
    request = enrolment_pb2.EnrolRequest(
        device_id=parsed.device,
        token=parsed.secret,
        csr_der=_request(key),
        agent_version=__version__[:40],
    )
    with grpc.secure_channel(f"{host}:{parsed.port}", credentials, CHANNEL_OPTIONS) as channel:
        try:
            stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
            reply = stub.Enrol(request, timeout=timeout_s)
        except grpc.RpcError as exc:
            raise _refused(exc) from exc
    _check_reply(reply, key, parsed.device, ca_pem)
    facts = {
        "device": parsed.device,
        "fleet": reply.fleet,
        "broker_url": reply.broker_url,
        "server_address": reply.server_address,
        "director_key": reply.director_key.hex(),
    }
    folder = _write(fs, root, key, reply.certificate_pem, ca_pem, reply.tuf_root, facts)
    _switch(fs, root, folder)
    return _load(fs, folder)


def renew(
    state_dir: Path,
    *,
    timeout_s: float = 30.0,
    fs: FileSystem | None = None,
    probe: Callable[[Identity], None] | None = None,
) -> Identity:
    """Replace key and certificate, over the connection of those that are still valid.

    Args:
        state_dir: The agent's state folder.
        timeout_s: Per call.
        fs: The disk.
        probe: Shows the new pair to the server and raises if it is not accepted; by default it
            asks for the desired state.

    Raises:
        EnrolmentRefusedError: The server refuses; the old pair still counts.
        EnrolmentUnavailableError: The server cannot be reached now.
    """
    fs = fs or Disk()
    old = Identity.load(state_dir, fs=fs)
    root = _prepare(fs, state_dir)
    key = _pending_key(fs, root, used=_read_key(fs, old.key_path))
    with old.channel() as channel:
        try:
            stub = enrolment_pb2_grpc.RenewalServiceStub(channel)
            reply = stub.Renew(enrolment_pb2.RenewRequest(csr_der=_request(key)), timeout=timeout_s)
        except grpc.RpcError as exc:
            raise _refused(exc) from exc
    ca_pem = old.ca_path.read_bytes()
    _check_reply(reply, key, old.device, ca_pem)
    facts = {
        "device": old.device,
        "fleet": old.fleet,
        "broker_url": old.broker_url,
        "server_address": old.server_address,
        "director_key": old.director_key.hex(),
    }
    folder = _write(fs, root, key, reply.certificate_pem, ca_pem, old.tuf_root, facts)
    new = _load(fs, folder)
    (probe or (lambda identity: _probe(identity, timeout_s)))(new)
    _switch(fs, root, folder)
    return new


# --- the steps -----------------------------------------------------------------------------------


def _pinned_ca(token: EnrolmentToken, *, timeout_s: float) -> bytes:
    """Return the CA that the server shows, if it is the token's (PEM)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent here; the hash below is the check
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((token.host, token.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=token.host) as secured,
        ):
            chain = _shown_chain(secured)
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise EnrolmentUnavailableError(
            f"no TLS server answers at {token.host}:{token.port}: {exc!s:.200}",
            hint="check that the server runs and that this device can reach it",
        ) from exc
    for certificate in chain:
        if hashlib.sha256(certificate).hexdigest() == token.ca_sha256:
            return ssl.DER_cert_to_PEM_cert(certificate).encode()
    raise PinError(
        f"the server at {token.host}:{token.port} is not of the fleet that made the token",
        hint="somebody is in between, or the server's state was made anew: make a new token",
    )


def _shown_chain(secured: ssl.SSLSocket) -> list[bytes]:
    """Return the certificates that the peer showed, unverified, in DER."""
    public: Any = getattr(secured, "get_unverified_chain", None)
    if public is not None:  # Python 3.13
        return [bytes(each) for each in public()]
    inner: Any = secured._sslobj  # type: ignore[attr-defined]  # the same, before it was public
    return [
        ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in inner.get_unverified_chain() or ()
    ]


def _prepare(fs: FileSystem, state_dir: Path) -> Path:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        root = state_dir / "identity"
        if fs.make_dir(root):
            fs.sync_dir(state_dir)
    except OSError as exc:
        raise StateError(
            f"the state folder {state_dir} is not usable: {exc.strerror}", hint="check its owner"
        ) from exc
    return root


def _pending_key(
    fs: FileSystem, root: Path, *, used: ec.EllipticCurvePrivateKey | None = None
) -> ec.EllipticCurvePrivateKey:
    """Return the key of an attempt before this one, or a new one that is durable.

    A crash right after a switch leaves the key that is ``used`` now; it is not pending any more.
    """
    path = root / "pending.pem"
    if fs.size(path) is not None:
        try:
            key = _read_key(fs, path)
            if used is None or key.private_numbers() != used.private_numbers():
                return key
        except ValueError:
            fs.remove(path)
    key = ec.generate_private_key(ec.SECP256R1())
    save(fs, path, _key_pem(key))
    return key


def _read_key(fs: FileSystem, path: Path) -> ec.EllipticCurvePrivateKey:
    found = serialization.load_pem_private_key(fs.read(path, bytes_max=KEY_BYTES_MAX), None)
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key on a curve")
    return found


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _request(key: ec.EllipticCurvePrivateKey) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))  # it is ignored
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _check_reply(reply: Any, key: ec.EllipticCurvePrivateKey, device: str, ca_pem: bytes) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(reply.certificate_pem)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem))
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise IdentityError("the server's certificate for this device is not acceptable") from exc
    if certificate.public_key() != key.public_key() or [n.value for n in names] != [device]:
        raise IdentityError("the server's certificate is for another key or device")


def _write(
    fs: FileSystem,
    root: Path,
    key: ec.EllipticCurvePrivateKey,
    certificate_pem: bytes,
    ca_pem: bytes,
    tuf_root: bytes,
    facts: dict[str, str],
) -> Path:
    """Write a complete folder, durable, which nothing points to yet."""
    serial = x509.load_pem_x509_certificate(certificate_pem).serial_number
    folder = root / f"{serial:x}"
    if not fs.make_dir(folder):
        try:
            return _load(fs, folder).folder  # complete, and perhaps the one that counts
        except IdentityError:
            pass
    fs.sync_dir(root)
    for name, data in (
        ("key.pem", _key_pem(key)),
        ("certificate.pem", certificate_pem),
        ("ca.pem", ca_pem),
        ("root.json", tuf_root),
    ):
        fs.create(folder / name, data)
        fs.sync(folder / name)
    save_document(fs, folder / "fleet", facts)
    return folder


def _switch(fs: FileSystem, root: Path, folder: Path) -> None:
    """Let a folder count; the one before it stays, older ones go."""
    try:
        previous = load_document(fs, root / "current")
    except DamagedStateError:  # moved aside; the new pair takes its place
        previous = None
    save_document(fs, root / "current", {"folder": folder.name})
    kept = {"current", folder.name, str(previous["folder"]) if previous else ""}
    for name in set(fs.names(root)) - kept:
        for inner in fs.names(root / name):
            fs.remove(root / name / inner)
        fs.remove(root / name)


def _load(fs: FileSystem, folder: Path) -> Identity:
    try:
        mode = stat.S_IMODE(os.stat(folder / "key.pem").st_mode)
        if mode & 0o077:
            raise StateError(
                f"the device's key may be read by others (mode {mode:04o})",
                hint=f"chmod 600 {folder / 'key.pem'}, and enrol again if others use this machine",
            )
        key = _read_key(fs, folder / "key.pem")
        data = fs.read(folder / "certificate.pem", bytes_max=FILE_BYTES_MAX)
        certificate = x509.load_pem_x509_certificate(data)
        facts = load_document(fs, folder / "fleet")
        if facts is None or certificate.public_key() != key.public_key():
            raise ValueError("its parts do not belong together")
        return Identity(
            device=check_name(facts["device"]),
            fleet=facts["fleet"],
            broker_url=facts["broker_url"],
            server_address=facts["server_address"],
            director_key=bytes.fromhex(facts["director_key"]),
            tuf_root=fs.read(folder / "root.json", bytes_max=FILE_BYTES_MAX),
            folder=folder,
            issued_ms=int(certificate.not_valid_before_utc.timestamp() * 1000),
            expires_ms=int(certificate.not_valid_after_utc.timestamp() * 1000),
        )
    except (OSError, ValueError, KeyError, TypeError, ContractError, DamagedStateError) as exc:
        raise IdentityError(
            f"the identity in {folder.name} is damaged: {exc!s:.200}",
            hint="enrol the device again with a new token",
        ) from exc


def _probe(identity: Identity, timeout_s: float) -> None:
    with identity.channel() as channel:
        try:
            twin_pb2_grpc.TwinServiceStub(channel).GetDesired(
                twin_pb2.GetDesiredRequest(), timeout=timeout_s
            )
        except grpc.RpcError as exc:
            raise _refused(exc) from exc


def _refused(exc: grpc.RpcError) -> IdentityError:
    code, details = exc.code(), exc.details()
    refusals = (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.INVALID_ARGUMENT,
    )
    if code in refusals:
        return EnrolmentRefusedError(
            f"the server refuses this device: {details!s:.200}", hint="ask for a new token"
        )
    return EnrolmentUnavailableError(
        f"the server does not answer: {code.name}: {details!s:.200}", hint="try again later"
    )
