"""Errors of the local API, sorted by who must act.

Three more come from the models themselves and pass through: ``ModelInputError``,
``ModelClosedError`` and ``ModelError`` of ``agent/errors.py``.
"""

from __future__ import annotations

from ..errors import AgentError


class UnknownModelError(AgentError):
    """No such model is served, or not this version of it; nothing ran."""

    code = "agent.local.model.unknown"


class RequestError(AgentError):
    """The request is malformed, or asks for what is not allowed; nothing ran or changed."""

    code = "agent.local.request"


class OverloadError(AgentError):
    """The model's queue is full; the request was not taken."""

    code = "agent.local.overload"
    retry = True


class DeadlineError(AgentError):
    """The request's time was over before it had an answer; its outputs were dropped."""

    code = "agent.local.deadline"
    retry = True


class ListenError(AgentError):
    """The address cannot be listened on; nothing was started."""

    code = "agent.local.listen"
