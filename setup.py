"""Build the kernels and the console's assets, name the packages; the rest is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

NAME = "shoal"
ROOT = Path(__file__).resolve().parent
PARTS = ("agent", "examples", "ext", "hw", "proto", "server")
WEB = ROOT / "server" / "web"
WORK = ROOT / "build" / "web"  # where npm works


def link_view() -> Path:
    """Link build/view/NAME to the tree and return that folder.

    Cython and the type checkers find code by path, as ``shoal/ext/_bins.pyx``; only the view
    has the tree under its import name.
    """
    home = ROOT / "build" / "view" / NAME
    home.mkdir(parents=True, exist_ok=True)
    for entry in ("__init__.py", "py.typed", *PARTS):
        link = home / entry
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(ROOT / entry, home))
    return home.relative_to(ROOT)


def kernels() -> list[Extension]:
    """Return one extension for each ext/*.pyx, read through the view so that cimports resolve."""
    home = link_view()
    return [
        Extension(
            f"{NAME}.ext.{kernel.stem}",
            [str(home / "ext" / kernel.name)],
            extra_compile_args=["-O3", "-fno-math-errno"],
            include_dirs=[numpy.get_include()],
            depends=[f"ext/{header.name}" for header in sorted((ROOT / "ext").glob("*.h"))],
        )
        for kernel in sorted((ROOT / "ext").glob("*.pyx"))
    ]


def packages() -> list[str]:
    """Return every package under its import name."""
    globs = [g for part in PARTS for g in (part, f"{part}.*")]
    return [NAME, *(f"{NAME}.{found}" for found in find_packages(include=globs))]


def vendor() -> ModuleType:
    """Return server/web/vendor.py, loaded by its path: nothing is installed yet."""
    spec = importlib.util.spec_from_file_location("vendor", WEB / "vendor.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VENDOR = vendor()


class BuildKernels(build_ext):
    """Compile as many kernels at a time as there are cores; each is a file of its own."""

    def finalize_options(self) -> None:
        """Choose the number, unless the caller did."""
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()


class BuildParts(build_py):
    """Bring the console's assets first; ship ``__init__.py`` alone from the root."""

    def run(self) -> None:
        """Build, with the assets in place before the files to ship are listed."""
        VENDOR.bring(WEB, WORK)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return the (package, module, file) rows that go into the wheel."""
        found = super().find_package_modules(package, package_dir)
        return [row for row in found if package != NAME or row[1] == "__init__"]


class EditableParts(editable_wheel):
    """Bring the console's assets: setuptools only warns when build_py fails in place."""

    def run(self) -> None:
        """Bring the assets, then link."""
        VENDOR.bring(WEB, WORK)
        super().run()


class SourceParts(sdist):
    """Put the console's assets into the source distribution: it then builds without Node."""

    def run(self) -> None:
        """Bring the assets, then pack."""
        VENDOR.bring(WEB, WORK)
        super().run()

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Add what the assets are made from, so that the copies are known to be current."""
        made_from = [f"server/web/{name}" for name in VENDOR.MADE_FROM]
        super().make_release_tree(base_dir, [*files, *made_from])


setup(
    packages=packages(),
    setup_requires=VENDOR.node_requirements(WEB),  # goes to get_requires_for_build_*, PEP 517
    cmdclass={
        "build_ext": BuildKernels,
        "build_py": BuildParts,
        "editable_wheel": EditableParts,
        "sdist": SourceParts,
    },
    ext_modules=cythonize(
        kernels(),
        build_dir="build/cython",
        compiler_directives={"language_level": 3, "embedsignature": True, "binding": True},
    ),
)
