"""Errors of the client, sorted by what its caller can do."""

from __future__ import annotations

from ..errors import AgentError


class ClientError(AgentError):
    """Root of the client's errors; the client can be used again after each of them."""

    code = "agent.client"


class ClientInputError(ClientError, ValueError):
    """The request is not what the model or the connection takes; nothing ran."""

    code = "agent.client.input"


class UnknownModelError(ClientError):
    """The server has no such model, or no such version of it."""

    code = "agent.client.model"


class OverloadedError(ClientError):
    """The server refused at once, because its queue is full or it is stopping; nothing ran."""

    code = "agent.client.overloaded"
    retry = True


class DeadlineError(ClientError):
    """No answer came in time; the model may or may not have run."""

    code = "agent.client.deadline"
    retry = True


class ServerFailedError(ClientError):
    """The server failed to run the model, or answered what makes no sense."""

    code = "agent.client.failed"


class ServerGoneError(ClientError):
    """No server is there, or it died meanwhile; the next call connects again."""

    code = "agent.client.gone"
    retry = True


class RingFullError(ClientError):
    """Every slot of the ring has a living client; nothing was asked."""

    code = "agent.client.full"
    retry = True
