"""cuBLASLt's algorithms: each gives the product, sums are added to, and what decides between them."""

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp8 import cublaslt
from nvfp8.matmul import fp8_matmul

CUDA = torch.cuda.is_available()
NATIVE = CUDA and torch.cuda.get_device_capability() >= (8, 9)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "_products", {})


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda().to(dtype)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    cublaslt._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"libcublasLt\.so\.99, which PyTorch .* is made for, is not there: reinstall PyTorch"):
        cublaslt._library()


def test_a_proposal_is_as_large_as_the_library_writes_it() -> None:
    """CUDA's cublasLtMatmulHeuristicResult_t: 64 bytes of algorithm, size_t, status, float, four int."""
    assert ctypes.sizeof(cublaslt._Proposal) == 96 and cublaslt._Proposal.state.offset == 72


def product_of(a: Tensor, b: Tensor, out: Tensor, **more: object) -> cublaslt.Product:
    """What a product of FP8 operands (M, K) and (N, K) is remembered as, once it was computed."""
    cublaslt.matmul(a, b.t(), out, **more)  # type: ignore[arg-type]
    (product,) = cublaslt._products.values()
    return product


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no FP8 unit")
class TestOnGPU:
    # The last: a weight gradient of few tiles, for which parts of its sum are added up elsewhere.
    @pytest.mark.parametrize("shape", [(2048, 4096, 768), (4096, 768, 3072), (768, 768, 16384)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_every_algorithm_gives_the_product(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        m, n, k = shape
        a, b = random(m, k, seed=1, dtype=E5M2), random(n, k, seed=2, dtype=E4M3)
        scales = torch.tensor(0.25).cuda(), torch.tensor(3.0).cuda()
        out = torch.empty(m, n, dtype=dtype, device="cuda")
        product = product_of(a, b, out, scales=scales)
        exact = a.double() @ b.double().t() * 0.75
        assert len(product.proposals) > 1 and product.chosen is not None
        for which in range(len(product.proposals)):
            product.run(which, a, b.t(), out.fill_(torch.nan), None, 1.0)
            # Had parts of a sum been rounded to bf16 before, the error would be half as large again.
            once = error(exact.to(dtype), exact) if dtype == torch.bfloat16 else 2**-12
            assert error(out, exact) < 1.05 * once, which

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_product_is_added(self, dtype: torch.dtype) -> None:
        a, b, one = random(768, 4096, seed=1, dtype=E5M2), random(768, 4096, seed=2, dtype=E4M3), torch.ones((), device="cuda")
        before, product = random(768, 768, seed=3, dtype=dtype) * 64, a.double() @ b.double().t()
        exact = before.double() + product
        twice = (before.double() + product.to(dtype).double()).to(dtype)  # the product rounded, then the sum
        for _ in range(2):  # timed the first time: not what is added to
            out = before.clone()
            assert fp8_matmul(a, b, one, one, dtype, False, out=out, add=True) is out
            assert error(out, exact) < (1.05 * error(twice, exact) if dtype == torch.bfloat16 else 2**-12)

    def test_what_lies_around_the_result_stays(self) -> None:
        """Rows that are longer than the result, and what is added to while algorithms are timed."""
        a, b = random(128, 256, seed=1, dtype=E5M2), random(64, 256, seed=2, dtype=E4M3)
        whole = torch.full((130, 96), 7.0, device="cuda")
        out = whole[1:-1, 16:80]
        product_of(a, b, out.fill_(1), add=True)
        assert error(out, 1 + a.double() @ b.double().t()) < 2**-12
        assert int((whole != 7.0).sum()) == int((out != 7.0).sum())

    def test_scales_are_of_one_call(self) -> None:
        a, b, out = random(64, 256, seed=1, dtype=E5M2), random(64, 256, seed=2, dtype=E4M3), torch.empty(64, 64, device="cuda")
        exact = a.double() @ b.double().t()
        for factor, scales in ((6.0, (2.0, 3.0)), (1.0, (None, None)), (3.0, (3.0, None))):
            given = tuple(None if s is None else torch.tensor(s).cuda() for s in scales)
            product_of(a, b, out, scales=given)
            assert error(out, factor * exact) < 2**-12

    @pytest.mark.parametrize("left_by_columns", [False, True])
    @pytest.mark.parametrize("right_by_columns", [False, True])
    @pytest.mark.parametrize("batch", [(), (3,)])
    def test_fp16_in_batches_and_by_columns(self, batch: tuple[int, ...], left_by_columns: bool, right_by_columns: bool) -> None:
        m, n, k = 192, 320, 256
        left = random(*batch, k, m, seed=1).half().mT if left_by_columns else random(*batch, m, k, seed=1).half()
        right = random(*batch, n, k, seed=2).half().mT if right_by_columns else random(*batch, k, n, seed=2).half()
        out = torch.empty(*batch, m, n, dtype=torch.float16, device="cuda")
        exact = 0.5 * (left.double() @ right.double())
        assert cublaslt.matmul(left, right, out, alpha=0.5) is out
        assert error(out, exact) < 1.05 * error(exact.half(), exact)
        twice = (1 + exact.half().double()).half()
        added = cublaslt.matmul(left, right, torch.ones_like(out), alpha=0.5, add=True)
        assert error(added, 1 + exact) < 1.05 * error(twice, 1 + exact)

    @pytest.mark.parametrize("shape", [(1, 64, 64), (0, 64, 64), (64, 64, 0)])
    def test_a_single_row_and_none(self, shape: tuple[int, int, int]) -> None:
        m, n, k = shape
        left, right = random(m, k, seed=1).half(), random(n, k, seed=2).half().t()
        out, exact = torch.full((m, n), 3.0, device="cuda", dtype=torch.float16), left.float() @ right.float()
        assert torch.allclose(cublaslt.matmul(left, right, out).float(), exact, atol=1e-2, rtol=1e-2)
        assert torch.allclose(cublaslt.matmul(left, right, out, add=True).float(), 2 * exact, atol=1e-2, rtol=1e-2)

    def test_what_the_library_has_no_word_for_is_refused(self) -> None:
        x = random(64, 64, seed=1).half()
        for out, more, said in (
            (torch.empty_like(x).t(), {}, "contiguous rows"),
            (torch.empty_like(x), {"scales": (torch.ones(()), None)}, "lies on one device, cuda"),
        ):
            with pytest.raises(ValueError, match=said):
                cublaslt.matmul(x, x, out, **more)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="rows or columns of a"):
            cublaslt.matmul(random(128, 128, seed=1).half()[::2, ::2], x, torch.empty_like(x))
        with pytest.raises(RuntimeError, match=r"no algorithm for \(64, 64\) torch\.float8_e4m3fn"):
            cublaslt.matmul(x.to(E4M3), x.to(E4M3), torch.empty_like(x))  # FP8 by rows on the right

    def test_the_librarys_first_choice_where_results_must_not_change(self) -> None:
        a, b = random(768, 16384, seed=1, dtype=E5M2), random(768, 16384, seed=2, dtype=E4M3)
        out, first = (torch.empty(768, 768, device="cuda") for _ in range(2))
        product = product_of(a, b, out)
        product.run(0, a, b.t(), first, None, 1.0)
        ran = []
        product.run = lambda which, *_: ran.append(which)  # type: ignore[method-assign]
        product.chosen = len(product.proposals) - 1
        cublaslt.matmul(a, b.t(), out)
        cublaslt.matmul(a, b.t(), out, alike=True)
        torch.use_deterministic_algorithms(True)
        try:
            cublaslt.matmul(a, b.t(), out)
        finally:
            torch.use_deterministic_algorithms(False)
        assert ran == [product.chosen, 0, 0]
        del product.run
        for _ in range(3):
            product.run(0, a, b.t(), out, None, 1.0)
            assert torch.equal(out, first)

    def test_nothing_is_timed_in_a_graph(self) -> None:
        a, b = random(768, 4096, seed=1, dtype=E5M2), random(768, 4096, seed=2, dtype=E4M3)
        out, graph = torch.empty(768, 768, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product = product_of(a, b, out)
        assert product.chosen is None
        graph.replay()
        assert error(out, a.double() @ b.double().t()) < 2**-12
        with cublaslt.untimed():
            cublaslt.matmul(a, b.t(), out)
        assert product.chosen is None
        cublaslt.matmul(a, b.t(), out)
        assert product.chosen is not None

    def test_neither_timing_nor_what_is_remembered_grows_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cublaslt, "TIMED", 3)
        monkeypatch.setattr(cublaslt, "KEPT", 5)
        b = random(64, 64, seed=1, dtype=E4M3)
        for rows in range(16, 16 * 8, 16):
            cublaslt.matmul(random(rows, 64, seed=2, dtype=E4M3), b.t(), torch.empty(rows, 64, device="cuda"))
        kept = list(cublaslt._products.values())
        assert [product.chosen is not None for product in kept] == [True, True, True, False, False]

    @pytest.mark.parametrize("fastest", [0, 1, 2])
    def test_the_fastest_one_is_chosen(self, monkeypatch: pytest.MonkeyPatch, fastest: int) -> None:
        """Of the logits' product of d12: all others are made slower by more than other tests on the GPU may disturb it."""
        a, b = random(2048, 768, seed=1, dtype=E4M3), random(32768, 768, seed=2, dtype=E4M3)
        out = torch.empty(2048, 32768, dtype=torch.bfloat16, device="cuda")
        original = cublaslt.Product.run

        def run(self: cublaslt.Product, which: int, *arguments: Any) -> None:
            original(self, which, *arguments)
            if which != fastest:
                torch.cuda._sleep(2_000_000)  # a millisecond

        monkeypatch.setattr(cublaslt.Product, "run", run)
        product = product_of(a, b, out, fast=True)
        assert len(product.proposals) > 2 and product.chosen == fastest
