"""Errors of the lake, sorted by who must act."""

from __future__ import annotations

from ..errors import ServerError


class LakeError(ServerError):
    """A file of the lake could not be written or read; the manifest is as it was."""

    code = "server.lake"
    retry = True


class SketchDamagedError(ServerError):
    """KLL bytes of the lake are no sketch; nothing was merged. The operator must look."""

    code = "server.lake.sketch"
