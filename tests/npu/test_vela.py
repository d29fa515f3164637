"""Vela for real: compiled files, estimates of cycles, and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from shoal.hw.backends import BackendError, BackendMissingError, VelaBackend

if importlib.util.find_spec("ethosu") is None:
    pytest.skip("Vela is not installed here: `make test-npu` has it", allow_module_level=True)

VELA = VelaBackend()
CONV = (Path(__file__).parents[1] / "ext" / "data" / "conv_int8.tflite").read_bytes()


def test_the_probe_says_that_it_compiles_and_needs_an_npu_to_run() -> None:
    """An estimate is not a run."""
    found = VELA.probe()
    assert found.state == "missing"
    assert "compiles and estimates here" in found.detail
    assert "/dev/ethosu0" in found.detail
    assert found.version.startswith("5.")


def test_a_small_network_goes_to_the_npu_as_a_whole() -> None:
    """Convolution and linear layer multiply on the NPU; the estimate adds up."""
    made = VELA.compile(CONV)
    assert b"ethos-u" in made.model
    assert made.model[4:8] == b"TFL3"
    assert made.macs >= 13824 + 5120  # the convolution's and the linear layer's own
    assert made.cycles >= made.npu_cycles > 0
    assert made.inference_us == pytest.approx(made.cycles / made.clock_hz * 1e6, rel=1e-3)
    assert made.placement.cpu_share == 0.0
    assert made.placement.counts == {"ethos-u": 1}


def test_a_larger_npu_needs_fewer_cycles() -> None:
    """The option reaches the compiler."""
    small = VELA.compile(CONV, options={"accelerator": "ethos-u55-32"})
    large = VELA.compile(CONV, options={"accelerator": "ethos-u55-256"})
    assert large.npu_cycles < small.npu_cycles
    assert (small.accelerator, large.accelerator) == ("ethos-u55-32", "ethos-u55-256")


def test_a_streaming_model_keeps_its_state_on_the_cpu(okay_nabu: bytes) -> None:
    """The U55 has no variables: their reads and writes are the CPU's, and are counted."""
    made = VELA.compile(okay_nabu)
    print(f"okay_nabu on {made.accelerator}: {made.cycles} cycles, {made.inference_us:.1f} us")
    assert 20_000 < made.cycles < 500_000
    assert made.placement.cpu_share is not None
    assert 0.2 < made.placement.cpu_share < 0.8
    state = [each for each in made.placement.nodes if each.op in ("builtin 143", "builtin 144")]
    assert len(state) == 6 + 12  # READ_VARIABLE and ASSIGN_VARIABLE, as the file has them
    assert {each.device for each in state} == {"cpu"}
    newer = VELA.compile(okay_nabu, options={"accelerator": "ethos-u85-256"})
    assert newer.placement.cpu_share is not None
    assert newer.placement.cpu_share < made.placement.cpu_share


def test_preparing_needs_the_npu() -> None:
    """It compiles, and then says what is missing, with what can be had instead."""
    with pytest.raises(BackendMissingError, match="needs an Ethos-U") as caught:
        VELA.prepare(CONV)
    assert "estimate" in caught.value.hint
    compiled = VELA.compile(CONV).model
    with pytest.raises(BackendMissingError, match="needs an Ethos-U"):  # and not compiled twice
        VELA.prepare(compiled)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"accelerator": "ethos-u99"}, "no accelerator"),
        ({"system": "Nowhere"}, "refuses the model"),
        ({"seconds": "soon"}, "is a number"),
        ({"seconds": "0.01"}, "did not end within 0.01 s"),
        ({"colour": "red"}, "no option colour"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], text: str) -> None:
    """And a compiler that takes too long is stopped."""
    with pytest.raises(BackendError, match=text):
        VELA.compile(CONV, options=options)


@pytest.mark.parametrize("model", [b"", b"garbage", CONV[:100], CONV[:-100]])
def test_a_broken_file_does_not_reach_the_compiler(model: bytes) -> None:
    """Vela crashes on one that is cut off."""
    with pytest.raises(BackendError, match="model"):
        VELA.compile(model)
