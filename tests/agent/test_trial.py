"""Trials: whatever the model and the backend do, an end inside the limits and a verdict.

The children are real, with their real limits; the backends are those of ``trial_fakes.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.agent import confined
from shoal.agent import trial as trial_module
from shoal.agent.confined import Stop
from shoal.agent.engines import default_folder
from shoal.agent.sealed import FileError, sealed
from shoal.agent.trial import (
    NothingChosenError,
    Report,
    TrialConfig,
    TrialError,
    add_parser,
    trial,
)
from shoal.agent.trial_table import WIDTH, Progress, plain, to_json, to_text
from shoal.hw.cache import Cache
from shoal.hw.choice import Candidate, Outcome, OutputError, Policy, Result, choose

FAKES = Path(__file__).with_name("trial_fakes.py")
MEMORY = 768 << 20


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children have the fake backends."""
    monkeypatch.setattr(trial_module, "CHILD", (sys.executable, "-P", str(FAKES)))


def config(*names: str, wall_s: float = 25.0, **changes: Any) -> TrialConfig:
    """Return limits, and the fake backends in an order."""
    return TrialConfig(
        **{
            "wall_s": wall_s,
            "memory_bytes": MEMORY,
            "threads": (1,),
            "timed_s": 0.1,
            "env": {"FAKES": ",".join(("ort", *names))},
            **changes,
        }
    )


def model(
    nodes: Sequence[Any],
    weights: Sequence[Any] = (),
    *,
    inputs: Sequence[Any] = (("x", TensorProto.FLOAT, ["batch", 4]),),
    opset: int = 17,
) -> bytes:
    """Return a model with the output y."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("acme", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return data


def softmax() -> bytes:
    """Return a model that can be run."""
    return model([helper.make_node("Softmax", ["x"], ["y"])])


def number(name: str, *values: int) -> Any:
    """Return an int64 weight."""
    return numpy_helper.from_array(np.array(values, np.int64), name)


def loop(op: str) -> bytes:
    """Return a model that applies an operator to its state and itself 2**62 times."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["more_out"]),
            helper.make_node(op, ["s", "s"], ["s_out"], **({"axis": 0} if op == "Concat" else {})),
        ],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("more", TensorProto.BOOL, []),
            value("s", TensorProto.FLOAT, None),
        ],
        [value("more_out", TensorProto.BOOL, []), value("s_out", TensorProto.FLOAT, None)],
    )
    true = numpy_helper.from_array(np.array(True), "true")
    count = numpy_helper.from_array(np.array(2**62, np.int64), "count")
    return model(
        [helper.make_node("Loop", ["count", "true", "x"], ["y"], body=body)], [count, true]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file with a model that can be run."""
    found = tmp_path / "model.onnx"
    found.write_bytes(softmax())
    return found


def words(report: Report) -> dict[str, str]:
    """Return the verdict on each backend."""
    pairs = zip(report.rows, report.decision.verdicts, strict=True)
    return {row.candidate.backend: verdict.word for row, verdict in pairs}


# --- what backends do ------------------------------------------------------------------------


def test_the_right_one_is_chosen_and_the_others_say_why_not(path: Path) -> None:
    """Wrong numbers, fallback and simulation are no choice, however fast they are."""
    names = ("wrong", "nan", "fallback", "unplaced", "simulated", "absent", "refuse")
    report = trial(path, config=config(*names))
    assert words(report) == {
        **{"ort": "chosen", "wrong": "wrong", "nan": "wrong", "fallback": "fallback"},
        **{"unplaced": "unplaced", "simulated": "simulated", "absent": "absent"},
        "refuse": "refused",
    }
    choice = report.decision.choice
    assert choice is not None and choice.backend == "ort"
    assert 0 < choice.p50_us <= choice.p99_us
    row = report.rows[0]
    assert row.error_rel == 0.0 and row.top1 == 1.0 and row.compared == 16 and row.calls >= 3
    assert row.ram_bytes and row.ram_bytes < MEMORY
    assert report.rows[3].placement == {"npu": 1, "cpu": 1}


def test_fallback_can_be_allowed(path: Path) -> None:
    """Then it is as good as any."""
    policy = Policy(allow_cpu_fallback=True)
    report = trial(path, config=config("fallback", "unplaced", policy=policy))
    assert not {"fallback", "unplaced"} & set(words(report).values())


def test_a_backend_that_crashes_hangs_or_hogs_ends_alone(path: Path) -> None:
    """Each has its share of the time, and shared memory is seen by the parent."""
    start = time.monotonic()
    report = trial(path, config=config("crash", "hang", "hog", wall_s=16.0))
    assert time.monotonic() - start < 16.0
    found = words(report)
    assert found["crash"] == "died" and found["hang"] == "time" and found["hog"] == "memory"
    assert found["ort"] == "chosen"


def test_a_driver_that_hangs_when_probed_leaves_the_reference(path: Path) -> None:
    """A broken driver must not keep a device from its own CPU."""
    report = trial(path, config=config("sleepy", wall_s=12.0))
    assert words(report) == {"ort": "chosen", "others": "skipped"}
    assert report.took_s < 12.0


def test_without_the_reference_only_golden_vectors_can_judge(path: Path, tmp_path: Path) -> None:
    """A backend that is compared with itself proves nothing."""
    alone = config(env={"FAKES": "wrong,absent"})
    report = trial(path, config=alone)
    assert words(report) == {"wrong": "skipped", "absent": "absent"}
    assert "--golden" in report.rows[0].reason


# --- golden vectors --------------------------------------------------------------------------


def golden(folder: Path, **arrays: Any) -> Path:
    """Write golden vectors; a name's first underscore stands for the dot."""
    found = folder / "golden.npz"
    with found.open("wb") as file:
        np.savez(file, **{name.replace("_", ".", 1): each for name, each in arrays.items()})
    return found


def test_golden_vectors_judge_the_reference_too(path: Path, tmp_path: Path) -> None:
    """They say what is right; nobody's answer is right by itself."""
    x__vnd = np.random.default_rng(1).normal(size=(5, 2, 4)).astype(np.float32)
    y__vnd = np.exp(x__vnd) / np.exp(x__vnd).sum(axis=2, keepdims=True)
    report = trial(path, golden=golden(tmp_path, in_x=x__vnd, out_y=y__vnd), config=config())
    assert words(report) == {"ort": "chosen"}
    assert report.rows[0].compared == 5
    wrong = golden(tmp_path, in_x=x__vnd, out_y=y__vnd[:, :, ::-1])
    assert words(trial(path, golden=wrong, config=config())) == {"ort": "wrong"}


def test_golden_vectors_of_another_model_refuse_every_row(path: Path, tmp_path: Path) -> None:
    """And a file that is no vectors does so, too."""
    found = golden(tmp_path, in_z=np.zeros((1, 1, 4), np.float32), out_y=np.zeros((1, 4)))
    assert words(trial(path, golden=found, config=config())) == {"ort": "refused"}
    found.write_bytes(b"garbage")
    report = trial(path, golden=found, config=config())
    assert "golden" in report.rows[0].reason
    with pytest.raises(FileError):
        trial(path, golden=tmp_path / "none.npz", config=config())


# --- hostile models --------------------------------------------------------------------------


def test_a_model_that_never_ends_is_stopped_in_time(tmp_path: Path) -> None:
    """Fault 21. The time is for everything; without reference answers nothing else is tried."""
    path = tmp_path / "loop.onnx"
    path.write_bytes(loop("Add"))
    start = time.monotonic()
    report = trial(path, config=config("wrong", wall_s=4.0))
    assert time.monotonic() - start < 4.0
    assert words(report) == {"ort": "time", "wrong": "skipped"}
    assert report.decision.choice is None


@pytest.mark.parametrize("kind", ["expand", "shape", "tile", "grow"])
def test_a_model_that_wants_all_the_memory_is_stopped(tmp_path: Path, kind: str) -> None:
    """Fault 20: a file of some 70 bytes asks for GiB by the hundred, at once or bit by bit."""
    path = tmp_path / "bomb.onnx"
    bombs = {
        "expand": model([helper.make_node("Expand", ["x", "n"], ["y"])], [number("n", 1 << 36, 4)]),
        "shape": model(
            [helper.make_node("ConstantOfShape", ["n"], ["y"])], [number("n", 1 << 37)], inputs=()
        ),
        "tile": model([helper.make_node("Tile", ["x", "n"], ["y"])], [number("n", 1 << 27, 1)]),
        "grow": loop("Concat"),
    }
    path.write_bytes(bombs[kind])
    report = trial(path, config=config())
    assert words(report) == {"ort": "memory"}
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10 < 2 << 30


BROKEN = {
    "garbage": (os.urandom(5000), "neither"),
    "text": (b"<html>404</html>", "neither"),
    "truncated": (softmax()[:-7], "neither"),
    "tflite": (b"\x20\x00\x00\x00TFL3" + bytes(60), "kind"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bytes_that_are_no_model_are_refused(tmp_path: Path, kind: str) -> None:
    """With a typed error or with a row that says so."""
    data, reason = BROKEN[kind]
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    try:
        report = trial(path, config=config())
    except TrialError as exc:
        assert reason in str(exc)
    else:
        assert report.decision.choice is None and kind == "tflite"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (model([helper.make_node("Softmax", ["x"], ["y"])], opset=999), "opset"),
        (model([helper.make_node("Foo", ["x"], ["y"], domain="acme")]), "Foo"),
    ],
    ids=["opset", "operator"],
)
def test_what_the_engine_lacks_is_in_the_row(tmp_path: Path, data: bytes, reason: str) -> None:
    """The engine's own words: nobody knows better what it lacks."""
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    report = trial(path, config=config())
    assert words(report) == {"ort": "refused"}
    assert reason in report.decision.verdicts[0].why


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    """Fault 17: what was not verified is not read, wherever it is."""
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../secret")
    path = tmp_path / "model.onnx"
    path.write_bytes(model([helper.make_node("Add", ["x", "w"], ["y"])], [weight]))
    with pytest.raises(TrialError, match=r"other files: \.\./\.\./secret"):
        trial(path, config=config())


def test_a_model_that_takes_indices_is_tried_with_small_integers(tmp_path: Path) -> None:
    """Integers of the full range are no indices."""
    table = numpy_helper.from_array(np.eye(4, dtype=np.float32), "table")
    path = tmp_path / "model.onnx"
    path.write_bytes(
        model(
            [helper.make_node("Gather", ["table", "x"], ["y"])],
            [table],
            inputs=(("x", TensorProto.INT64, [3]),),
        )
    )
    report = trial(path, config=config())
    assert words(report) == {"ort": "chosen"}
    assert "integers 0 and 1" in report.compared_with


# --- files -----------------------------------------------------------------------------------


def test_only_a_plain_file_is_read(path: Path, tmp_path: Path) -> None:
    """Each of these would hang, lead elsewhere, or could change while it is read."""
    link, hard, fifo = tmp_path / "link", tmp_path / "hard", tmp_path / "fifo"
    link.symlink_to(path)
    os.mkfifo(fifo)
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    cases = [(link, "symbolic"), (fifo, "regular"), (tmp_path, "regular"), (empty, "empty")]
    cases += [(Path("/dev/zero"), "regular"), (tmp_path / "none", "No such file")]
    for each, reason in cases:
        with pytest.raises(FileError, match=reason):
            trial(each, config=config())
    os.link(path, hard)
    with pytest.raises(FileError, match="2 links"):
        trial(path, config=config())


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    """Half of the memory is for the model at most; a sparse file costs nothing to make."""
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(FileError, match="at most 402653184"):
        trial(path, config=config())


def test_what_was_read_cannot_be_changed(path: Path) -> None:
    """Children are given these bytes, and the digest is of these bytes."""
    with sealed(path, 1000, deadline=time.monotonic() + 10) as found:
        path.write_bytes(b"swapped")
        assert os.pread(found.fd, 1000, 0) == softmax()
        assert found.size == len(softmax())
        for deed in (
            lambda: os.pwrite(found.fd, b"x", 0),
            lambda: os.ftruncate(found.fd, 1),
            lambda: os.ftruncate(found.fd, 2000),
        ):
            with pytest.raises(PermissionError):
                deed()
    with pytest.raises(OSError):
        os.fstat(found.fd)


def test_a_file_that_is_slow_to_read_is_given_up(path: Path) -> None:
    """A disk that sleeps is no reason to break the limit."""
    with (
        pytest.raises(FileError, match="in time"),
        sealed(path, 1000, deadline=time.monotonic() - 1),
    ):
        pass


# --- children --------------------------------------------------------------------------------

LONG = f"600.{os.getpid()}"  # seconds that nobody else sleeps
ANSWER = "import os,sys; fd=int(sys.argv[-1]); "
DEATHS = {
    "nothing": ("pass", Outcome.DIED),
    "status": ("sys.exit('last words')", Outcome.DIED),
    "garbage": ("os.write(fd, b'\\x04\\0\\0\\0{{{{')", Outcome.DIED),
    "list": ("os.write(fd, b'\\x02\\0\\0\\0[]')", Outcome.DIED),
    "short": ("os.write(fd, b'\\x09\\0\\0\\0{}')", Outcome.DIED),
    "long": ("[os.write(fd, bytes(65536)) for _ in range(99)]", Outcome.DIED),
    "killed": ("os.kill(os.getpid(), 9)", Outcome.MEMORY),
    "signal": ("os.kill(os.getpid(), 11)", Outcome.DIED),
    "cpu": ("os.kill(os.getpid(), 24)", Outcome.TIME),
    "bad_alloc": ("sys.stderr.write('std::bad_alloc'); sys.stderr.flush(); os.abort()", "memory"),
    "sleeps": ("import time; time.sleep(600)", Outcome.TIME),
    "chatters": ("[sys.stderr.write('x' * 9999) for _ in iter(int, 1)]", Outcome.TIME),
    "leaves a child": (f"os.fork() or os.execvp('sleep', ['sleep', '{LONG}'])", Outcome.DIED),
}


def alive(process: Path) -> bool:
    """Whether a process runs; one that nobody has reaped does not."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def slept(process: Path) -> bool:
    """Whether it is what a child of ours has left behind."""
    try:
        return LONG in (process / "cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError, UnicodeDecodeError):
        return False


@pytest.mark.parametrize("kind", DEATHS)
def test_a_child_may_end_in_any_way(kind: str) -> None:
    """The parent has an answer or a reason, and no process is left behind."""
    code, expected = DEATHS[kind]
    command = [sys.executable, "-c", ANSWER + code]
    found = confined.run(command, {}, wall_s=1.5, memory_bytes=1 << 30)
    assert isinstance(found, Stop)
    assert found.outcome == expected, found.reason
    assert found.reason
    for _ in range(100):  # what is killed takes a moment to be gone
        left = [each for each in Path("/proc").glob("[0-9]*") if alive(each) and slept(each)]
        if not left:
            break
        time.sleep(0.05)
    assert not left


def test_a_child_that_answers_is_heard_and_ended() -> None:
    """Even if it would rather stay, and has children of its own."""
    code = (
        'answer = b\'{"ok": {"n": 1}}\'; '
        "os.write(fd, bytes([len(answer), 0, 0, 0]) + answer); os.close(fd); "
        "import time; time.sleep(600)"
    )
    start = time.monotonic()
    found = confined.run([sys.executable, "-c", ANSWER + code], {}, wall_s=60, memory_bytes=1 << 30)
    assert found == {"n": 1}
    assert time.monotonic() - start < 30


def test_a_child_has_no_secret_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model must not read what the environment holds, nor files that happen to be open."""
    monkeypatch.setenv("SECRET", "s3cret")
    code = (
        "import json; a = json.dumps({'ok': {'env': dict(os.environ), "
        "'fds': sorted(map(int, os.listdir('/proc/self/fd')))}}).encode(); "
        "os.write(fd, len(a).to_bytes(4, 'little') + a)"
    )
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        found = confined.run(
            [sys.executable, "-c", ANSWER + code], {}, wall_s=30, memory_bytes=1 << 30
        )
    assert isinstance(found, dict)
    assert "SECRET" not in found["env"]
    assert len(found["fds"]) == 5  # 0, 1, 2, the pipe, and the listing itself


def test_a_child_is_confined_before_it_sees_the_model(path: Path) -> None:
    """As the kernel has it, not as we wrote it."""
    report = trial(path, config=config("tell"))
    limits, privileges, oom_score, gone, leads = json.loads(report.rows[1].reason)
    assert 500 << 20 < limits["DATA"] < MEMORY - (64 << 20)
    assert limits["CORE"] == 0 and limits["NOFILE"] == 256 and limits["FSIZE"] == 256 << 20
    assert (privileges, oom_score, gone, leads) == ("1", 800, True, True)


def test_children_end_with_a_parent_that_is_killed(path: Path) -> None:
    """Else a model that never ends would outlive the command, for ever."""
    code = (
        "import sys; from pathlib import Path; from shoal.agent import trial as t; "
        f"t.CHILD = (sys.executable, '-P', {str(FAKES)!r}); "
        "t.trial(Path(sys.argv[1]), config=t.TrialConfig(env={'FAKES': 'ort,hang'}, "
        "threads=(1,), timed_s=0.1), progress=lambda text: print(text, flush=True))"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        while "trying hang" not in parent.stdout.readline():
            assert parent.poll() is None
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not (pids := children.read_text().split()):
            time.sleep(0.01)
        while "trial_fakes" not in Path(f"/proc/{pids[0]}/cmdline").read_text():
            time.sleep(0.01)
        # PR_SET_PDEATHSIG stands once the working directory is gone: the last thing it does.
        while not os.readlink(f"/proc/{pids[0]}/cwd").endswith("(deleted)"):
            time.sleep(0.01)
        parent.kill()
    deadline = time.monotonic() + 30
    while alive(Path(f"/proc/{pids[0]}")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(Path(f"/proc/{pids[0]}"))


def test_a_program_that_is_not_there_is_a_stop() -> None:
    """An installation may be broken; the descriptors are closed all the same."""
    before = len(os.listdir("/proc/self/fd"))
    found = confined.run(["/nowhere/python"], {}, wall_s=1, memory_bytes=1 << 30)
    assert isinstance(found, Stop) and found.outcome is Outcome.DIED
    assert len(os.listdir("/proc/self/fd")) == before


# --- what is printed and kept ----------------------------------------------------------------


def run_command(*arguments: str) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    found = parser.parse_args(["trial", "--threads", "1", *arguments])
    status: int = found.call(found)
    return status


def test_the_command_prints_a_table_and_keeps_the_choice(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was chosen is found again by the model, the board and the versions."""
    monkeypatch.setattr(trial_module, "PASSED", ("FAKES",))
    monkeypatch.setenv("FAKES", "ort,wrong,absent")
    folder = tmp_path / "cache"
    assert run_command(str(path), "--cache", str(folder)) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= WIDTH for line in text.splitlines())
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("backend"))
    assert head.split() == [
        *("backend", "variant", "thr", "p50", "µs", "p99", "µs", "RAM", "MiB", "µJ", "error"),
        *("top-1", "fallback", "verdict"),
    ]
    assert any(line.startswith("chosen    ort on 1 thread: the only one") for line in lines)
    assert run_command(str(path), "--cache", str(folder), "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] and found["choice"]["backend"] == "ort"
    kept = Cache(folder).lookup(found["sha256"], found["board"], found["versions"])
    assert kept is not None and kept.to_json() == found["choice"]
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setenv("FAKES", "wrong")  # the reference has gone: nothing can be right
    with pytest.raises(NothingChosenError):
        run_command(str(path), "--cache", str(folder))
    assert "was removed" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_the_command_fails_when_nothing_can_be_chosen(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is printed all the same: it says why."""
    monkeypatch.setattr(trial_module, "PASSED", ("FAKES",))
    monkeypatch.setenv("FAKES", "absent,refuse")
    folder = tmp_path / "cache"
    with pytest.raises(NothingChosenError):
        run_command(str(path), "--cache", str(folder), "-o", "json")
    found = json.loads(capsys.readouterr().out)
    assert found["choice"] is None and found["kept"] == ""
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--wall-s", "0"], ["--memory-bytes", "1MiB"], ["--threads", "0"], ["--error-rel", "2"]],
)
def test_limits_out_of_range_are_a_typed_error(path: Path, arguments: list[str]) -> None:
    """Before anything is started."""
    with pytest.raises(TrialError, match="limits"):
        run_command(str(path), *arguments)


def test_a_folder_that_cannot_be_written_is_a_warning(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial was made; what it found is printed."""
    monkeypatch.setattr(trial_module, "PASSED", ("FAKES",))
    monkeypatch.setenv("FAKES", "ort")
    (tmp_path / "file").write_text("")
    assert run_command(str(path), "--cache", str(tmp_path / "file" / "below")) == 0
    out, err = capsys.readouterr()
    assert "not kept" in out and "warning" in err


def test_names_out_of_a_model_do_not_steer_the_terminal(path: Path) -> None:
    """A model's name for an output, or a driver's message, may hold escape sequences."""
    assert plain("a\x1b[31m\r\nb") == "a?[31m??b"
    report = trial(path, config=config("refuse"))
    text = to_text(report)
    assert "no such operator" in text and "\x1b" not in text
    assert json.loads(json.dumps(to_json(report), allow_nan=False))["rows"][1]["verdict"]


def test_the_table_fits_whatever_the_figures_are() -> None:
    """The widest of everything at once."""
    error = OutputError(name="y" * 300, abs_max=1e9, rel_max=0.9999)
    row = Result(
        candidate=Candidate(backend="b" * 40, variant="v" * 40, threads=128),
        outcome=Outcome.MEASURED,
        p50_us=3e7,
        p99_us=3.1e7,
        ram_bytes=(16 << 30) - 1,
        energy_uj=9e9,
        errors=(error,),
        top1=1.0,
        fallback=1.0,
        simulated=True,
    )
    rows = (row, replace(row, errors=(replace(error, rel_max=None),)), replace(row, errors=()))
    report = Report(
        model="/long/" * 40, sha256="0" * 64, size=1 << 40, board="b", versions={},
        compared_with="words " * 40, rows=rows, took_s=30.0,
        decision=choose(rows, Policy(error_rel_max=0.5)),
    )  # fmt: skip
    assert max(map(len, to_text(report, kept="/kept/" * 40).splitlines())) <= WIDTH


def test_progress_is_for_terminals_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """A log file gets no carriage returns."""
    with Progress(sys.stderr) as progress:
        progress.say("trying")
    assert capsys.readouterr().err == ""


def test_the_folder_of_choices_follows_the_base_directories(tmp_path: Path) -> None:
    """A relative XDG_CACHE_HOME is to be ignored, says the specification."""
    assert default_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "shoal" / "trials"
    expected = Path.home() / ".cache" / "shoal" / "trials"
    assert default_folder({}) == default_folder({"XDG_CACHE_HOME": "x"}) == expected
