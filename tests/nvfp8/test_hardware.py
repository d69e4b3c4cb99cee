import pytest

from nvfp8 import hardware
from nvfp8.hardware import missing, peaks


def test_known_devices_by_their_exact_names() -> None:
    h200 = peaks("NVIDIA H200")
    assert h200 is not None
    assert (h200.bf16, h200.fp8, h200.bandwidth) == (989.4e12, 1978.9e12, 4.8e12)
    a100 = peaks("NVIDIA A100-SXM4-80GB")
    assert a100 is not None and a100.fp8 is None


def test_form_factors_of_one_chip_differ() -> None:
    sxm, pcie, nvl = (peaks(f"NVIDIA H100 {kind}") for kind in ("80GB HBM3", "PCIe", "NVL"))
    assert sxm is not None and pcie is not None and nvl is not None
    assert sxm.bf16 > nvl.bf16 > pcie.bf16
    assert nvl.bandwidth > sxm.bandwidth > pcie.bandwidth


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA H20",
    ],
)
def test_devices_that_only_resemble_a_known_one_have_no_figure(name: str) -> None:
    assert peaks(name) is None


@pytest.mark.parametrize("name", sorted(hardware._PEAKS))
def test_every_entry_is_dense_and_in_si_units(name: str) -> None:
    """An entry with the sparse bf16 rate, in TFLOP/s or in GB/s would leave these ranges."""
    entry = peaks(name)
    assert entry is not None
    assert 1e14 <= entry.bf16 <= 2.3e15
    assert 2.5e11 <= entry.bandwidth <= 8e12
    if entry.fp8 is not None:
        assert entry.fp8 / entry.bf16 == pytest.approx(2.0, rel=0.025)  # the L40S is listed as 362.05 and 733
    assert 20 * 2**30 <= entry.memory <= 200 * 2**30 and 100 <= entry.power <= 1000
    assert (entry.fp8 is None) == (missing("fp8", entry.capability) is not None)
    if entry.fp4 is not None:
        assert entry.fp8 is not None and entry.capability >= (10, 0)
        assert entry.fp4 / entry.fp8 == pytest.approx(4 if "GeForce" in name else 2)  # of GeForce only FP4 is not halved


def test_nicknames_are_of_known_devices() -> None:
    assert all(peaks(name) is not None for name in hardware.NICKNAMES.values())


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), False),
        ((8, 0), False),
        ((8, 6), False),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((12, 1), True),
    ],
)
def test_fp8_from_ada_on(capability: tuple[int, int], expected: bool) -> None:
    assert (missing("fp8", capability) is None) is expected
