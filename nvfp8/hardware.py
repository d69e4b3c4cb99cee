"""What a device can do: its peak rates, and which formats its tensor cores take. Every guard on hardware lives here.

Model FLOPs utilization is only as honest as the peak it divides by. So these are dense rates (NVIDIA's headline figures
often count 2:4 sparsity, twice the dense rate) with fp32 accumulation, and a device is looked up by its whole name: a
laptop's RTX 4090, an RTX 4090 D or a MIG slice of an H100 are other devices, and no figure is better than a wrong one.
"""

from dataclasses import dataclass

Capability = tuple[int, int]
_MIB = 2**20


@dataclass(frozen=True)
class Peaks:
    """What a device cannot exceed, by specification.

    Attributes:
        bf16: FLOP/s of dense bf16 matrix products accumulated in fp32.
        fp8: FLOP/s of dense FP8 matrix products accumulated in fp32; None without FP8 units.
        bandwidth: bytes/s between the device's memory and its caches.
        memory: bytes, as `nvidia-smi` shows the total; less than the name says, since error correction and firmware take some.
        power: watts of the board at its default limit.
        capability: CUDA compute capability.
        fp4: FLOP/s of dense FP4 matrix products; None without FP4 units.
        shared: whether the system's memory is the same.
    """

    bf16: float
    fp8: float | None
    bandwidth: float
    memory: float
    power: float
    capability: Capability
    fp4: float | None = None
    shared: bool = False


# Keys are what torch.cuda.get_device_name() returns; rates are NVIDIA's, halved where its document counts sparsity. Bandwidth and
# power are of the same documents.
_PEAKS = {
    # H100 Tensor Core GPU datasheet: SXM, PCIe (architecture white paper, table 3) and NVL.
    "NVIDIA H100 80GB HBM3": Peaks(989.4e12, 1978.9e12, 3.35e12, 81559 * _MIB, 700, (9, 0)),
    "NVIDIA H100 PCIe": Peaks(756e12, 1513e12, 2.0e12, 81559 * _MIB, 350, (9, 0)),
    "NVIDIA H100 NVL": Peaks(835.5e12, 1670.5e12, 3.9e12, 95830 * _MIB, 400, (9, 0)),
    # H200 Tensor Core GPU datasheet: the compute of H100 with faster memory.
    "NVIDIA H200": Peaks(989.4e12, 1978.9e12, 4.8e12, 143771 * _MIB, 700, (9, 0)),
    "NVIDIA H200 NVL": Peaks(835.5e12, 1670.5e12, 4.8e12, 143771 * _MIB, 600, (9, 0)),
    # HGX B200 datasheet, a board of eight divided by eight; 1,000 W each.
    "NVIDIA B200": Peaks(2250e12, 4500e12, 8.0e12, 183359 * _MIB, 1000, (10, 0), fp4=9000e12),
    # A100 Tensor Core GPU datasheet: 40 and 80 GB, SXM and PCIe.
    "NVIDIA A100-SXM4-40GB": Peaks(312e12, None, 1.555e12, 40960 * _MIB, 400, (8, 0)),
    "NVIDIA A100-SXM4-80GB": Peaks(312e12, None, 2.039e12, 81920 * _MIB, 400, (8, 0)),
    "NVIDIA A100-PCIE-40GB": Peaks(312e12, None, 1.555e12, 40960 * _MIB, 250, (8, 0)),
    "NVIDIA A100 80GB PCIe": Peaks(312e12, None, 1.935e12, 81920 * _MIB, 300, (8, 0)),
    # L40S datasheet.
    "NVIDIA L40S": Peaks(362.05e12, 733e12, 0.864e12, 46068 * _MIB, 350, (8, 9)),
    # Ada GPU architecture white paper, appendix A; GeForce halves the rate when it accumulates in fp32.
    "NVIDIA GeForce RTX 4090": Peaks(165.2e12, 330.3e12, 1.008e12, 24564 * _MIB, 450, (8, 9)),
    # RTX Blackwell GPU architecture white paper, appendix A; halved in the same way, but for FP4.
    "NVIDIA GeForce RTX 5090": Peaks(209.5e12, 419e12, 1.792e12, 32607 * _MIB, 575, (12, 0), fp4=1676e12),
    # DGX Spark's page names only 1 PFLOP/s of sparse FP4, 273 GB/s and 128 GB; its hardware guide 140 W for the chip. Dense FP4 is
    # half of that, FP8 and bf16 a half and a quarter of dense FP4; measured rates (356, 188 and 92 TFLOP/s) stand in the same
    # ratios.
    "NVIDIA GB10": Peaks(125e12, 250e12, 0.273e12, 128e9, 140, (12, 1), fp4=500e12, shared=True),
}

# What a person calls the cards one plans for.
NICKNAMES = {
    "h100": "NVIDIA H100 80GB HBM3", "h100-pcie": "NVIDIA H100 PCIe", "h100-nvl": "NVIDIA H100 NVL", "h200": "NVIDIA H200",
    "b200": "NVIDIA B200", "a100": "NVIDIA A100-SXM4-80GB", "a100-40gb": "NVIDIA A100-SXM4-40GB", "l40s": "NVIDIA L40S",
    "4090": "NVIDIA GeForce RTX 4090", "5090": "NVIDIA GeForce RTX 5090", "gb10": "NVIDIA GB10", "spark": "NVIDIA GB10",
}  # fmt: skip


def peaks(device_name: str) -> Peaks | None:
    """The peak rates of a device, None where we have no trustworthy figure.

    Args:
        device_name: as `torch.cuda.get_device_name()` returns it.
    """
    return _PEAKS.get(device_name)


# What tensor cores can be asked for. `bf16`, `fp8` and `wgmma` (products of four warps together, which FlashAttention 3 is
# written in) are instructions, `tma` moves tiles between memory and multiprocessors; the others are scalings inside the GEMM.
FEATURES = ("bf16", "fp8", "wgmma", "tma", "fp8_block", "mxfp8", "nvfp4")


def missing(feature: str, capability: Capability) -> str | None:
    """Why a device lacks `feature`, or None where it has it. Every guard on hardware asks here.

    Args:
        feature: one of FEATURES.
        capability: CUDA compute capability, such as (9, 0).

    Returns:
        A clause to follow "because"; what Transformer Engine 2.20 refuses counts as lacking.
    """
    chip = f"compute capability {capability[0]}.{capability[1]}"
    if feature == "bf16":
        return None if capability >= (8, 0) else f"bf16 units came with 8.0, this is {chip}"
    if feature == "fp8":
        return None if capability >= (8, 9) else f"FP8 units came with 8.9 (Ada) and 9.0 (Hopper), this is {chip}"
    if feature == "wgmma":
        return None if capability[0] == 9 else f"wgmma instructions are Hopper's (9.0) alone, this is {chip}"
    if feature == "tma":
        return None if capability >= (9, 0) else f"TMA came with 9.0 (Hopper), this is {chip}"
    if feature == "fp8_block":
        return None if capability == (9, 0) else f"block scaling of FP8 is Hopper's (9.0) alone, this is {chip}"
    if feature == "mxfp8":
        if capability >= (12, 0):
            return f"MXFP8 lacks GEMM layouts that training needs on 12.0 and later, this is {chip}"
        return None if capability >= (10, 0) else f"MXFP8 came with 10.0 (Blackwell), this is {chip}"
    if feature == "nvfp4":
        return None if capability >= (10, 0) else f"NVFP4 came with 10.0 (Blackwell), this is {chip}"
    raise ValueError(f"unknown feature {feature!r}: choose among {', '.join(FEATURES)}")


def unstorable(state_dtype: str, capability: Capability) -> str | None:
    """Why optimizer state cannot be kept in a format on a device, or None where it can.

    Args:
        state_dtype: a key of `nvfp8.state.STATE_DTYPES`.
        capability: CUDA compute capability.

    Returns:
        One line that says what can be kept instead. E5M2 is the upper half of fp16, which every device converts.
    """
    if state_dtype != "e4m3" or capability >= (8, 9):
        return None
    return (
        f"conversions from E4M3 came with 8.9, this is compute capability {capability[0]}.{capability[1]}: use e5m2, bf16 or fp32"
    )


def best_recipe(capability: Capability) -> str:
    """The recipe that `--recipe auto` takes: the fastest one this chip runs natively.

    Raises:
        ValueError: the chip has no FP8 units.
    """
    reason = missing("fp8", capability)
    if reason is not None:
        raise ValueError(f"no FP8 recipe runs here: {reason}")
    if missing("mxfp8", capability) is None:
        return "mxfp8"
    return "current" if capability >= (12, 0) else "delayed"
