"""The model bundle: one file that holds all that a device needs to run a model.

    manifest.json     name, model file, inputs, outputs, classes, monitor, golden, reasons
    model.onnx        (or model.tflite) the quantized graph
    golden.npz        inputs and outputs that the device must reproduce before it activates
    profile.json      reference profile of the training data (edges of the sketches)
    training.onnx     optional: training graph for federated rounds

A bundle is an uncompressed ZIP with exactly these names, in this order, with fixed times and
modes, so that the same parts make the same bytes and hash. Its SHA-256 is the model's identity
everywhere: in telemetry, in the approval metadata, in assignments.

Uncompressed, because the parts can be used in place and a signed file must not inflate
(fault 11); one file, because a slot then holds exactly one thing to verify. Reading trusts
nothing: names, sizes, order and offsets are checked before any part is touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from .errors import BundleError, ContractError
from .names import check_name

VERSION: Final = 1
BUNDLE_BYTES_MAX: Final = 2 << 30
MANIFEST_BYTES_MAX: Final = 64 << 10
MODELS: Final = ("model.onnx", "model.tflite")
NAMES: Final = ("manifest.json", *MODELS, "golden.npz", "profile.json", "training.onnx")
_TIME: Final = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a bundle says about itself."""

    name: str
    """Name of the model."""
    model: str
    """``model.onnx`` or ``model.tflite``."""
    input: str
    """Name of the input tensor, float32 (batch, channels, samples)."""
    output: str
    """Name of the output tensor, float32 (batch, classes), probabilities that sum to 1."""
    channels: tuple[str, ...]
    """Names of the input channels, in order; the sketch bank has these and ``confidence``."""
    classes: tuple[str, ...]
    """Names of the classes, in order."""
    samples: int
    """Samples per input window."""
    golden_abs_max: float = 1e-2
    """Largest absolute difference of an output from its golden vector, for another CPU's int8."""
    version: int = VERSION
    facts: Mapping[str, str] = field(default_factory=dict)
    """Lineage for people: parent, run, accuracy. Nothing acts on it."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle in memory."""

    manifest: Manifest
    parts: Mapping[str, bytes]
    sha256: str
    length: int

    @property
    def model(self) -> bytes:
        """Bytes of the inference graph."""
        return self.parts[self.manifest.model]


def pack(manifest: Manifest, parts: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a bundle; the same parts make the same bytes.

    Args:
        manifest: The manifest.
        parts: Bytes by name: the model that the manifest names, ``golden.npz``,
            ``profile.json`` and, if the model can be trained, ``training.onnx``.

    Raises:
        BundleError: A part is missing or has no place in a bundle.
    """
    need = {manifest.model, "golden.npz", "profile.json"}
    extra = set(parts) - need - {"training.onnx"}
    if extra or not need <= set(parts):
        raise BundleError(f"a bundle takes {sorted(need)}, not {sorted(parts)}")
    text = json.dumps(asdict(manifest), sort_keys=True, indent=1).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in NAMES:
            data = text if name == "manifest.json" else parts.get(name)
            if data is not None:
                info = zipfile.ZipInfo(name, _TIME)
                info.external_attr = 0o100600 << 16
                archive.writestr(info, data)
    return out.getvalue()


def unpack(data: bytes) -> Bundle:
    """Return the checked bundle of ``data``.

    Raises:
        BundleError: Anything about it is not as the contract says.
    """
    if len(data) > BUNDLE_BYTES_MAX:
        raise BundleError(f"bundle of {len(data)} bytes exceeds {BUNDLE_BYTES_MAX}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if len(names) != len(set(names)) or not set(names) <= set(NAMES):
                raise BundleError(f"bundle holds unexpected parts: {names!r:.200}")
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise BundleError(f"part {info.filename} is compressed or encrypted")
                if info.file_size != info.compress_size or info.file_size > len(data):
                    raise BundleError(f"part {info.filename} declares {info.file_size} bytes")
            if sum(info.file_size for info in infos) > len(data):
                raise BundleError("parts overlap")
            parts = {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as exc:
        raise BundleError(
            f"not a model bundle: {exc}",
            hint="a bundle is what `shoal train start` makes; a bare ONNX file is none",
        ) from exc
    manifest = _manifest(parts.pop("manifest.json", b""))
    if not {manifest.model, "golden.npz", "profile.json"} <= set(parts):
        raise BundleError(f"bundle lacks a part; it holds {sorted(parts)}")
    return Bundle(manifest, parts, hashlib.sha256(data).hexdigest(), len(data))


def _manifest(data: bytes) -> Manifest:
    if not 2 <= len(data) <= MANIFEST_BYTES_MAX:
        raise BundleError(f"bundle has a manifest of {len(data)} bytes")
    try:
        raw: Any = json.loads(data)
        if raw.get("version") != VERSION:
            raise BundleError(
                f"bundle version {raw.get('version')!r:.20} is not {VERSION}",
                hint="update the agent before this model",
            )
        for name in ("channels", "classes"):
            items = raw[name]
            if not isinstance(items, list) or not 1 <= len(items) <= 1024:
                raise BundleError(f"manifest field {name} is not a list of 1 to 1024 names")
            if not all(isinstance(item, str) and len(item) <= 80 for item in items):
                raise BundleError(f"manifest field {name} holds something that is no short name")
            raw[name] = tuple(items)
        found = Manifest(**raw)
        check_name(found.name, what="model name")
    except BundleError:
        raise
    except (AttributeError, TypeError, KeyError, ValueError, RecursionError, ContractError) as exc:
        raise BundleError(f"the bundle's manifest is not acceptable: {exc!s:.200}") from exc
    texts = (found.model, found.input, found.output)
    if found.model not in MODELS or not all(isinstance(t, str) and t for t in texts):
        raise BundleError("the manifest's model, input or output is not acceptable")
    if type(found.samples) is not int or not 1 <= found.samples <= 1 << 24:
        raise BundleError("the manifest's samples are out of range")
    if type(found.golden_abs_max) not in (int, float) or not 0 < found.golden_abs_max <= 1:
        raise BundleError("the manifest's golden_abs_max is out of range")
    if not isinstance(found.facts, dict):
        raise BundleError("the manifest's facts are not a map")
    return found
