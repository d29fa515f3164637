"""Build the sketch kernels with the address and undefined-behaviour sanitizers, and run them.

    python tests/fuzz/sanitize.py [--mutations 100000]

The kernels are built into a copy of the package under build/sanitized, whose other files are links
to the tree. There run the tests of the kernels and a short fuzzing of every parser; the first
finding of a sanitizer ends the run with its report. Needs gcc and its libasan.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "build" / "sanitized"
KERNELS = ("_frequent", "_hll", "_kll", "_projection", "_sketch")
TESTS = (
    "frequent",
    "hll",
    "kll",
    "kll_runs",
    "bulk_merger",
    "projection",
    "sketch",
    "sketch_kll",
    "sketch_record",
)
PARSERS = ("kll", "distinct", "frequent", "record")
FLAGS = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-ffp-contract=off",
]


def link_package() -> None:
    """Make the copy: links to the tree, but for ext/, a folder of links to its sources."""
    package = HOME / "shoal"
    ext = package / "ext"
    ext.mkdir(parents=True, exist_ok=True)
    for entry in ("__init__.py", "py.typed", "agent", "examples", "hw", "proto", "server"):
        link(package / entry, ROOT / entry)
    for source in (ROOT / "ext").iterdir():
        if source.suffix in (".py", ".pyx", ".pxd", ".h"):
            link(ext / source.name, source)


def link(place: Path, target: Path) -> None:
    """Make or renew a link."""
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(target, place.parent))


def build() -> None:
    """Build the kernels beside the links."""
    extensions = [
        Extension(
            f"shoal.ext.{name}",
            [f"shoal/ext/{name}.pyx"],
            extra_compile_args=FLAGS,
            extra_link_args=["-fsanitize=address,undefined"],
            include_dirs=[numpy.get_include()],
            depends=[str(header) for header in (ROOT / "ext").glob("*.h")],
        )
        for name in KERNELS
    ]
    os.chdir(HOME)
    modules = cythonize(
        extensions,
        build_dir="c",
        compiler_directives={"language_level": 3, "embedsignature": True, "binding": True},
        quiet=True,
    )
    command = build_ext(Distribution({"ext_modules": modules, "name": "sanitized"}))
    command.build_temp, command.build_lib, command.parallel = "temp", ".", os.cpu_count()
    command.ensure_finalized()
    command.run()
    os.chdir(ROOT)


def library(name: str) -> str:
    """Return the path of a sanitizer's library."""
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitized package before the installed one."""
    libraries = " ".join(library(name) for name in ("libasan.so", "libubsan.so"))
    environment = os.environ | {
        "PYTHONPATH": str(HOME),
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_all(jobs: Sequence[Sequence[str]]) -> None:
    """Run as many at a time as there are cores, tell what each said; end with one that fails."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(run, *job): " ".join(job) for job in jobs}
        for done in as_completed(running):
            found = done.result()
            print(f"== {running[done]}\n{found.stdout}", end="", flush=True)
            if found.returncode:
                pool.shutdown(wait=False, cancel_futures=True)
                sys.exit(f"{running[done]} ended with {found.returncode} under the sanitizers")


def main() -> None:
    """Build, test, fuzz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=30_000, help="of each parser")
    options = parser.parse_args()
    link_package()
    build()
    run_all([("-c", "from shoal.ext import _sketch; assert 'sanitized' in _sketch.__file__")])
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    tests = [(*pytest, f"tests/ext/test_{name}.py") for name in TESTS]
    fuzzers = [(f"tests/fuzz/{name}.py", "--mutations", str(options.mutations)) for name in PARSERS]
    run_all([*tests, *fuzzers])


if __name__ == "__main__":
    main()
