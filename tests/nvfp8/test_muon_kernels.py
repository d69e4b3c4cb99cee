"""Muon's kernels in every storage format, and symmetric products, against their twins.

In the interpreter what is stored is the twin's exactly: its arithmetic is the twin's, and kernels round by integers, not by
casts. A GPU fuses multiplications and additions, so a value near the border of two codes may fall to the other side.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp8 import reference
from nvfp8.optim import Muon
from nvfp8.state import MASTERS, STATE_DTYPES, Codec, Stored, codec, master, read_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")

# A gate; odd and inside one scale block; odd over two programs' 4096; wide and of three programs, also with 128 to divide a row
STACKS = [(4, 1, 12), (3, 5, 7), (2, 67, 93), (2, 40, 272), (2, 35, 256)]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def stack_decoded(stored_as: Codec, stored: Stored) -> Tensor:
    """The momentum of a stack, in fp32."""
    scales = [None] * len(stored.data) if stored.scale is None else stored.scale
    return torch.stack([stored_as.decode(Stored(*each)) for each in zip(stored.data, scales, strict=True)])


def assert_same(ours: Tensor, twins: Tensor) -> None:
    """The same numbers; on a GPU all but one in a thousand, and those by one code."""
    if DEVICE == "cpu":
        assert torch.equal(ours.float(), twins.float())  # zeros of either sign are one number
        return
    codes = [t.view(torch.int8 if t.element_size() == 1 else torch.int16) for t in (ours, twins)]
    ours, twins = (torch.where(code < 0, -(code & torch.iinfo(code.dtype).max).int(), code.int()) for code in codes)  # in order
    off = (ours - twins).abs()
    assert (off > 0).sum() <= 1 + off.numel() // 1000 and off.max() <= 1


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("name", ["bf16", "e4m3", "e5m2"])
def test_a_short_momentum_is_stored_as_the_twin_stores_it(shape: tuple[int, int, int], name: str) -> None:
    n, stored_as = shape[0], codec(name)
    data, scale = stored_as.allocate((n + 2, *shape[1:]), DEVICE, stacked=True)
    data.view(torch.uint8)[[0, -1]] = 5
    if scale is not None:
        scale[[0, -1]] = 3.0
    for step in range(3):  # from zeros, then decoding what was stored; both from the same, so that no step sees another's border
        gradients = random(*shape, seed=step) * torch.logspace(-3, 3, shape[2], device=DEVICE)
        keys, results = [7 + i + 100 * step for i in range(n)], []
        start = stack_decoded(stored_as, Stored(data, scale))[1:-1]
        for function in (reference.muon_nesterov_, kernels.muon_nesterov_):
            stored = Stored(data.clone(), None if scale is None else scale.clone())
            inside, x = Stored(*(s if s is None else s[1:-1] for s in stored)), torch.full(shape, torch.nan, device=DEVICE)
            function(gradients.unbind(), *inside, x, 0.1, 0.9, keys)
            assert (stored.data.view(torch.uint8)[[0, -1]] == 5).all(), "another chunk's is left alone"
            assert stored.scale is None or (stored.scale[[0, -1]] == 3).all()
            results.append((stack_decoded(stored_as, inside), x))
        data, scale = stored
        (twins, x_twin), (ours, x) = results
        assert (scale is None or (scale > 0).all()) and (ours != 0).float().mean() > 0.5
        if DEVICE == "cpu":
            assert torch.equal(ours, twins) and torch.equal(x, x_twin)
            continue
        # Each of the up to eight roundings on the way to x is of a number of at most 2 (|g| + |m|); where they cancel, much of
        # that is left. A GPU's fused multiply-adds leave some of them out.
        lost = 2.0**-20 * (gradients.abs() + start.abs())
        assert ((x - x_twin).abs() <= lost).all()
        # So may a momentum lie, and few do on the other side of a border: one code away.
        code = {"bf16": 2.0**-7, "e4m3": 2.0**-3, "e5m2": 2.0**-2}[name] * twins.abs()
        if scale is not None:
            code = code.maximum(torch.stack([stored_as.smallest(Stored(*s)) for s in zip(data, scale, strict=True)])[1:-1])
        # A block's scale may be another in its last places, and with it every number of the block.
        lost = lost + 2.0**-20 * twins.abs()
        apart = (ours - twins).abs()
        assert (apart <= code + lost).all() and (apart > lost).sum() <= 1 + apart.numel() // 1000


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_keys_decide_how_a_momentum_is_rounded(name: str) -> None:
    gradients = [random(40, 272, seed=1)] * 2  # one matrix twice
    stored = []
    for keys in ([1, 1], [1, 2]):
        data, scale = codec(name).allocate((2, 40, 272), DEVICE, stacked=True)
        kernels.muon_nesterov_(gradients, data, scale, torch.empty(2, 40, 272, device=DEVICE), 0.1, 0.9, keys)
        stored.append(data.view(torch.uint8))
    assert torch.equal(stored[0][0], stored[0][1]) and torch.equal(stored[0][0], stored[1][0])
    assert (stored[1][0] != stored[1][1]).float().mean() > 0.2


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("kept", MASTERS)
@pytest.mark.parametrize("by_row", [True, False])
def test_bf16_weights_and_what_is_kept_beside_them(shape: tuple[int, int, int], kept: str, by_row: bool) -> None:
    n, r, c = shape
    x, scale = random(*shape, seed=1), random(*((n, r, 1) if by_row else (n, 1, c)), seed=2)
    keys = list(range(3, 3 + n))
    results = []
    for function in (kernels.muon_descend_, reference.muon_descend_):
        weights = list(random(*shape, seed=3, dtype=torch.bfloat16).unbind())
        beside = [master(kept).allocate(w) for w in weights]
        buffer = None if beside[0] is None else torch.stack([beside[0], *beside, beside[0]])
        inside = None if buffer is None else buffer[1:-1]
        exact = [w.double() for w in weights]
        for _ in range(3):
            function(weights, inside, x, scale, 2.0**-9, 2.0**-12, keys)
            reference.muon_descend_(exact, None, x.double(), scale.double(), 2.0**-9, 2.0**-12)
        if buffer is not None:
            assert torch.equal(buffer[0], beside[0]) and torch.equal(buffer[-1], beside[0]), "another chunk's is left alone"
        wholes = [read_weight(w, None if inside is None else inside[i]) for i, w in enumerate(weights)]
        for whole, truth in zip(wholes, exact, strict=True):
            steps = 3 * {"fp32": 2.0**-22, "bf16": 2.0**-7, "bf16+8": 2.0**-15, "bf16+16": 2.0**-22}[kept]
            assert ((whole - truth).abs() <= steps * (truth.abs() + 2.0**-6)).all()
        results.append((torch.stack(weights), torch.stack(wholes)))
    assert_same(results[0][0], results[1][0])
    if DEVICE == "cpu":
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kept", ["bf16+8", "bf16+16"])
def test_weights_that_were_set_to_0_go_on_from_0(kept: str) -> None:
    w, scale = random(40, 272, seed=3, dtype=torch.bfloat16), torch.ones(1, 40, 1, device=DEVICE)
    w[:20], w[20:30] = 0.0, -0.0
    beside = torch.full_like(w, -100, dtype=master(kept).dtype)[None]
    results = []
    for function in (kernels.muon_descend_, reference.muon_descend_):
        weight, rest = w.clone(), beside.clone()
        function([weight], rest, random(1, 40, 272, seed=1), scale, 2.0**-9, 2.0**-12, [3])
        whole = read_weight(weight, rest[0])
        assert bool(whole.isfinite().all()) and 2.0**-12 < float(whole[:30].abs().mean()) < 2.0**-8
        results.append(whole)
    assert_same(results[0].bfloat16(), results[1].bfloat16())


def test_a_weight_that_was_written_beside_its_master_counts_and_no_other_does() -> None:
    x, scale = random(1, 40, 272, seed=1), torch.ones(1, 40, 1, device=DEVICE)
    results = []
    for module in (kernels, reference):
        weight = random(40, 272, seed=3, dtype=torch.bfloat16)
        kept = weight.float()[None] * (1 + 2.0**-12)
        weight[:20] = 7.0
        module.muon_descend_([weight], kept, x, scale, 2.0**-9, 0.0)
        results.append((weight, kept))
        before = random(40, 272, seed=3).bfloat16().float() * (1 + 2.0**-12)
        before[:20] = 7.0
        torch.testing.assert_close(kept[0], before - 2.0**-9 * x[0], rtol=1e-6, atol=1e-6)
    assert_same(results[0][0], results[1][0])


@pytest.mark.parametrize("block", ["outlier", "equal", "zero", "denormal", "wide", "largest"])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_adversarial_blocks_come_out_of_the_kernel_as_of_the_twin(block: str, name: str) -> None:
    values = {
        "outlier": torch.cat((torch.full((127,), 1e-3), torch.tensor([7.0]))), "equal": torch.full((128,), 0.37),
        "zero": torch.zeros(128), "denormal": torch.full((128,), 1e-40), "wide": torch.logspace(-12, 3, 128),
        "largest": torch.full((128,), 3e38),
    }[block].repeat(2).view(2, 128).to(DEVICE)  # fmt: skip
    values[1] = -values[1]
    results = []
    for module in (kernels, reference):
        data, scale = codec(name).allocate((1, 2, 128), DEVICE, stacked=True)
        module.muon_nesterov_([values], data, scale, torch.empty(1, 2, 128, device=DEVICE), 1.0, 0.0, [5])  # m = g
        results.append((data, scale))
    assert results[0][0].float().isfinite().all()
    assert_same(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2**-20, atol=0)


def test_addresses_that_16_does_not_divide_are_seen() -> None:
    from nvfp8.kernels.muon import Addressed

    whole = torch.zeros(4104, device=DEVICE, dtype=torch.bfloat16)
    assert [Addressed([whole[i : i + 4096]]).aligned for i in (0, 1, 8)] == [True, False, True]
    x, scale = random(1, 32, 128, seed=1), torch.ones(1, 32, 1, device=DEVICE)
    results = []
    for module in (kernels, reference):
        buffer = random(4104, seed=2, dtype=torch.bfloat16)
        weight = buffer[1 : 1 + 4096].view(32, 128)
        gradient = random(4104, seed=4, dtype=torch.bfloat16)[3 : 3 + 4096].view(32, 128)
        data, scales = codec("bf16").allocate((1, 32, 128), DEVICE, stacked=True)
        module.muon_nesterov_([gradient], data, scales, x.clone(), 0.1, 0.9, [3])
        module.muon_descend_([weight], None, x, scale, 2.0**-9, 0.0, [3])
        results.append((buffer, data))
    for ours, twins in zip(*results, strict=True):
        assert_same(ours, twins)


def test_every_launch_is_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, whatever its tensors' is: two GPUs show it in test_optim.py."""
    on: list[Tensor] = []
    guard = torch.cuda.device_of
    monkeypatch.setattr("torch.cuda.device_of", lambda tensor: on.append(tensor) or guard(tensor))
    w, x = random(4, 8, seed=1), random(1, 4, 8, seed=2)
    kernels.muon_nesterov_([w], x.clone(), None, x, 0.1, 0.9)
    kernels.muon_descend_([w], None, x, torch.ones(1, 4, 1, device=DEVICE), 0.1, 0.1)
    kernels.symmetric_product_(x, x, torch.empty(1, 4, 4, device=DEVICE))
    moments = codec("fp32").allocate((4, 8), DEVICE), codec("fp32").allocate((4, 8), DEVICE)
    kernels.adamw_([reference.AdamWTensor(w, w.clone(), *moments, None, torch.full((8,), 0.1, device=DEVICE), True)])
    assert len(on) == 4
    with pytest.raises(AssertionError, match="lies on one device"):
        kernels.muon_descend_([w], None, x, torch.ones(1, 4, 1, device="meta"), 0.1, 0.1)


def test_matrices_of_two_devices_are_two_stacks() -> None:
    params = [torch.nn.Parameter(torch.ones(4, 8, device=device)) for device in ("cpu", "meta", "cpu")]
    assert [stack.params for stack in Muon(params)._stacks] == [[params[0], params[2]], [params[1]]]


def test_a_momentum_and_its_weight_are_rounded_by_different_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[list[int]] = []

    class Listening:
        equilibrating_scale = staticmethod(reference.equilibrating_scale)
        normuon_scale = staticmethod(reference.normuon_scale)
        addressed = staticmethod(reference.addressed)

        @staticmethod
        def muon_nesterov_(*arguments: Any) -> None:
            keys.append(arguments[6].tolist())
            reference.muon_nesterov_(*arguments)

        @staticmethod
        def muon_descend_(*arguments: Any) -> None:
            keys.append(arguments[6].tolist())
            reference.muon_descend_(*arguments)

    monkeypatch.setattr("nvfp8.optim.muon.ops", lambda x: Listening)
    params = [torch.nn.Parameter(torch.ones(4, 8, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = Muon(params, momentum_dtype="e4m3", master_weights="bf16", compute_dtype=torch.float32)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    drawn = [key for some in keys for key in some]
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 3


def test_the_kernels_refuse_what_they_would_get_wrong() -> None:
    w, x = [random(4, 8, seed=1, dtype=torch.bfloat16)], random(1, 4, 8, seed=2)
    scale = torch.ones(1, 4, 1, device=DEVICE)
    data, scales = codec("e5m2").allocate((1, 4, 8), DEVICE, stacked=True)
    for module in (kernels, reference):
        with pytest.raises(AssertionError, match="needs a key"):
            module.muon_descend_(w, None, x, scale, 0.1, 0.1)
        with pytest.raises(AssertionError, match="needs a key"):
            module.muon_nesterov_(w, data, scales, x, 0.1, 0.9)
        with pytest.raises(AssertionError, match="needs a key"):
            module.muon_nesterov_(w, x.bfloat16(), None, x, 0.1, 0.9)
    with pytest.raises(AssertionError, match="an fp32 weight is whole"):
        kernels.muon_descend_([x[0]], x, x, scale, 0.1, 0.1)


# Rows: below a tile, whole tiles, over one and over two of them; k: whole and broken steps
SQUARES = [(2, 12, 20), (1, 128, 64), (2, 132, 36), (1, 300, 96), (5, 64, 32)]


@pytest.mark.parametrize("shape", SQUARES)
@pytest.mark.parametrize("tall", [True, False])
def test_a_matrix_times_itself(shape: tuple[int, int, int], tall: bool) -> None:
    n, m, k = shape
    x = random(n, k, m, seed=1).mT if tall else random(*shape, seed=1)
    memory = torch.full((n + 2, m, m), torch.nan, device=DEVICE)
    kernels.symmetric_product_(x, x, memory[1:-1])
    truth = x.double() @ x.double().mT
    assert memory[[0, -1]].isnan().all()
    assert torch.equal(memory[1:-1], memory[1:-1].mT)
    assert (memory[1:-1] - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("shape", SQUARES)
def test_a_polynomial_and_a_product_of_two_that_commute(shape: tuple[int, int, int]) -> None:
    n, m, _ = shape
    g = random(n, m, m, seed=1) / m**0.5
    g = (g @ g.mT).contiguous()
    outs = []
    for module, operand in ((kernels, g), (reference, g), (reference, g.double())):
        p, pg = (torch.full_like(operand, torch.nan) for _ in range(2))
        module.symmetric_product_(operand, operand, p, alpha=0.5, c=operand, beta=-2.0, diagonal=4.0)
        module.symmetric_product_(p, operand, pg, alpha=0.25)
        assert torch.equal(p, p.mT) and torch.equal(pg, pg.mT)
        outs.append((p, pg))
    for ours, twins, truth in zip(*outs, strict=True):
        assert (ours - truth).norm() <= 1.05 * (twins - truth).norm() + 1e-6 * truth.norm()
    square = g.double() @ g.double()
    eye = torch.eye(m, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(outs[2][0], 0.5 * square - 2 * g.double() + 4 * eye)


@pytest.mark.parametrize("tall", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 24), (1, 128, 64), (2, 136, 40), (1, 304, 96)])
def test_a_rest_is_what_rounding_took_off(shape: tuple[int, int, int], tall: bool) -> None:
    n, m, k = shape
    x = random(n, k, m, seed=1, dtype=torch.float16).mT if tall else random(*shape, seed=1, dtype=torch.float16)
    c, memory = torch.eye(m, dtype=torch.float16, device=DEVICE).repeat(n, 1, 1), x.new_full((n + 2, m, m), torch.nan)
    rest = memory[1:-1]
    truth = 0.5 * (x.double() @ x.double().mT) + 3 * c.double()
    for module in (kernels, reference):
        memory.fill_(torch.nan)
        out, alone = torch.empty_like(c), torch.empty_like(c)
        module.symmetric_product_(x, x, out, 0.5, c, 3.0, rest=rest)
        module.symmetric_product_(x, x, alone, 0.5, c, 3.0)
        assert memory[[0, -1]].isnan().all()
        assert torch.equal(out, alone) and torch.equal(rest, rest.mT)
        assert rest.abs().max() <= out.abs().max()
        assert (out.double() + rest.double() / 2**11 - truth).norm() <= (out.double() - truth).norm() / 50


def test_fp32_leaves_no_rest() -> None:
    x = random(2, 12, 20, seed=1)
    for module in (kernels, reference):
        out, rest = (torch.full((2, 12, 12), torch.nan, device=DEVICE) for _ in range(2))
        module.symmetric_product_(x, x, out, rest=rest)
        assert not rest.any()


@pytest.mark.gpu
@pytest.mark.parametrize("tall", [True, False])
def test_two_numbers_hold_what_tensor_cores_sum(tall: bool) -> None:
    """wgmma adds 16 products at a time and cuts off what fp32 does not hold: sums of squares come out small, by 384 times 2^-23."""
    x = random(2, *((6144, 1536) if tall else (1536, 6144)), seed=1, dtype=torch.float16) / 64
    rows = x.mT if tall else x
    out, rest = (torch.full((2, 1536, 1536), torch.nan, device="cuda", dtype=torch.float16) for _ in range(2))
    kernels.symmetric_product_(rows, rows, out, rest=rest)
    truth = rows.double() @ rows.double().mT
    assert torch.equal(out, out.mT) and torch.equal(rest, rest.mT)
    off, of_one = out.double() + rest.double() / 2**11 - truth, truth.to(torch.float16) - truth
    squares = [error.diagonal(dim1=1, dim2=2).clone() for error in (off, truth)]
    assert (squares[0].abs() <= 384 * 2**-23 * squares[1]).all()
    for error in (off, of_one):
        error.diagonal(dim1=1, dim2=2).zero_()
    assert off.norm() <= of_one.norm() / 8


def test_rows_that_16_bytes_do_not_divide_are_refused() -> None:
    x, out = random(2, 8, 12, seed=1), torch.empty(2, 8, 8, device=DEVICE)
    memory = torch.empty(2 * 8 * 8 + 1, device=DEVICE)
    for operand, result in (
        (random(2, 8, 13, seed=1), out), (random(2, 13, 6, seed=1).mT[:, :, :8].mT, out),
        (random(2, 9, 12, seed=1), torch.empty(2, 9, 9, device=DEVICE)), (x, memory[1:].view(2, 8, 8)),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=r"16-byte aligned|contiguous"):
            kernels.symmetric_product_(operand, operand, result)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tall", [True, False])
def test_tensor_cores_err_no_more_than_one_rounding(dtype: torch.dtype, tall: bool) -> None:
    x = random(3, *((1000, 392) if tall else (392, 1000)), seed=1, dtype=dtype) / 32
    rows = x.mT if tall else x
    gram = torch.full((3, 392, 392), torch.nan, device="cuda", dtype=dtype)
    poly = torch.full_like(gram, torch.nan)
    kernels.symmetric_product_(rows, rows, gram)
    kernels.symmetric_product_(gram, gram, poly, alpha=0.5, c=gram, beta=-2.0, diagonal=4.0)
    both = torch.full_like(gram, torch.nan)
    kernels.symmetric_product_(poly, gram, both)
    assert all(torch.equal(product, product.mT) for product in (gram, poly, both))
    for ours, truth in (
        (gram, rows.double() @ rows.double().mT),
        (both, poly.double() @ gram.double()),
        (poly, 0.5 * gram.double() @ gram.double() - 2 * gram.double() + 4 * torch.eye(392, device="cuda")),
    ):
        # P and G are rounded, so P·G is symmetric up to that; what is below the diagonal is what is above it.
        truth = truth.triu() + truth.triu(1).mT
        assert (ours - truth).norm() <= 1.05 * (truth.to(dtype) - truth).norm()


@pytest.mark.gpu
def test_a_symmetric_product_of_any_thread_finds_room_for_its_descriptors() -> None:
    """Autograd's threads run updates, too, and Triton's allocator is set for one thread."""
    x, out = random(2, 64, 64, seed=1, dtype=torch.bfloat16), torch.empty(2, 64, 64, device="cuda", dtype=torch.bfloat16)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(kernels.symmetric_product_, x, x, out).result()
    assert (out - x.double() @ x.double().mT).norm() <= 2**-8 * out.double().norm()


@pytest.mark.parametrize("name", STATE_DTYPES)
@pytest.mark.parametrize("kept", [*MASTERS, "whole"])
def test_every_pair_of_formats_follows_the_rule(name: str, kept: str) -> None:
    """The twins, in all combinations, over ten steps: no further from fp64 than the formats' roundings add up to."""
    shape, mu, lr = (2, 24, 40), 0.9, 2.0**-6
    module, device = (kernels, DEVICE) if DEVICE == "cuda" else (reference, "cpu")
    stored = codec(name).allocate(shape, device, stacked=True)
    weights = list(random(*shape, seed=1, dtype=torch.float32 if kept == "whole" else torch.bfloat16).unbind())
    beside = [None if kept == "whole" else master(kept).allocate(w) for w in weights]
    buffer = None if beside[0] is None else torch.stack(beside)
    m, exact = torch.zeros(shape, dtype=torch.float64, device=device), torch.stack(weights).double()
    scale = torch.ones(2, 1, 40, device=device)
    for step in range(10):
        x, keys = torch.empty(shape, device=device), [2 * step, 2 * step + 1]
        gradients = random(*shape, seed=100 + step)
        module.muon_nesterov_(gradients.unbind(), *stored, x, 1 - mu, mu, keys)
        module.muon_descend_(weights, buffer, x, scale, lr, 0.0, keys)
        m = mu * m + (1 - mu) * gradients.double()
        exact = exact - lr * ((1 - mu) * gradients.double() + mu * m)
    # A code's step is at most 2^-mantissa of a value, rounded stochastically; errors of m add up to √(1/(1−μ²)) = 2.3 times one.
    one = {"fp32": 2**-24, "bf16": 2**-8, "e4m3": 2**-4, "e5m2": 2**-3}[name]
    assert (stack_decoded(codec(name), stored) - m).norm() <= 2.3 * one * m.norm()
    wholes = torch.stack([read_weight(w, None if buffer is None else buffer[i]) for i, w in enumerate(weights)])
    each = {"whole": 2**-23, "fp32": 2**-23, "bf16": 2**-8, "bf16+8": 2**-16, "bf16+16": 2**-23}[kept]
    moved = (exact - random(*shape, seed=1).double()).norm()
    assert (wholes - exact).norm() <= 10**0.5 * each * exact.norm() + 2.3 * one * moved
