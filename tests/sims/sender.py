"""A device that only talks: appends events to a real spool and sends them over a real link.

python sender.py <broker url> <folder> [--finish]
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from shoal.agent.health import Health
from shoal.agent.link import Link, LinkConfig
from shoal.agent.spool import Spool, SpoolConfig
from shoal.proto.records import Kind


async def main(url: str, folder: Path, *, finish: bool) -> int:
    """Send until killed; with ``finish``, send the last hundred and drain."""
    spool = Spool(
        folder / "spool",
        config=SpoolConfig(segment_bytes_max=8192),
        clock=lambda: int(time.time() * 1000),
    )
    spool.open()
    link = Link(
        spool,
        url=url,
        device="d-1",
        boot=spool.stream,
        config=LinkConfig(ack_timeout_s=1, reconnect_s_max=0.5, poll_s=0.02),
        health=Health(clock=lambda: 0),
        on_nudge=lambda look: None,
        on_desired=lambda version: None,
    )
    running = asyncio.create_task(link.run())
    for i in range(100 if finish else 1_000_000):
        body = {"name": "tick", "severity": "info", "text": str(i), "data": {}}
        spool.append(Kind.EVENT, body)
        if i % 10 == 9:
            spool.flush()
            await asyncio.sleep(0.01)
    spool.flush()
    drained = await link.drain(30)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    spool.close()
    return 0 if drained else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], Path(sys.argv[2]), finish="--finish" in sys.argv)))
