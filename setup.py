"""Build the Cython kernels and name the packages; all other facts are in pyproject.toml."""

from __future__ import annotations

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

NAME = "shoal"
ROOT = Path(__file__).resolve().parent
PARTS = ("agent", "examples", "ext", "hw", "proto", "server")


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
        )
        for kernel in sorted((ROOT / "ext").glob("*.pyx"))
    ]


def packages() -> list[str]:
    """Return every package under its import name."""
    globs = [g for part in PARTS for g in (part, f"{part}.*")]
    return [NAME, *(f"{NAME}.{found}" for found in find_packages(include=globs))]


class BuildParts(build_py):
    """Ship ``__init__.py`` alone from the root: setup.py is no part of the product."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return the (package, module, file) rows that go into the wheel."""
        found = super().find_package_modules(package, package_dir)
        return [row for row in found if package != NAME or row[1] == "__init__"]


setup(
    packages=packages(),
    cmdclass={"build_py": BuildParts},
    ext_modules=cythonize(
        kernels(),
        build_dir="build/cython",
        compiler_directives={"language_level": 3, "embedsignature": True, "binding": True},
    ),
)
