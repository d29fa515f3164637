"""Properties of the plan of waves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.errors import InvalidError
from shoal.server.rollouts import plan


@given(st.integers(1, 200), st.lists(st.integers(1, 250), unique=True, max_size=5), st.booleans())
def test_waves_ascend_to_all_devices(devices: int, counts: list[int], open_end: bool) -> None:
    """Whatever ascending counts are given, the last wave holds everybody and none is empty."""
    waves = [*sorted(counts), *([0] if open_end else [])]
    found = plan.waves_of(waves, devices=devices, waves_max=10)
    assert found[-1] == devices
    assert found == sorted(set(found))


@pytest.mark.parametrize("waves", [[2, 2], [5, 3], [0, 4], [3, 2, 0], [0, 0]])
def test_waves_that_do_not_ascend_are_refused(waves: list[int]) -> None:
    """A wave that adds nobody is a typing error."""
    with pytest.raises(InvalidError, match="ascend"):
        plan.waves_of(waves, devices=10, waves_max=10)


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4), st.sampled_from("xyz"), min_size=1),
    st.data(),
)
def test_each_wave_has_its_size_and_the_canaries_come_first(
    devices: dict[str, str], data: st.DataObject
) -> None:
    """Sizes are exact, wishes are kept, and the same seed draws the same plan."""
    count = len(devices)
    cuts = sorted(data.draw(st.sets(st.integers(1, count), max_size=3)) | {count})
    canaries = data.draw(st.lists(st.sampled_from(sorted(devices)), unique=True))
    found = plan.assign_waves(devices, cuts, canaries=canaries, seed="s")
    assert set(found) == set(devices)
    sizes = Counter(found.values())
    assert [sizes[i] for i in range(len(cuts))] == [
        b - a for a, b in zip([0, *cuts], cuts, strict=False)
    ]
    order = [found[name] for name in canaries]
    assert order == sorted(order)
    first = {name for name, wave in found.items() if wave == 0}
    assert set(canaries[: cuts[0]]) <= first
    assert found == plan.assign_waves(devices, cuts, canaries=canaries, seed="s")


@given(st.integers(1, 9), st.integers(10, 40))
def test_a_class_is_in_each_cut_in_proportion(share: int, cut: int) -> None:
    """Never off by more than one device (fault 71)."""
    devices = {f"d{i}": "rare" if i % 10 < share else "many" for i in range(100)}
    found = plan.assign_waves(devices, [cut, 100], canaries=[], seed="s")
    rare = sum(devices[name] == "rare" for name, wave in found.items() if wave == 0)
    assert abs(rare - cut * share / 10) <= 1
