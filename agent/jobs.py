"""What the child process can do: test a bundle, train on labelled windows, evaluate bundles.

Everything that comes from outside is checked here: bundles by ``proto.bundle``, arrays by shape
and dtype, never unpickled. Sessions and windows are kept between jobs, keyed by digest or path:
a round of training then costs its arithmetic alone.

Not here: processes and limits (``worker``, ``children``), the network (``trainer``).

N windows, C channels, T samples, K classes, P parameters.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..proto.bundle import BUNDLE_BYTES_MAX, Bundle, unpack
from .errors import AgentError, ModelFormatError, NoLabelsError

SESSIONS_MAX: Final = 4  # champion, candidate, a training graph and one to spare
BATCH: Final = 64  # windows per call when accuracy alone counts
TIMED: Final = 32  # windows that are run one by one for the latency
PROBABILITY_MIN: Final = 1e-7  # a cross-entropy is at most 16.1 nats
SUM_ABS_MAX: Final = 1e-2  # probabilities of an int8 softmax need not sum to exactly 1
METADATA: Final = "shoal.training"  # where a training graph describes itself

T = TypeVar("T")


class SelfTestError(AgentError):
    """A bundle failed its self-test; it must not be activated."""

    code = "agent.self_test"


class FileRefusedError(AgentError):
    """A file is not the plain, verified file it must be; nothing of it was read."""

    code = "agent.file"


class LabelError(AgentError):
    """A label is not one of the model's classes, or the windows do not fit it; nothing was run."""

    code = "agent.trainer.labels"


class NotTrainableError(AgentError):
    """The bundle has no training graph that this agent can run."""

    code = "agent.trainer.graph"


class ParametersError(AgentError):
    """The parameters do not fit the training graph; nothing was trained."""

    code = "agent.trainer.parameters"


class DivergedError(AgentError):
    """Training went to NaN or infinity; there is no result."""

    code = "agent.trainer.diverged"


@dataclass(frozen=True, slots=True, eq=False)
class _Trainable:
    """A training graph with what it says about itself."""

    session: ort.InferenceSession
    meta: Mapping[str, Any]
    classes: int
    shape: tuple[int, int]
    """(C, T)."""


class _Cache(OrderedDict[str, Any]):
    """The things used last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def fetch(self, key: str, make: Callable[[], T]) -> T:
        if key not in self:
            self[key] = make()
            if len(self) > self._size:
                self.popitem(last=False)
        self.move_to_end(key)
        found: T = self[key]
        return found


_models: Final = _Cache(SESSIONS_MAX)
_graphs: Final = _Cache(1)
_windows: Final = _Cache(2)


# --- self-test -------------------------------------------------------------------------------


def self_test(*, bundle: str, sha256: str = "") -> dict[str, Any]:
    """Say whether a bundle may be activated on this device.

    Args:
        bundle: Path of the bundle: a regular file with one link.
        sha256: What its bytes must hash to; "" = the caller has verified it.

    Returns:
        ``name``, ``length`` (bytes), ``golden`` (vectors), ``golden_abs`` (largest difference),
        ``latency_p50_us``, ``load_ms``.

    Raises:
        FileRefusedError: Not a plain file, or other bytes.
        BundleError: Not a bundle.
        ModelFormatError: The engine cannot load the model.
        SelfTestError: Inputs, outputs or golden vectors are not as the manifest says.
    """
    found = _bundle(bundle, sha256)
    start_ns = time.perf_counter_ns()
    session = _model(found)
    load_ns = time.perf_counter_ns() - start_ns
    _check_face(found, session)
    manifest = found.manifest
    golden = _arrays(found.parts["golden.npz"], "the golden vectors")
    if set(golden) != {manifest.input, manifest.output}:
        raise SelfTestError(f"the golden vectors hold {sorted(golden)!r:.200}")
    x__nct, want__nk = golden[manifest.input], golden[manifest.output]
    shape = (len(manifest.channels), manifest.samples)
    if x__nct.dtype != np.float32 or x__nct.shape[1:] != shape or not len(x__nct):
        raise SelfTestError(f"golden inputs are {x__nct.dtype} {x__nct.shape}")
    if want__nk.dtype != np.float32 or want__nk.shape != (len(x__nct), len(manifest.classes)):
        raise SelfTestError(f"golden outputs are {want__nk.dtype} {want__nk.shape}")
    took_us, apart = [], []
    for row in range(len(x__nct)):
        start_ns = time.perf_counter_ns()
        got__1k = _run(session, found, x__nct[row : row + 1])
        took_us.append((time.perf_counter_ns() - start_ns) / 1000)
        apart.append(np.abs(got__1k - want__nk[row]).max())
    worst = float(np.max(apart))  # NaN in the golden vectors stays NaN, and fails
    if not worst <= manifest.golden_abs_max:
        raise SelfTestError(
            f"an output is {worst:.3g} away from its golden vector, allowed are "
            f"{manifest.golden_abs_max:g}"
        )
    _run(session, found, x__nct)  # the same as one batch: evaluation needs it
    return {
        "name": manifest.name,
        "length": found.length,
        "golden": len(x__nct),
        "golden_abs": worst,
        "latency_p50_us": float(np.median(took_us)),
        "load_ms": load_ns / 1e6,
    }


def _check_face(bundle: Bundle, session: ort.InferenceSession) -> None:
    manifest = bundle.manifest
    takes = [(each.name, each.type) for each in session.get_inputs()]
    gives = {each.name: each for each in session.get_outputs()}
    if takes != [(manifest.input, "tensor(float)")]:
        raise SelfTestError(f"the model takes {takes!r:.200}, not {manifest.input} of float32")
    if manifest.output not in gives or gives[manifest.output].type != "tensor(float)":
        raise SelfTestError(
            f"the model gives {sorted(gives)!r:.200}, not {manifest.output} of float32"
        )
    shape = session.get_inputs()[0].shape
    want = (len(manifest.channels), manifest.samples)
    if len(shape) != 3 or isinstance(shape[0], int) or tuple(shape[1:]) != want:
        raise SelfTestError(
            f"the model takes windows of {shape}, the manifest says (batch, {want[0]}, {want[1]})"
        )


def _run(
    session: ort.InferenceSession, bundle: Bundle, x__bct: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the checked probabilities of a batch, (B, K)."""
    manifest = bundle.manifest
    (out,) = session.run([manifest.output], {manifest.input: x__bct})
    if out.shape != (len(x__bct), len(manifest.classes)) or out.dtype != np.float32:
        raise SelfTestError(f"the model answered with {out.dtype} {out.shape}")
    if not np.isfinite(out).all():
        raise SelfTestError("the model answered with NaN or infinity")
    if (out < 0).any() or (np.abs(out.sum(1) - 1) > SUM_ABS_MAX).any():
        raise SelfTestError("the model's answers are not probabilities")
    found: NDArray[np.float32] = out
    return found


# --- training --------------------------------------------------------------------------------


def train(
    *,
    bundle: str,
    sha256: str,
    parameters: str,
    windows: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    proximal_mu: float,
    clip_norm: float,
    seed: int,
) -> dict[str, Any]:
    """Train with the bundle's training graph and return the change of the parameters.

    Plain SGD: the rows are shuffled anew for each epoch by a generator seeded with ``seed``, so
    that the same task on the same windows gives the same delta.

    Args:
        bundle: Path of the bundle.
        sha256: Of the bundle.
        parameters: Path of all parameters, float32 little-endian, in the graph's order.
        windows: Path of an ``.npz`` of ``x__nct`` float32 and ``y__n`` int64.
        epochs: Passes over the windows.
        batch_size: Rows per step; the last step of an epoch may have fewer.
        learning_rate: Step size, > 0.
        proximal_mu: FedProx weight, >= 0; the graph must support it when above 0.
        clip_norm: L2 bound of the delta; 0 = none.
        seed: Of the shuffles.

    Returns:
        ``windows``, ``loss_first`` and ``loss_last`` (mean over an epoch, nats), ``delta``
        (float32 little-endian, as long as the parameters), ``train_ms``.

    Raises:
        NotTrainableError: No training graph, or one with optimizer state.
        ParametersError: The parameters do not fit.
        NoLabelsError: There are no windows.
        LabelError: The windows or labels do not fit the model.
        DivergedError: NaN or infinity.
    """
    start_ns = time.perf_counter_ns()
    graph: _Trainable = _graphs.fetch(sha256, lambda: _trainable(_bundle(bundle, sha256)))
    x__nct, y__n = _load_windows(windows, graph.shape, graph.classes)
    old = _parameters(parameters, graph.meta["params"])
    meta = graph.meta
    names = [each["output"] for each in meta["params"]]
    takes = [each["input"] for each in meta["params"]]
    fixed: dict[str, NDArray[Any]] = {meta["lr"]: np.array(learning_rate, np.float32)}
    if meta["mu"] is not None:
        fixed[meta["mu"]] = np.array(proximal_mu, np.float32)
        fixed |= {each["global"]: old[each["input"]] for each in meta["params"]}
    elif proximal_mu > 0:
        raise NotTrainableError("the training graph has no proximal term, the task asks for one")
    ones = np.ones(batch_size, np.float32)
    rng = np.random.default_rng(seed)
    new, losses = dict(old), []
    for _ in range(epochs):
        order, total = rng.permutation(len(y__n)), 0.0
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = {meta["x"]: x__nct[rows], meta["y"]: y__n[rows], meta["w"]: ones[: len(rows)]}
            *values, loss = graph.session.run([*names, meta["loss"]], new | fixed | batch)
            new = dict(zip(takes, values, strict=True))
            total += float(loss) * len(rows)
        losses.append(total / len(order))
    delta__p = np.concatenate([(new[name] - old[name]).ravel() for name in takes])
    norm = float(np.linalg.norm(delta__p.astype(np.float64)))
    if not np.isfinite(norm) or not np.isfinite(losses).all():
        raise DivergedError(f"training diverged at a learning rate of {learning_rate:g}")
    if 0 < clip_norm < norm:
        delta__p *= np.float32(clip_norm / norm)
    return {
        "windows": len(y__n),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "delta": delta__p.astype("<f4").tobytes(),
        "train_ms": (time.perf_counter_ns() - start_ns) // 1_000_000,
    }


def _trainable(bundle: Bundle) -> _Trainable:
    if "training.onnx" not in bundle.parts:
        raise NotTrainableError(f"bundle {bundle.manifest.name} holds no training graph")
    session = _session(bundle.parts["training.onnx"], "the training graph")
    try:
        meta = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
        if meta["version"] != 1 or meta["state"]:
            raise NotTrainableError("the training graph is of another version or keeps state")
        inputs = [each["input"] for each in meta["params"]]
        inputs += [meta[name] for name in ("x", "y", "w", "lr")]
        if meta["mu"] is not None:
            inputs += [meta["mu"], *(each["global"] for each in meta["params"])]
        if set(inputs) != {each.name for each in session.get_inputs()}:
            raise NotTrainableError("the training graph takes other inputs than it says")
    except (KeyError, TypeError, ValueError) as exc:
        raise NotTrainableError(f"the training graph does not describe itself: {exc!r}") from exc
    manifest = bundle.manifest
    shape = (len(manifest.channels), manifest.samples)
    return _Trainable(session, meta, len(manifest.classes), shape)


def _parameters(path: str, params: list[dict[str, Any]]) -> dict[str, NDArray[np.float32]]:
    data = np.frombuffer(Path(path).read_bytes(), "<f4").astype(np.float32, copy=False)
    shapes = [tuple(each["shape"]) for each in params]
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    if len(data) != sum(sizes) or not np.isfinite(data).all():
        raise ParametersError(
            f"the parameters are {len(data)} numbers, the training graph takes {sum(sizes)} finite"
        )
    pieces = np.split(data, np.cumsum(sizes)[:-1])
    return {
        each["input"]: piece.reshape(shape)
        for each, piece, shape in zip(params, pieces, shapes, strict=True)
    }


# --- evaluation --------------------------------------------------------------------------------


def evaluate(*, bundles: list[list[str]], windows: str) -> dict[str, Any]:
    """Run bundles on labelled windows.

    Args:
        bundles: Pairs of path and SHA-256.
        windows: As for :func:`train`.

    Returns:
        ``scores``, one per bundle: ``bundle_sha256``, ``windows``, ``correct``, ``loss_sum``
        (nats), ``confusion`` (true x predicted, row-major), ``latency_p50_us``.

    Raises:
        NoLabelsError: There are no windows.
        LabelError: The windows or labels do not fit a model.
        SelfTestError: A model answers with something that is not a probability.
    """
    return {"scores": [_score(path, sha256, windows) for path, sha256 in bundles]}


def _score(path: str, sha256: str, windows: str) -> dict[str, Any]:
    def load() -> tuple[Bundle, ort.InferenceSession]:
        bundle = _bundle(path, sha256)
        session = _model(bundle)
        _check_face(bundle, session)
        return bundle, session

    bundle, session = _models.fetch(sha256, load)
    manifest = bundle.manifest
    classes = len(manifest.classes)
    x__nct, y__n = _load_windows(windows, (len(manifest.channels), manifest.samples), classes)
    out__nk = np.concatenate(
        [_run(session, bundle, x__nct[i : i + BATCH]) for i in range(0, len(x__nct), BATCH)]
    )
    took_us = []
    for row in range(min(TIMED, len(x__nct))):
        start_ns = time.perf_counter_ns()
        session.run([manifest.output], {manifest.input: x__nct[row : row + 1]})
        took_us.append((time.perf_counter_ns() - start_ns) / 1000)
    predicted__n = out__nk.argmax(1)
    confusion__kk = np.zeros((classes, classes), np.int64)
    np.add.at(confusion__kk, (y__n, predicted__n), 1)
    truth__n = out__nk[np.arange(len(y__n)), y__n].astype(np.float64)
    return {
        "bundle_sha256": sha256,
        "windows": len(y__n),
        "correct": int((predicted__n == y__n).sum()),
        "loss_sum": float(-np.log(np.maximum(truth__n, PROBABILITY_MIN)).sum()),
        "confusion": confusion__kk.ravel().tolist(),
        "latency_p50_us": round(float(np.median(took_us))),
    }


# --- reading -----------------------------------------------------------------------------------


def _bundle(path: str, sha256: str) -> Bundle:
    """Return the bundle in a file that nothing else can change under another name (fault 18)."""
    try:
        with open(path, "rb", opener=_open_plain) as file:
            data = file.read()
    except OSError as exc:
        raise FileRefusedError(f"cannot open {path}: {exc.strerror}") from exc
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise FileRefusedError(f"{path} does not hash to {sha256}")
    return unpack(data)


def _open_plain(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    about = os.fstat(fd)
    if stat.S_ISREG(about.st_mode) and about.st_nlink == 1 and about.st_size <= BUNDLE_BYTES_MAX:
        return fd
    os.close(fd)
    raise FileRefusedError(
        f"{path} is not a regular file with exactly one link and at most {BUNDLE_BYTES_MAX} bytes"
    )


def _model(bundle: Bundle) -> ort.InferenceSession:
    if bundle.manifest.model != "model.onnx":
        raise ModelFormatError(f"{bundle.manifest.model} cannot be run by this agent")
    return _session(bundle.model, f"model {bundle.manifest.name}")


def _session(data: bytes, label: str) -> ort.InferenceSession:
    """Load a graph from memory: no custom operators, and no path that external data is near."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # the engine raises classes of its own, rooted in Exception
        if "alloc" in str(exc).lower():
            raise MemoryError(f"{label} asks for more memory than it may have: {exc}") from exc
        raise ModelFormatError(f"{label} cannot be loaded: {exc!s:.500}") from exc


def _arrays(data: bytes, label: str) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for each in archive.infolist():
                if each.compress_type != zipfile.ZIP_STORED or each.file_size > len(data):
                    raise SelfTestError(f"{label} are compressed")  # they could inflate
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as exc:
        raise SelfTestError(f"{label} cannot be read: {exc!s:.200}") from exc


def _load_windows(
    path: str, shape: tuple[int, int], classes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    def load() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        with np.load(path, allow_pickle=False) as archive:
            return archive["x__nct"], archive["y__n"]

    x__nct, y__n = _windows.fetch(path, load)
    if not len(y__n):
        raise NoLabelsError("there are no labelled windows of this split yet")
    if x__nct.dtype != np.float32 or x__nct.shape != (len(y__n), *shape):
        raise LabelError(f"windows are {x__nct.dtype} {x__nct.shape}, the model takes {shape}")
    if y__n.dtype != np.int64 or y__n.min() < 0 or y__n.max() >= classes:
        raise LabelError(f"labels are {y__n.dtype} or beyond the model's {classes} classes")
    return x__nct, y__n


JOBS: Final[Mapping[str, Callable[..., dict[str, Any]]]] = {
    "self_test": self_test,
    "train": train,
    "evaluate": evaluate,
}
