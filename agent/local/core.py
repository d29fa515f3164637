"""Serve models to this device's programs, whatever protocol they speak.

    face (gRPC, HTTP, ring) --InferRequest--> LocalCore: check, queue, batch, run --InferResponse-->

Faces turn messages into the types of ``oip.py`` and call the methods of ``LocalCore``. All of
them may be called from many threads at once. What is refused is raised as a ``ShoalError``, whose
``code`` tells a face which status to give:

    agent.local.model.unknown   404 / NOT_FOUND          no such model or version
    agent.local.request         400 / INVALID_ARGUMENT   malformed, or not allowed
    agent.model.input           400 / INVALID_ARGUMENT   not what the model takes
    agent.local.overload        503 / UNAVAILABLE        the queue is full: at once, never a hang
    agent.local.deadline        503 / UNAVAILABLE        its time was over
    agent.model.closed          503 / UNAVAILABLE        the server is stopping
    any other                   500 / INTERNAL

Not here: which file is which model (``repository.py``), whose turn it is (``scheduler.py``),
regions (``shm.py``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from ... import ShoalError, __version__
from ..errors import ModelClosedError
from .config import CoreConfig, ModelLimits
from .errors import RequestError, UnknownModelError
from .oip import InferRequest, InferResponse
from .repository import Loader, Repository
from .scheduler import Watch
from .served import VERSION, Lane, Runnable, ServedModel
from .shm import SharedMemory
from .statistics import Statistics

Done = Callable[[InferResponse | ShoalError], None]
"""Told the answer of a submitted request, once, from a thread of the core; must not block."""

EXTENSIONS: Final = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "statistics",
)
"""Triton's names of what this server has; system_shared_memory comes with the configuration."""


class LocalCore:
    """The inference server without a protocol. States: new -> serving -> stopped; each once.

    Args:
        config: What to serve, and the limits.
        load: Makes a model of its bytes; ``Runtime().load`` is one.
    """

    def __init__(self, config: CoreConfig, load: Loader) -> None:
        self._memory = (
            SharedMemory(config.shm_folder, regions_max=config.shm_regions_max)
            if config.shm
            else None
        )
        self._repository = Repository(config, load, self._serve)
        self._watch = Watch(self._repository.schedulers)
        self._lock = threading.Lock()
        self._started = self._draining = False

    def start(self) -> None:
        """Load the models of the config; blocks until all can be asked.

        Raises:
            ModelError: One cannot be loaded; all that were are closed again.
        """
        self._watch.start()
        try:
            self._repository.start()
        except BaseException:
            self.drain(0.0)
            raise
        self._started = True

    def drain(self, seconds: float) -> None:
        """Refuse what comes, run what waits for at most ``seconds``, then close all models.

        What still waits then is told ``ModelClosedError``. A second call does nothing.
        """
        with self._lock:
            if self._draining:
                return
            self._draining = True
        self._repository.close(seconds)
        self._watch.stop()
        if self._memory is not None:
            self._memory.close()

    def live(self) -> bool:
        """Say whether the process can answer at all."""
        return True

    def ready(self) -> bool:
        """Say whether the server takes requests and every model that should be served is."""
        return self._started and not self._draining and self._repository.complete()

    def model_ready(self, name: str, version: str) -> bool:
        """Say whether a model can be asked; version "" is any.

        Raises:
            UnknownModelError: There is no such model or version.
        """
        if version in ("", VERSION) and self._repository.known(name):
            return not self._draining and self._repository.serves(name)
        self._repository.find(name, version)
        return True

    def server_metadata(self) -> Mapping[str, Any]:
        """Return name, version, extensions."""
        extensions = list(EXTENSIONS)
        if self._memory is not None:
            extensions.append("system_shared_memory")
        return {"name": "shoal", "version": __version__, "extensions": extensions}

    def model_metadata(self, name: str, version: str) -> Mapping[str, Any]:
        """Return name, versions, platform, inputs, outputs (name, datatype, shape; -1 = free).

        Raises:
            UnknownModelError: There is no such model or version.
        """
        return self._repository.find(name, version).metadata

    def model_config(self, name: str, version: str) -> Mapping[str, Any]:
        """Return Triton's model configuration in its JSON form.

        Raises:
            UnknownModelError: There is no such model or version.
        """
        return self._repository.find(name, version).config

    def statistics(self, name: str, version: str) -> Mapping[str, Any]:
        """Return ``{"model_stats": [...]}`` of one model, or of all where the name is empty.

        Raises:
            UnknownModelError: There is no such model or version.
        """
        return self._repository.statistics(name, version)

    def repository_index(self, *, ready: bool) -> list[Mapping[str, Any]]:
        """Return name, version, state and reason of each model; if ``ready``, of loaded ones."""
        return self._repository.index(ready=ready)

    def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model, or load it anew; blocks for as long as that takes: not for an event loop.

        Raises:
            RequestError: It is not a name that may be loaded, or a parameter is not supported.
            ModelError: The file is no model; the one that was served before still is.
        """
        self._repository.load(name, parameters)

    def unload(self, name: str) -> None:
        """Take a model out; blocks until what waited for it has run: not for an event loop.

        Raises:
            UnknownModelError: There is no such model.
        """
        self._repository.unload(name)

    def shm_status(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the registered regions by name (name, key, offset, byte_size); all for "".

        Raises:
            RequestError: There is no such region.
        """
        return self._shared().status(name)

    def shm_register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region of system shared memory; see ``SharedMemory.register``."""
        self._shared().register(name, key, offset, byte_size)

    def shm_unregister(self, name: str) -> None:
        """Forget a region; all where the name is empty. An unknown one is no error."""
        self._shared().unregister(name)

    def infer(self, request: InferRequest, *, left_s: float | None) -> InferResponse:
        """Run a model; blocks until it has run, is refused, or ``left_s`` seconds are over.

        It runs in the calling thread where nothing is before it and a slot is free.

        Raises:
            UnknownModelError, RequestError, ModelInputError: Nothing ran.
            OverloadError, ModelClosedError: Nothing ran; may be asked again.
            DeadlineError: The time was over.
            ModelError: The model failed.
        """
        until_s = None if left_s is None else time.monotonic() + left_s
        served = self._find(request)
        while True:
            try:
                return served.infer(request, left_s)
            except ModelClosedError:
                other = self._find(request)  # that which has taken its place, or none
                if other is served:
                    raise
                served = other
            if until_s is not None:
                left_s = until_s - time.monotonic()

    def lane(self, request: InferRequest) -> Lane:
        """Check a request that comes again and again, and return how to run it.

        For faces whose clients write into the same memory each time: a run is not checked again,
        costs 3 us less than ``infer``, and is counted like any other.

        Raises:
            UnknownModelError, RequestError, ModelInputError, ModelClosedError: As ``infer``.
        """
        return self._find(request).lane(request)

    def submit(self, request: InferRequest, done: Done, *, left_s: float | None = None) -> None:
        """Run a model in a thread of the core and tell ``done`` the answer, or the error.

        For event loops: never blocks. What can be refused at once is raised at once, as by
        ``infer``, and then ``done`` is not called.
        """
        served = self._find(request)
        while True:
            try:
                served.submit(request, left_s, done)
                return
            except ModelClosedError:
                other = self._find(request)
                if other is served:
                    raise
                served = other

    def _find(self, request: InferRequest) -> ServedModel:
        try:
            return self._repository.find(request.model, request.version)
        except UnknownModelError:
            if self._draining:  # then it says nothing about the model
                raise ModelClosedError("the server is stopping") from None
            raise

    def _serve(
        self, name: str, model: Runnable, limits: ModelLimits, statistics: Statistics
    ) -> ServedModel:
        return ServedModel(name, model, limits, self._memory, statistics, queued=self._watch.wake)

    def _shared(self) -> SharedMemory:
        if self._memory is None:
            raise RequestError("system shared memory is not enabled on this server")
        return self._memory
