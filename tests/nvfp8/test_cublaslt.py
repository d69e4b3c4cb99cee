"""cuBLASLt's algorithms: each gives the product, sums are added to, and what decides between them."""

import ctypes

import pytest
import torch
from torch import Tensor

from nvfp8 import cublaslt
from nvfp8.matmul import fp8_matmul

CUDA = torch.cuda.is_available()
NATIVE = CUDA and torch.cuda.get_device_capability() >= (8, 9)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not NATIVE, reason="no FP8 unit")]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "_products", {})


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda().to(dtype)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def test_a_pytorch_without_its_library_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    cublaslt._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"libcublasLt\.so\.99, which PyTorch .* is made for, is not there: reinstall PyTorch"):
        cublaslt._library()


def test_a_proposal_is_as_large_as_the_library_writes_it() -> None:
    """CUDA's cublasLtMatmulHeuristicResult_t: 64 bytes of algorithm, size_t, status, float, four int."""
    assert ctypes.sizeof(cublaslt._Proposal) == 96 and cublaslt._Proposal.state.offset == 72


class TestOnGPU:
    pytestmark = on_gpu

    # The last: a weight gradient of few tiles, for which parts of its sum are added up elsewhere.
    @pytest.mark.parametrize("shape", [(2048, 4096, 768), (4096, 768, 3072), (768, 768, 16384)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_every_algorithm_gives_the_product(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        m, n, k = shape
        a, b = random(m, k, seed=1, dtype=E5M2), random(n, k, seed=2, dtype=E4M3)
        scales = torch.tensor(0.25).cuda(), torch.tensor(3.0).cuda()
        out = torch.empty(m, n, dtype=dtype, device="cuda")
        fp8_matmul(a, b, *scales, dtype, False, out=out)
        (product,) = cublaslt._products.values()
        exact = a.double() @ b.double().t() * 0.75
        assert len(product.proposals) > 1 and product.chosen is not None
        for which in range(len(product.proposals)):
            product.run(which, a, b.t(), out.fill_(torch.nan), 1.0, None, 0.0)
            assert error(out, exact) < (2**-8 if dtype == torch.bfloat16 else 2**-12), which

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_product_is_added_and_rounded_once(self, dtype: torch.dtype) -> None:
        a, b, one = random(768, 4096, seed=1, dtype=E5M2), random(768, 4096, seed=2, dtype=E4M3), torch.ones((), device="cuda")
        before = random(768, 768, seed=3, dtype=dtype) * 64
        exact = before.double() + a.double() @ b.double().t()
        for _ in range(2):  # timed the first time: not what is added to
            out = before.clone()
            assert fp8_matmul(a, b, one, one, dtype, False, out=out, add=True) is out
            assert error(out, exact) < (2**-8.5 if dtype == torch.bfloat16 else 2**-12)

    @pytest.mark.parametrize("left_by_columns", [False, True])
    @pytest.mark.parametrize("right_by_columns", [False, True])
    @pytest.mark.parametrize("batch", [(), (3,)])
    def test_fp16_in_batches_and_by_columns(self, batch: tuple[int, ...], left_by_columns: bool, right_by_columns: bool) -> None:
        m, n, k = 192, 320, 256
        left = random(*batch, k, m, seed=1, dtype=torch.float16).mT if left_by_columns else random(*batch, m, k, seed=1).half()
        right = random(*batch, n, k, seed=2, dtype=torch.float16).mT if right_by_columns else random(*batch, k, n, seed=2).half()
        c, out = random(*batch, m, n, seed=3).half() * 16, torch.empty(*batch, m, n, dtype=torch.float16, device="cuda")
        assert cublaslt.matmul(left, right, out, alpha=0.5) is out
        exact = left.double() @ right.double()
        assert error(out, 0.5 * exact) < 2**-11
        kept = c.clone()
        assert error(cublaslt.matmul(left, right, out, alpha=0.5, c=c, beta=-2.0), 0.5 * exact - 2 * c.double()) < 2**-11
        assert torch.equal(c, kept)
        assert error(cublaslt.matmul(left, right, c, c=c), exact + kept.double()) < 2**-11

    def test_what_is_added_lies_as_the_result_does(self) -> None:
        x = random(64, 64, seed=1).half()
        with pytest.raises(ValueError, match="laid out as the result is"):
            cublaslt.matmul(x, x, torch.empty_like(x), c=x.t())

    def test_the_librarys_first_choice_where_results_must_not_change(self) -> None:
        a, b, one = random(768, 16384, seed=1, dtype=E5M2), random(768, 16384, seed=2, dtype=E4M3), torch.ones((), device="cuda")
        torch.use_deterministic_algorithms(True)
        try:
            results = [fp8_matmul(a, b, one, one, torch.float32, False) for _ in range(3)]
        finally:
            torch.use_deterministic_algorithms(False)
        (product,) = cublaslt._products.values()
        assert product.chosen is None
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        product.run(0, a, b.t(), results[1], 1.0, None, 0.0)
        assert torch.equal(results[0], results[1])

    def test_nothing_is_timed_in_a_graph(self) -> None:
        a, b, one = random(768, 4096, seed=1, dtype=E5M2), random(768, 4096, seed=2, dtype=E4M3), torch.ones((), device="cuda")
        out, graph = torch.empty(768, 768, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fp8_matmul(a, b, one, one, torch.float32, False, out=out)
        (product,) = cublaslt._products.values()
        assert product.chosen is None
        graph.replay()
        assert error(out, a.double() @ b.double().t()) < 2**-12
        fp8_matmul(a, b, one, one, torch.float32, False, out=out)
        assert product.chosen is not None

    def test_the_chosen_one_is_as_fast_as_any(self) -> None:
        """The logits' product of d12, which the library's first choice takes 1.2 times as long for on an H200."""
        a, b, one = random(2048, 768, seed=1, dtype=E4M3), random(32768, 768, seed=2, dtype=E4M3), torch.ones((), device="cuda")
        out = fp8_matmul(a, b, one, one, torch.bfloat16, True)
        (product,) = cublaslt._products.values()

        def milliseconds(which: int) -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(30):
                product.run(which, a, b.t(), out, 1.0, None, 0.0)
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        assert product.chosen is not None
        chosen = min(milliseconds(product.chosen) for _ in range(5))
        assert chosen < 1.05 * min(milliseconds(which) for which in range(len(product.proposals)) for _ in range(5))
