"""Make the protobuf and gRPC stubs from the .proto files; a test makes them again and compares.

The stubs are committed, because a device that installs the sdist has no compiler. The virtual
path ``-Ishoal/proto=proto`` makes descriptors register as ``shoal/proto/x.proto``.

    python proto/generate.py [folder]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def generate(target: Path) -> None:
    """Write the stubs of every .proto file below ``target``, as ``shoal/proto/*_pb2*``.

    Args:
        target: An existing folder.

    Raises:
        subprocess.CalledProcessError: The compiler refused a file; its message is on stderr.
    """
    sources = sorted(f"shoal/proto/{path.name}" for path in HERE.glob("*.proto"))
    out = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    run = [sys.executable, "-m", "grpc_tools.protoc", f"-Ishoal/proto={HERE}", *out, *sources]
    subprocess.run(run, check=True)


def stubs(target: Path) -> dict[str, str]:
    """Return the generated files below ``target`` by name, as they belong into ``proto/``."""
    found = {path.name: path.read_text() for path in (target / "shoal" / "proto").iterdir()}
    # The compiler writes absolute imports of its own output; parts import each other relatively.
    return {
        name: text.replace("from shoal.proto import ", "from . import ")
        for name, text in found.items()
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        for name, text in stubs(Path(scratch)).items():
            (HERE / name).write_text(text)
