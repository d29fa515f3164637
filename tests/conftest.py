"""What holds for every test: no example has a deadline, and the longest files come first.

Two tests at a time (``make test``) end soonest if no long file is left for the end.
"""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import settings

LONGEST: Final = (
    "server/drift/test_fleets.py",
    "real/test_weather.py",
    "server/web/test_page.py",
    "agent/test_trial.py",
    "server/rollouts/test_rollouts.py",
    "server/lake/test_history.py",
    "ext/test_onnx_graph.py",
    "real/test_watch.py",
)
"""Files that take 20 s or more, the longest first."""

# A machine with other work may stall for seconds: what is slow there is no fault of the example.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")


@pytest.hookimpl(trylast=True)  # after the shuffle
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front; the rest stays shuffled."""
    order = {name: at for at, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        name = item.path.as_posix().rpartition("/tests/")[2]
        return order.get(name, len(LONGEST))

    items.sort(key=place)
