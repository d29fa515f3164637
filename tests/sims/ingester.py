"""The server's ingest in a process of its own, which dies at a chosen point.

python ingester.py <broker url> <database url> before-commit|after-commit
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from shoal.proto.session import Session
from shoal.server.ingest import Ingest, IngestConfig
from shoal.server.ingest.writer import _Group
from shoal.server.store import Store


def die(*_: Any) -> Any:
    """End at once, as kill -9 does."""
    os._exit(9)


def main(url: str, database: str, point: str) -> None:
    """Run until the first telemetry batch reaches the point."""
    if point == "before-commit":
        finish = _Group.finish
        # Presence comes first and touches no stream: only a batch of records is deadly.
        _Group.finish = lambda self: die() if self._touched else finish(self)  # type: ignore[method-assign]
    else:
        acknowledge = Session.acknowledge
        Session.acknowledge = lambda self, message: (  # type: ignore[method-assign]
            die() if message.topic.endswith("/t") else acknowledge(self, message)
        )
    ingest = Ingest(
        Store(database),
        url=url,
        config=IngestConfig(),
        clock=lambda: 1,
        on_update=lambda *_: None,
        on_reported=lambda *_: None,
    )
    asyncio.run(ingest.run())


if __name__ == "__main__":
    main(*sys.argv[1:])
