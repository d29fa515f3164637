"""Errors of learning; nothing was registered when one is raised."""

from __future__ import annotations

from ..errors import ServerError


class LearningError(ServerError):
    """Root of the errors of learning."""

    code = "server.learning"


class UnsupportedOperatorError(LearningError):
    """A graph holds an operator, or a use of one, that has no gradient rule."""

    code = "server.learning.operator"


class DatasetError(LearningError):
    """A data set cannot be trained on; nothing was started."""

    code = "server.learning.dataset"
