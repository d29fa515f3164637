"""Errors of the agent, sorted by who must act."""

from __future__ import annotations

from .. import ShoalError


class AgentError(ShoalError):
    """Root of the agent's errors."""

    code = "agent"


class ModelError(AgentError):
    """A model cannot be loaded or run; whatever was active before still is."""

    code = "agent.model"


class ModelFormatError(ModelError):
    """The file is not a model this runtime can read; nothing was loaded."""

    code = "agent.model.format"


class ModelInputError(ModelError):
    """An input's name, dtype, shape or layout is not what the model takes; it did not run."""

    code = "agent.model.input"


class ModelClosedError(ModelError):
    """The model or its runtime was closed; it did not run."""

    code = "agent.model.closed"


class NoLabelsError(AgentError):
    """There are no labelled windows to learn from or to judge by; nothing was run."""

    code = "agent.trainer.no_labels"


class SourceError(AgentError):
    """The data source cannot be read; the agent serves no windows from it."""

    code = "agent.source"


class StateError(AgentError):
    """The state directory is not usable; nothing in it was changed."""

    code = "agent.state"
