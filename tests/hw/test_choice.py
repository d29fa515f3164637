"""The policy that chooses a backend, and the folder that keeps what was chosen."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.hw.cache import Cache, versions
from shoal.hw.choice import (
    MIB,
    Candidate,
    Choice,
    Outcome,
    OutputError,
    Policy,
    Result,
    choose,
)

RIGHT = (OutputError(name="y", abs_max=1e-6, rel_max=1e-6),)
OFF = (OutputError(name="y", abs_max=0.41, rel_max=0.1025),)


def result(
    backend: str = "ort", p99_us: float = 50.0, *, threads: int = 1, **changes: Any
) -> Result:
    """Return a result that can be chosen, but for the changes."""
    found = Result(
        candidate=Candidate(backend=backend, threads=threads),
        outcome=Outcome.MEASURED,
        p50_us=p99_us / 2,
        p99_us=p99_us,
        calls=1000,
        ram_bytes=20 * MIB,
        errors=RIGHT,
        top1=1.0,
        fallback=0.0,
    )
    return replace(found, **changes)


def chosen(*results: Result, policy: Policy | None = None) -> str:
    """Return the backend that is chosen, "" for none."""
    choice = choose(results, policy or Policy()).choice
    return choice.backend if choice else ""


def word(found: Result, policy: Policy | None = None) -> str:
    """Return the verdict on a result that stands alone."""
    return choose([found], policy or Policy()).verdicts[0].word


def test_the_fastest_of_the_right_ones_is_chosen() -> None:
    """Latency is what a caller waits for, so p99 comes first."""
    assert chosen(result("ort", 50), result("litert", 20), result("openvino", 80)) == "litert"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"errors": OFF}, "wrong"),
        ({"errors": ()}, "wrong"),
        ({"errors": (*RIGHT, OutputError(name="z", abs_max=None, rel_max=None))}, "wrong"),
        ({"errors": (OutputError(name="y", abs_max=1.0, rel_max=float("nan")),)}, "wrong"),
        ({"errors": (OutputError(name="y", abs_max=1.0, rel_max=float("inf")),)}, "wrong"),
        ({"top1": 0.98}, "wrong"),
        ({"top1": float("nan")}, "wrong"),
        ({"fallback": 0.25}, "fallback"),
        ({"fallback": None}, "unplaced"),
        ({"simulated": True}, "simulated"),
        ({"p99_us": None}, "refused"),
        ({"outcome": Outcome.TIME, "reason": "stopped"}, "time"),
        ({"outcome": Outcome.MEMORY}, "memory"),
        ({"outcome": Outcome.DIED}, "died"),
        ({"outcome": Outcome.ABSENT}, "absent"),
        ({"outcome": Outcome.SKIPPED}, "skipped"),
        ({"outcome": Outcome.REFUSED}, "refused"),
    ],
)
def test_what_is_not_right_is_never_chosen_however_fast(
    changes: dict[str, Any], expected: str
) -> None:
    """Providers were seen to return wrong numbers silently, and to fall back silently."""
    bad = result("openvino", 1, ram_bytes=0, energy_uj=0.0)
    bad = replace(bad, **changes)
    decision = choose([bad, result("ort", 1000)], Policy())
    assert decision.choice is not None
    assert decision.choice.backend == "ort"
    assert decision.verdicts[0].word == expected
    assert decision.verdicts[0].why
    assert choose([bad], Policy()).choice is None


def test_a_wrong_one_says_which_output_and_by_how_much() -> None:
    """Whoever must find the cause needs the output and the size of the error."""
    why = choose([result(errors=OFF)], Policy()).verdicts[0].why
    assert "y" in why and "0.41" in why and "10.25%" in why


def test_fallback_is_taken_when_it_is_allowed() -> None:
    """A model half on an accelerator may be what an operator wants; he must say so."""
    allowed = Policy(allow_cpu_fallback=True)
    assert word(result(fallback=0.5), allowed) == "chosen"
    assert word(result(fallback=None), allowed) == "chosen"


def test_within_the_tie_of_p99_the_one_with_less_ram_is_chosen() -> None:
    """Two runs of one backend differ by 5 %, so that much is no reason."""
    heavy = result("ort", 100, ram_bytes=90 * MIB)
    assert chosen(heavy, result("litert", 104.9, ram_bytes=30 * MIB)) == "litert"
    assert chosen(heavy, result("litert", 105.1, ram_bytes=30 * MIB)) == "ort"


def test_a_megabyte_of_ram_decides_nothing() -> None:
    """Pages of the allocator come and go."""
    small = result("litert", 100, ram_bytes=2 * MIB)
    assert chosen(small, result("ort", 100, ram_bytes=3 * MIB)) == "ort"
    assert chosen(small, result("ort", 100, ram_bytes=3 * MIB + 1)) == "litert"


def test_energy_decides_after_ram_where_all_have_it() -> None:
    """A figure that one of them lacks cannot be compared."""
    a, b = result("ort", 100, energy_uj=900.0), result("litert", 100, energy_uj=300.0)
    assert chosen(a, b) == "litert"
    assert chosen(a, replace(b, energy_uj=None)) == "ort"


def test_equal_ones_are_settled_by_the_simpler_backend_then_by_fewer_threads() -> None:
    """What is simpler breaks less, and fewer threads leave cores to others."""
    assert chosen(result("openvino", 97), result("kernel", 98), result("ort", 100)) == "ort"
    decision = choose([result("ort", 98, threads=4), result("ort", 100, threads=1)], Policy())
    assert decision.choice is not None
    assert decision.choice.threads == 1
    assert "less simple than ort on 1 thread" in decision.verdicts[0].why


def test_unknown_ram_is_no_reason() -> None:
    """As with energy: unknown is neither more nor less."""
    assert chosen(result("ort", 100, ram_bytes=None), result("litert", 100, ram_bytes=1)) == "ort"


def test_no_results_choose_nothing() -> None:
    """A device without any backend gets no choice, and no crash."""
    assert choose([], Policy()).choice is None


figures = st.floats(0.1, 1e6)
results = st.lists(
    st.builds(
        result,
        st.sampled_from(["ort", "kernel", "litert", "openvino", "qnn"]),
        figures,
        threads=st.integers(1, 4),
        ram_bytes=st.none() | st.integers(0, 1 << 32),
        energy_uj=st.none() | figures,
        errors=st.sampled_from([RIGHT, OFF, ()]),
        fallback=st.sampled_from([0.0, 0.1, None]),
    ),
    max_size=8,
)


@given(results, st.randoms())
def test_the_order_of_the_results_does_not_matter(found: list[Result], random: Any) -> None:
    """Else a choice would depend on which backend was tried first."""
    mixed = list(found)
    random.shuffle(mixed)
    one, two = choose(found, Policy()), choose(mixed, Policy())
    assert one.choice == two.choice


@given(results)
def test_the_choice_is_right_and_within_the_tie_of_the_fastest(found: list[Result]) -> None:
    """The policy's promise, over any mix of results."""
    decision = choose(found, Policy())
    right = [each for each in found if each.errors == RIGHT and each.fallback == 0.0]
    assert (decision.choice is None) == (not right)
    assert len(decision.verdicts) == len(found)
    assert sum(each.word == "chosen" for each in decision.verdicts) == bool(right)
    if decision.choice is not None:
        assert decision.choice.p99_us <= 1.05 * min(each.p99_us or 0.0 for each in right)


@pytest.mark.parametrize(
    "limits", [{"error_rel_max": 1.0}, {"top1_min": 1.1}, {"tie_rel": -0.1}, {"tie_ram_bytes": -1}]
)
def test_a_policy_out_of_range_is_refused(limits: dict[str, Any]) -> None:
    """A tolerance of 1 would let any answer through."""
    with pytest.raises(ValueError):
        Policy(**limits)


# --- cache -----------------------------------------------------------------------------------

ASKED = ("a" * 64, "board", {"onnxruntime": "1.32.0"})


def choice(**changes: Any) -> Choice:
    """Return the choice of one result."""
    found = choose([result(**changes)], Policy()).choice
    assert found is not None
    return found


def test_what_was_kept_is_found_again(tmp_path: Path) -> None:
    """The same question has one answer, the latest."""
    cache = Cache(tmp_path / "made")
    assert cache.lookup(*ASKED) is None
    kept = choice(backend="litert")
    cache.keep(*ASKED, kept)
    assert Cache(tmp_path / "made").lookup(*ASKED) == kept
    cache.keep(*ASKED, choice(backend="ort"))
    found = cache.lookup(*ASKED)
    assert found is not None and found.backend == "ort"
    assert len(list((tmp_path / "made").iterdir())) == 1


@pytest.mark.parametrize("part", range(3))
def test_another_model_board_or_version_finds_nothing(tmp_path: Path, part: int) -> None:
    """A choice holds for what it was measured on, and for nothing else."""
    cache = Cache(tmp_path)
    cache.keep(*ASKED, choice())
    others = ("b" * 64, "another", {"onnxruntime": "1.33.0"})
    asked: list[Any] = [*ASKED]
    asked[part] = others[part]
    assert cache.lookup(*asked) is None


def _hostile(path: Path) -> list[bytes]:
    good = json.loads(path.read_text())
    texts: list[Any] = [
        None,
        [],
        7,
        "x",
        {},
        {**good, "asked": None},
        {**good, "choice": None},
        {**good, "choice": {**good["choice"], "extra": 1}},
    ]
    for name, value in (
        *(("threads", 0), ("threads", True), ("threads", "1"), ("threads", 10**9)),
        *(("backend", 7), ("backend", "x" * 2000), ("p99_us", -1.0), ("p99_us", "fast")),
        *(("options", []), ("options", {str(i): 1 for i in range(99)}), ("error_rel", None)),
        *(("ram_bytes", float("nan")), ("p50_us", float("inf"))),
    ):
        texts.append({**good, "choice": {**good["choice"], name: value}})
    raw = [b"", b"\xff\xfe", b"{", b"[" * 100_000, b" " * 70_000]
    return raw + [json.dumps(each).encode() for each in texts]


def test_a_hostile_file_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache is a hint: a broken one costs a trial, never a device."""
    cache = Cache(tmp_path)
    path = cache.keep(*ASKED, choice())
    for content in _hostile(path):
        caplog.clear()
        path.write_bytes(content)
        assert cache.lookup(*ASKED) is None, content[:80]
        assert "ignored" in caplog.text
    cache.keep(*ASKED, choice())
    assert cache.lookup(*ASKED) is not None


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_plain_file_is_ignored(tmp_path: Path, kind: str) -> None:
    """A fifo must not hang the runtime, a link must not lead it elsewhere."""
    cache = Cache(tmp_path)
    path = cache.keep(*ASKED, choice())
    path.rename(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    assert cache.lookup(*ASKED) is None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    """The folder is bounded, and what is in use stays."""
    cache = Cache(tmp_path, entries_max=3)
    for number in range(3):
        path = cache.keep(f"{number:064x}", "board", {}, choice())
        os.utime(path, (1000 + number, 1000 + number))
    assert cache.lookup(f"{0:064x}", "board", {}) is not None  # used: now the youngest
    cache.keep(f"{9:064x}", "board", {}, choice())
    left = [number for number in (0, 1, 2, 9) if cache.lookup(f"{number:064x}", "board", {})]
    assert left == [0, 2, 9]


def test_what_a_crash_left_half_written_goes_with_the_oldest(tmp_path: Path) -> None:
    """Power cuts must not fill the disk."""
    cache = Cache(tmp_path, entries_max=1)
    (tmp_path / ".x.tmp").write_text("half")
    os.utime(tmp_path / ".x.tmp", (1000, 1000))
    path = cache.keep(*ASKED, choice())
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_writer_alone(tmp_path: Path) -> None:
    """Reading goes on where writing is impossible."""
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "below")
    assert cache.lookup(*ASKED) is None
    with pytest.raises(OSError):
        cache.keep(*ASKED, choice())


def test_the_versions_name_the_runtime_that_is_installed() -> None:
    """A new runtime must not find the choice of the old one."""
    assert versions()["onnxruntime"]
