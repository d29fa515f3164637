"""The agent's command: what is wrong is one clear line and exit status 1; nothing is started."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.agent.app import alone
from shoal.agent.errors import StateError
from shoal.agent.main import main
from shoal.agent.spool import Spool, SpoolConfig
from shoal.agent.updates.fs import Disk
from shoal.agent.updates.slots import Held, Slots
from shoal.proto.records import Kind


def config(tmp_path: Path, text: str = "") -> str:
    """Write a configuration and return its path."""
    path = tmp_path / "agent.toml"
    path.write_text(f'state_dir = "state"\n{text}')
    return str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate_hz = 1.0", "unknown key rate_hz"),
        ("[spool]\nbyte_max = 1", "did you mean spool.bytes_max"),
        ("[link]\nbatch_bytes_max = 9", "batch_bytes_max must be"),
        ("[trainer.child]\nmemory = 1", "unknown key trainer.child.memory"),
        ("report_s = 0.0", "above 0 s"),
    ],
)
def test_a_wrong_configuration_is_named(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key, the reason, and the nearest key that exists."""
    assert main(["run", "--config", config(tmp_path, text)]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_a_device_that_is_not_enrolled_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hint is a command."""
    assert main(["run", "--config", config(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "not enrolled" in said and "shoal-agent enroll --config" in said


def test_a_second_agent_on_one_folder_is_refused(tmp_path: Path) -> None:
    """Two agents would write one spool; when the first ends, the next may start."""
    with alone(tmp_path), pytest.raises(StateError, match="another agent"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_status_counts_what_is_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also while no agent runs, for people and for scripts."""
    spool = Spool(tmp_path / "state" / "spool", config=SpoolConfig(), clock=lambda: 1)
    spool.open()
    for _ in range(3):
        spool.append(Kind.EVENT, {"name": "n", "severity": "info", "text": "", "data": {}})
    spool.count("bytes_up", 2048)
    spool.count("windows_bins_alone", 5)
    spool.count("predictions_withheld", 7)
    spool.close()
    assert main(["status", "--config", config(tmp_path), "-o", "json"]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert (totals["produced"], totals["spooled"], totals["bytes_up"]) == (3, 3, 2048)
    assert main(["status", "--config", config(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "3 produced = 0 stored + 3 spooled + 0 lost" in shown
    assert "5 windows as bins alone, 7 predictions withheld" in shown
    assert "model     none yet: a rollout brings one" in shown and "update" not in shown


def test_status_names_the_model_and_what_became_of_its_update(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read from the slots, which are left as they are."""
    root = tmp_path / "state" / "updates"
    root.mkdir(parents=True)
    slots = Slots(root, Disk())
    slots.open()

    def held(number: int) -> Held:
        data = bytes(number)
        return Held(
            model="wear", sha256=hashlib.sha256(data).hexdigest(), length=number, counter=number,
            rollout="ro-1",
        )  # fmt: skip

    def status() -> list[str]:
        assert main(["status", "--config", config(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith(("model", "update"))]

    def install(number: int) -> None:
        slots.stage(held(number))
        slots.part.write_bytes(bytes(number))
        assert slots.store()
        slots.begin_trial(3)

    first, second = (f"wear {held(number).sha256[:12]}" for number in (1, 2))
    install(1)
    assert status() == [
        "model     none yet: a rollout brings one", f"update    {first} is on trial"
    ]  # fmt: skip
    slots.confirm()
    assert status() == [f"model     {first}"]
    install(2)
    slots.reject("too slow")
    assert status() == [f"model     {first}", f"update    {second} failed: too slow"]
    (root / "state").write_bytes(b"rotten")
    assert "does not match its checksum" in status()[1]
    assert (root / "state").read_bytes() == b"rotten", "status changes nothing"


def test_the_agent_holds_one_onnx_runtime() -> None:
    """It calls the library; the Python module is a second copy of 20 MB, for child processes."""
    program = (
        "import sys, shoal.agent.app\n"
        "print(*sorted({'onnxruntime', 'onnx', 'scipy', 'pyarrow', 'tuf'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
