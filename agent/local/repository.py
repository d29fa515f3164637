"""Keep the models that are served: load, load anew, take out, list.

Rule 1: a load that fails changes nothing; what was served before still is.
Rule 2: the new model takes over before the old one is closed, and the old one runs what waited
        for it: a reload loses no request.
Rule 3: only names of the configuration, or files of the ``allow_load`` folder, can be loaded.

How a model is run is ``served.py``'s.

Source: Triton's model repository extension, in its explicit mode.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from ..errors import ModelClosedError, ModelError, ModelFormatError
from .config import NAME, CoreConfig, ModelLimits, ModelSource
from .errors import RequestError, UnknownModelError
from .scheduler import Scheduler
from .served import VERSION, Runnable, ServedModel
from .statistics import Statistics

_log = logging.getLogger(__name__)

LISTED_MAX: Final = 1000  # files of the folder that an index shows, beside what is loaded


class Loader(Protocol):
    """Makes a model of its bytes; ``Runtime.load`` is one."""

    def __call__(self, model: bytes, /, *, name: str, threads: int) -> Runnable:
        """Load a model, or raise a ModelError."""


Serve = Callable[[str, Runnable, ModelLimits, Statistics], ServedModel]


@dataclass(slots=True, eq=False)
class _Entry:
    """A name that is, was or should be served."""

    name: str
    served: ServedModel | None = None
    state: str = "UNAVAILABLE"
    reason: str = "not loaded"
    failed: bool = False
    """Whether it should be served and is not."""
    statistics: Statistics = field(default_factory=Statistics)
    changing: threading.Lock = field(default_factory=threading.Lock)
    """Held while it is loaded or taken out; ``served`` is swapped under the repository's."""


class Repository:
    """The models by name. Thread-safe. States: open -> closed.

    Args:
        config: What may be loaded, and from where.
        load: Makes a model of its bytes.
        serve: Puts a model into service.
    """

    def __init__(self, config: CoreConfig, load: Loader, serve: Serve) -> None:
        self._config, self._load, self._serve = config, load, serve
        self._sources = {each.name: each for each in config.models}
        self._lock = threading.Lock()
        self._entries = {name: _Entry(name) for name in self._sources}
        self._retiring: list[ServedModel] = []
        self._closed = False

    def find(self, name: str, version: str) -> ServedModel:
        """Return a model that is served; version "" is any.

        Raises:
            UnknownModelError: There is none of this name and version.
        """
        entry = self._entries.get(name)
        served = None if entry is None else entry.served
        if served is not None and version in ("", VERSION):
            return served
        if entry is None or version in ("", VERSION):
            raise UnknownModelError(f"Request for unknown model: '{name:.200}' is not found")
        raise UnknownModelError(
            f"Request for unknown model: '{name:.200}' version {version:.20} is not found",
            hint=f"the one version of each model is {VERSION}",
        )

    def known(self, name: str) -> bool:
        """Say whether there is such a model, loaded or not."""
        return name in self._entries

    def serves(self, name: str) -> bool:
        """Say whether a model can be asked."""
        entry = self._entries.get(name)
        return entry is not None and entry.served is not None

    def statistics(self, name: str, version: str) -> Mapping[str, Any]:
        """Return the counts of a model that is served, or of all where the name is empty.

        Raises:
            UnknownModelError: There is none of this name and version.
        """
        if name:
            self.find(name, version)
        with self._lock:
            entries = [each for each in self._entries.values() if each.served is not None]
        stats = [e.statistics.facts(e.name, VERSION) for e in entries if name in ("", e.name)]
        return {"model_stats": stats}

    def complete(self) -> bool:
        """Say whether all that should be served is."""
        with self._lock:
            return not any(each.failed for each in self._entries.values())

    def schedulers(self) -> Sequence[Scheduler]:
        """Return those of all models, and of those on their way out."""
        with self._lock:
            served = [each.served for each in self._entries.values() if each.served is not None]
            return [each.scheduler for each in (*served, *self._retiring)]

    def index(self, *, ready: bool) -> list[Mapping[str, Any]]:
        """Return name, version, state and reason of each model, by name."""
        with self._lock:
            found = {
                each.name: {
                    "name": each.name,
                    "version": VERSION,
                    "state": each.state,
                    "reason": each.reason,
                }
                for each in self._entries.values()
                if not ready or each.served is not None
            }
        for name in () if ready else self._listed():
            found.setdefault(
                name,
                {"name": name, "version": VERSION, "state": "UNAVAILABLE", "reason": "not loaded"},
            )
        return [found[name] for name in sorted(found)]

    def start(self) -> None:
        """Load all models of the configuration.

        Raises:
            ModelError: One cannot be loaded; those before it are served.
        """
        for name in self._sources:
            self.load(name, {})

    def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model, or load it anew.

        Raises:
            RequestError: The name may not be loaded, too many are, or there are parameters.
            ModelError: It cannot be loaded; what was served before still is.
            ModelClosedError: The server is stopping.
        """
        if parameters:
            raise RequestError(
                f"failed to load '{name:.200}', parameters are not supported: "
                f"{', '.join(map(str, parameters)):.200}"
            )
        source = self._source(name)
        with self._changing(name, make=True) as entry:
            if entry.served is None:
                with self._lock:
                    entry.state, entry.reason = "LOADING", ""
            try:
                served = self._make(source, entry)
            except Exception as exc:
                self._mark_failed(entry, exc)
                raise
            with self._lock:
                if self._closed:
                    old: ServedModel | None = served
                else:
                    old, entry.served = entry.served, served
                    entry.state, entry.reason, entry.failed = "READY", "", False
                if old is not None:
                    self._retiring.append(old)
            self._retire(old)
            if old is served:
                raise ModelClosedError("the server is stopping")

    def unload(self, name: str) -> None:
        """Take a model out; what waits for it still runs, for at most ``unload_s``.

        Raises:
            UnknownModelError: There is no such model.
        """
        with self._changing(name, make=False) as entry:
            with self._lock:
                old, entry.served = entry.served, None
                entry.failed = False
                if old is not None:
                    entry.state, entry.reason = "UNLOADING", ""
                    self._retiring.append(old)
            self._retire(old)
            with self._lock:
                entry.state, entry.reason = "UNAVAILABLE", "unloaded"
                self._forget(entry)

    def close(self, seconds: float) -> None:
        """Take all models out, all within so many seconds; nothing can be loaded any more."""
        with self._lock:
            self._closed = True
            for entry in self._entries.values():
                if entry.served is not None:
                    self._retiring.append(entry.served)
                    entry.served = None
                    entry.state, entry.reason = "UNAVAILABLE", "the server is stopping"
            leaving = list(self._retiring)
        threads = [threading.Thread(target=each.close, args=(seconds,)) for each in leaving]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with self._lock:
            self._retiring.clear()

    def _make(self, source: ModelSource, entry: _Entry) -> ServedModel:
        with self._lock:
            if self._closed:
                raise ModelClosedError("the server is stopping")
            others = [each for each in self._entries.values() if each is not entry]
            loaded = sum(e.served is not None or e.state == "LOADING" for e in others)
        if loaded >= self._config.models_max:
            raise RequestError(
                f"failed to load '{source.name}', {loaded} models are loaded, the most there may "
                "be",
                hint="unload one, or raise models_max",
            )
        data = _read(source, self._config.model_bytes_max)
        model = self._load(data, name=source.name, threads=source.limits.threads)
        del data
        try:
            return self._serve(source.name, model, source.limits, entry.statistics)
        except BaseException:
            model.close()
            raise

    def _source(self, name: str) -> ModelSource:
        if name in self._sources:
            return self._sources[name]
        folder = self._config.allow_load
        if folder is None:
            raise RequestError(
                f"failed to load '{name:.200}', only models of the configuration can be loaded",
                hint="give it with --model, or name a folder with --allow-load",
            )
        path = _file_of(folder, name) if NAME.match(name) else None
        if path is None:
            raise RequestError(
                f"failed to load '{name:.200}', there is no such model in the repository",
                hint="a model is NAME.onnx, NAME.tflite or NAME/1/model.onnx in its folder",
            )
        return ModelSource(name=name, path=path, limits=self._config.load_limits)

    def _listed(self) -> list[str]:
        folder = self._config.allow_load
        if folder is None:
            return []
        names = set()
        try:
            with os.scandir(folder) as found:
                for each in found:
                    stem = each.name.removesuffix(".onnx").removesuffix(".tflite")
                    if NAME.match(stem) and _file_of(folder, stem) is not None:
                        names.add(stem)
                    if len(names) >= LISTED_MAX:
                        break
        except OSError as exc:
            _log.warning("cannot list the models in %s: %s", folder.name, exc.strerror)
        return sorted(names)

    @contextmanager
    def _changing(self, name: str, *, make: bool) -> Iterator[_Entry]:
        """Hold an entry for one change at a time.

        Raises:
            UnknownModelError: There is none, and none is to be made.
        """
        while True:
            with self._lock:
                if not make and name not in self._entries:
                    raise UnknownModelError(f"failed to unload '{name:.200}', it is not found")
                entry = self._entries.setdefault(name, _Entry(name))
            with entry.changing:
                if self._entries.get(name) is entry:  # else it was forgotten while this waited
                    yield entry
                    return

    def _forget(self, entry: _Entry) -> None:
        """Drop an entry that nothing is known of but its file; both locks are held."""
        if entry.name not in self._sources and entry.served is None:
            self._entries.pop(entry.name, None)

    def _mark_failed(self, entry: _Entry, exc: Exception) -> None:
        with self._lock:
            if entry.served is not None:
                # Triton shows it so, too: ready, and why the last load was none.
                entry.reason = f"still the one before: {exc!s:.300}"
                return
            entry.state, entry.reason = "UNAVAILABLE", f"{exc!s:.300}"
            entry.failed = entry.name in self._sources
            self._forget(entry)

    def _retire(self, old: ServedModel | None) -> None:
        if old is None:
            return
        try:
            old.close(self._config.unload_s)
        finally:
            with self._lock:
                if old in self._retiring:
                    self._retiring.remove(old)


def _file_of(folder: Path, name: str) -> Path | None:
    """Return a model's file; None if there is none inside the folder, links followed."""
    try:
        root = folder.resolve(strict=True)
    except OSError:
        return None
    for tail in (
        f"{name}.onnx",
        f"{name}.tflite",
        f"{name}/1/model.onnx",
        f"{name}/1/model.tflite",
    ):
        try:
            path = (root / tail).resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: links in a circle
            continue
        if path.is_relative_to(root) and path.is_file():
            return path
    return None


def _read(source: ModelSource, size_max: int) -> bytes:
    """Return a model's bytes; a pipe does not block."""
    try:
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise ModelFormatError(f"{source.path} of model {source.name} is no regular file")
            if facts.st_size > size_max:
                raise ModelFormatError(
                    f"{source.path} of model {source.name} has {facts.st_size} bytes, more than "
                    f"{size_max}",
                    hint="raise model_bytes_max",
                )
            return file.read(facts.st_size)
    except OSError as exc:
        raise ModelError(
            f"cannot read {source.path} of model {source.name}: {exc.strerror}"
        ) from exc
