"""Print the weather station's story, two years a line: `python -m tests.real.report`."""

from __future__ import annotations

import tempfile

from shoal.server.store import Store
from tests.models.fetch import FOLDER
from tests.real import weather
from tests.real.fetch import WEATHER
from tests.real.weather import REFERENCE, YEAR, Station

SEED = 2


def main() -> None:
    """Play the stream and print what was told of it."""
    days = weather.load(FOLDER / WEATHER.file)
    first = weather.make(days.take(slice(0, REFERENCE)), groups=weather.GROUPS, seed=SEED)

    _, frozen__n = first.answers(days)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/fleet.db")
        store.migrate()
        try:
            train = weather.trainer(days, seed=SEED)
            station = Station(store, first, train=train)
            played = station.play(days.take(slice(REFERENCE, None)), start=REFERENCE)
        finally:
            store.close()
    print("days           frozen  retrained  live alerts")
    end = REFERENCE + len(played.right__n)
    for start in range(REFERENCE, end, 2 * YEAR):
        stop = min(start + 2 * YEAR, end)
        kinds = sorted({k for day, each in played.live if start < day <= stop for k in each})
        own = played.right__n[start - REFERENCE : stop - REFERENCE].mean()
        print(
            f"{start:6}-{stop:6}   {frozen__n[start:stop].mean():.3f}  {own:.3f}     ",
            ", ".join(kinds),
        )
    last = slice(weather.LAST, end)
    own = played.right__n[weather.LAST - REFERENCE :].mean()
    print(f"last quarter    {frozen__n[last].mean():.3f}  {own:.3f}")
    for alert in played.told:
        print(f"day {alert.day}: {alert.kind} [{alert.model:.6}] {alert.text}")
    print(f"new models on the days {played.retrained}, refused ones on {played.refused}")


if __name__ == "__main__":
    main()
