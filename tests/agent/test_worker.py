"""Faults: whatever a bundle does in the child, the parent gets a typed error and lives on."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.agent.children import (
    Child,
    ChildConfig,
    ChildDiedError,
    ChildTimeoutError,
    JobRefusedError,
    ResourceLimitError,
    self_test,
    self_test_blocking,
)
from shoal.proto.bundle import Manifest, pack

SHAPE = (2, 4)
X__nct = np.random.default_rng(1).normal(size=(5, *SHAPE)).astype(np.float32)
SMALL = ChildConfig(memory_bytes_max=1 << 30, wall_s_max=60, cpu_s_max=30)


def graph(nodes: Sequence[Any], weights: Sequence[Any] = (), *, output: str = "p") -> bytes:
    """Return a model with the face of the manifest below."""
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("evil", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def classifier() -> list[Any]:
    """Return the nodes of softmax(mean over the samples)."""
    return [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2], keepdims=0),
        helper.make_node("Softmax", ["m"], ["p"], axis=1),
    ]


def right(x__nct: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what the classifier answers, by numpy."""
    power = np.exp(x__nct.mean(2))
    found: NDArray[np.float32] = (power / power.sum(1, keepdims=True)).astype(np.float32)
    return found


def npz(**arrays: Any) -> bytes:
    """Return the bytes of an uncompressed .npz."""
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def write(
    folder: Path, model: bytes, *, golden: bytes | None = None, output: str = "p"
) -> tuple[Path, str]:
    """Write a bundle and return its path and digest."""
    manifest = Manifest(
        name="tiny", model="model.onnx", input="x", output=output, channels=("a", "b"),
        classes=("k", "l"), samples=SHAPE[1], golden_abs_max=1e-4,
    )  # fmt: skip
    golden = golden or npz(**{"x": X__nct, output: right(X__nct)})
    data = pack(manifest, {"model.onnx": model, "golden.npz": golden, "profile.json": b"{}"})
    path = folder / "tiny.shoal"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def test_a_right_bundle_passes(tmp_path: Path) -> None:
    """The facts are those of the bundle, and the golden vectors were really compared."""
    path, sha256 = write(tmp_path, graph(classifier()))
    facts = asyncio.run(self_test(path, sha256, config=SMALL))
    assert facts["name"] == "tiny" and facts["length"] == path.stat().st_size
    assert facts["golden"] == len(X__nct) and facts["golden_abs"] < 1e-6
    assert facts["latency_p50_us"] > 0 and facts["load_ms"] > 0


def test_the_updater_may_test_from_a_thread(tmp_path: Path) -> None:
    """A thread without an event loop gets the same verdicts."""
    wrong = write(tmp_path, graph(classifier()), golden=npz(x=X__nct, p=right(X__nct) / 2))[0]
    wrong = wrong.rename(tmp_path / "wrong.shoal")
    path, _ = write(tmp_path, graph(classifier()))

    async def story() -> None:
        await asyncio.to_thread(self_test_blocking, path, config=SMALL)
        with pytest.raises(JobRefusedError, match="golden vector"):
            await asyncio.to_thread(self_test_blocking, wrong, config=SMALL)

    asyncio.run(story())


BOMB = [
    helper.make_node(
        "ConstantOfShape",
        ["s"],
        ["big"],
        value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0]),
    ),
    helper.make_node("ReduceMax", ["big"], ["top"], keepdims=0),
    *classifier()[:1],
    helper.make_node("Add", ["m", "top"], ["p"]),
]


def test_an_activation_bomb_hits_the_memory_limit(tmp_path: Path) -> None:
    """A few bytes that ask for 4 GiB get a typed refusal (fault 20)."""
    shape = numpy_helper.from_array(np.array([1 << 30], np.int64), "s")
    path, sha256 = write(tmp_path, graph(BOMB, [shape]))
    with pytest.raises(ResourceLimitError):
        asyncio.run(self_test(path, sha256, config=SMALL))


def endless() -> bytes:
    """Return a model whose loop has 2**62 turns."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["v", "v"], ["w"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, None),
        ],
    )
    first, second = classifier()
    loop = helper.make_node("Loop", ["turns", "yes", "p0"], ["p"], body=body)
    second.output[0] = "p0"
    weights = [
        numpy_helper.from_array(np.array(1 << 62), "turns"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    return graph([first, second, loop], weights)


def test_an_endless_model_is_killed_by_the_clock(tmp_path: Path) -> None:
    """The child is killed, and the same Child serves the next job with a new process (fault 21)."""
    path, sha256 = write(tmp_path, endless())
    good = tmp_path / "good"
    good.mkdir()
    right_path, right_sha256 = write(good, graph(classifier()))

    async def story() -> dict[str, Any]:
        config = ChildConfig(memory_bytes_max=1 << 30, wall_s_max=6, cpu_s_max=600)
        async with Child(config=config) as child:
            with pytest.raises(ChildTimeoutError, match="longer than 6 s"):
                await child.call("self_test", bundle=str(path), sha256=sha256)
            return await child.call("self_test", bundle=str(right_path), sha256=right_sha256)

    assert asyncio.run(story())["name"] == "tiny"


def test_an_endless_model_is_killed_by_its_cpu_limit(tmp_path: Path) -> None:
    """Where the clock may run long, CPU time is bounded all the same."""
    path, sha256 = write(tmp_path, endless())
    config = ChildConfig(memory_bytes_max=1 << 30, wall_s_max=120, cpu_s_max=1)
    with pytest.raises(ChildTimeoutError, match="CPU time"):
        asyncio.run(self_test(path, sha256, config=config))


def external() -> bytes:
    """Return a model with a weight in another file."""
    weight = numpy_helper.from_array(np.zeros(2, np.float32), "b")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    first, second = classifier()
    add = helper.make_node("Add", ["m", "b"], ["n"])
    second.input[0] = "n"
    return graph([first, add, second], [weight])


def nan() -> bytes:
    """Return a model that answers NaN: the logarithm of a negative number."""
    first, second = classifier()
    second.output[0] = "q"
    minus = helper.make_node("Neg", ["q"], ["r"])
    return graph([first, second, minus, helper.make_node("Log", ["r"], ["p"])])


CASES = {
    "garbage": (b"not a model", {}, "agent.model.format", "cannot be loaded"),
    "pickle": (b"\x80\x04\x95pickle", {}, "agent.model.format", "cannot be loaded"),
    "cut": (graph(classifier())[:-30], {}, "agent.model.format", "cannot be loaded"),
    "custom operator": (
        graph([helper.make_node("Run", ["x"], ["p"], domain="evil")]),
        {}, "agent.model.format", "evil",
    ),
    "external data": (external(), {}, "agent.model.format", "External data"),
    "nan": (nan(), {}, "agent.self_test", "NaN or infinity"),
    "not probabilities": (
        graph([*classifier()[:1], helper.make_node("Identity", ["m"], ["p"])]),
        {}, "agent.self_test", "not probabilities",
    ),
    "other output": (
        graph(classifier()), {"output": "logits"}, "agent.self_test", "not logits",
    ),
    "wrong shape": (
        graph([helper.make_node("Softmax", ["x"], ["p"], axis=1)]),
        {}, "agent.self_test", r"answered with float32 \(1, 2, 4\)",
    ),
    "wrong golden": (
        graph(classifier()),
        {"golden": npz(x=X__nct, p=right(X__nct) + np.float32(0.01))},
        "agent.self_test", "0.01 away from its golden vector",
    ),
    "golden nan": (
        graph(classifier()),
        {"golden": npz(x=X__nct, p=np.full((5, 2), np.nan, np.float32))},
        "agent.self_test", "nan away",
    ),
    "golden of another width": (
        graph(classifier()),
        {"golden": npz(x=X__nct[:, :1], p=right(X__nct))}, "agent.self_test", "golden inputs",
    ),
    "golden pickled": (
        graph(classifier()),
        {"golden": npz(x=np.array([{}]), p=right(X__nct))}, "agent.self_test", "cannot be read",
    ),
    "golden garbage": (graph(classifier()), {"golden": b"PK"}, "agent.self_test", "cannot be read"),
}  # fmt: skip


def test_a_wrong_bundle_is_refused_with_its_reason(tmp_path: Path) -> None:
    """Every kind of wrong model is a typed error; one child survives all of them."""

    async def story() -> None:
        async with Child(config=SMALL) as child:
            pids = set()
            for model, how, code, said in CASES.values():
                path, sha256 = write(tmp_path, model, **how)  # type: ignore[arg-type]
                with pytest.raises(JobRefusedError, match=said) as caught:
                    await child.call("self_test", bundle=str(path), sha256=sha256)
                assert caught.value.reason == code
                pids.add(child.pid)
            assert len(pids) == 1

    asyncio.run(story())


def test_only_a_plain_file_with_the_right_bytes_is_opened(tmp_path: Path) -> None:
    """A second link, a symbolic link, a pipe, a folder, other bytes: nothing is read (fault 18)."""
    path, sha256 = write(tmp_path, graph(classifier()))
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")

    async def story() -> None:
        async with Child(config=SMALL) as child:
            for name in ("link", "pipe", ".", "missing"):
                with pytest.raises(JobRefusedError) as caught:
                    await child.call("self_test", bundle=str(tmp_path / name), sha256=sha256)
                assert caught.value.reason == "agent.file"
            with pytest.raises(JobRefusedError, match="does not hash"):
                await child.call("self_test", bundle=str(path), sha256="0" * 64)
            os.link(path, tmp_path / "hard")
            with pytest.raises(JobRefusedError, match="exactly one link"):
                await child.call("self_test", bundle=str(path), sha256=sha256)

    asyncio.run(story())


def test_a_native_crash_is_an_error_and_the_next_job_works(tmp_path: Path) -> None:
    """SIGSEGV, SIGILL and SIGKILL in the child are ChildDiedError here (faults 27, 62, 63)."""
    path, sha256 = write(tmp_path, graph(classifier()))
    slow, slow_sha256 = write(tmp_path, endless())
    slow = slow.rename(tmp_path / "slow.shoal")
    path, sha256 = write(tmp_path, graph(classifier()))

    async def story() -> None:
        async with Child(config=SMALL) as child:
            for number in (signal.SIGSEGV, signal.SIGILL, signal.SIGKILL):
                await child.call("self_test", bundle=str(path), sha256=sha256)
                assert child.pid is not None
                job = asyncio.ensure_future(
                    child.call("self_test", bundle=str(slow), sha256=slow_sha256)
                )
                await asyncio.sleep(0)  # the job is sent
                os.kill(child.pid, number)
                with pytest.raises(ChildDiedError, match=number.name):
                    await job
            facts = await child.call("self_test", bundle=str(path), sha256=sha256)
            assert facts["golden"] == len(X__nct)

    asyncio.run(story())


def test_a_cancelled_job_leaves_no_process(tmp_path: Path) -> None:
    """Cancelling the caller kills the child; an idle child ends by itself."""
    path, sha256 = write(tmp_path, endless())
    (tmp_path / "good").mkdir()
    good, good_sha256 = write(tmp_path / "good", graph(classifier()))

    async def story() -> None:
        config = ChildConfig(memory_bytes_max=1 << 30, idle_s=0.05)
        async with Child(config=config) as child:
            job = asyncio.ensure_future(child.call("self_test", bundle=str(path), sha256=sha256))
            while child.pid is None:
                await asyncio.sleep(0.01)
            pid = child.pid
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
            assert not Path(f"/proc/{pid}").exists()
            await child.call("self_test", bundle=str(good), sha256=good_sha256)
            while child.pid is not None:
                await asyncio.sleep(0.01)

    asyncio.run(story())


def test_the_child_confines_itself(tmp_path: Path) -> None:
    """Limits, niceness, no leaked environment, a working directory that is gone."""
    path, sha256 = write(tmp_path, graph(classifier()))

    async def story() -> None:
        async with Child(config=SMALL) as child:
            await child.call("self_test", bundle=str(path), sha256=sha256)
            proc = Path(f"/proc/{child.pid}")
            limits = (proc / "limits").read_text()
            assert str(SMALL.memory_bytes_max) in limits
            assert (proc / "oom_score_adj").read_text().strip() == "800"
            assert os.readlink(proc / "cwd").endswith("(deleted)")
            assert b"HOME=" not in (proc / "environ").read_bytes()
            assert os.getpriority(os.PRIO_PROCESS, child.pid or 0) >= 10

    asyncio.run(story())


def test_the_parents_death_ends_the_child(tmp_path: Path) -> None:
    """A killed agent leaves no child behind that burns the device's CPU."""
    path, sha256 = write(tmp_path, endless())
    code = (
        "import asyncio, sys\n"
        "from shoal.agent.children import Child\n"
        "async def main():\n"
        "    child = Child()\n"
        "    job = asyncio.ensure_future(\n"
        f"        child.call('self_test', bundle={str(path)!r}, sha256={sha256!r}))\n"
        "    while child.pid is None: await asyncio.sleep(.01)\n"
        "    print(child.pid, flush=True)\n"
        "    await job\n"
        "asyncio.run(main())\n"
    )

    async def story() -> None:
        parent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code,
            stdout=asyncio.subprocess.PIPE,
        )
        assert parent.stdout is not None
        pid = int(await parent.stdout.readline())
        parent.kill()
        await parent.wait()
        for _ in range(500):
            status = Path(f"/proc/{pid}/stat")
            if not status.exists() or ") Z" in status.read_text():
                return
            await asyncio.sleep(0.02)
        pytest.fail("the child outlived its parent")

    asyncio.run(story())


def test_onnx_agrees_that_the_bomb_is_small() -> None:
    """The bomb is tiny on disk: the bound of the file's size would not have caught it."""
    bomb = graph(BOMB, [numpy_helper.from_array(np.array([1 << 30], np.int64), "s")])
    onnx.load_from_string(bomb)
    assert len(bomb) < 400
