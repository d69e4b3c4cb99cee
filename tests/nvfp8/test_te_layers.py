"""Transformer Engine's layers against fp64, in every recipe this GPU has; what holds parameters is tested on CPUs too."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from one_block import TOKENS, block, decibels, gradients, inputs, least_db, run, truth
from torch import Tensor

from nvfp8 import te
from nvfp8.precision import TEPrecision, bf16
from nvfp8.precision import te as te_precision
from nvfp8.recipe import RECIPES, recipe

ROOT = Path(__file__).parents[2]
needs_engine = [pytest.mark.gpu, pytest.mark.skipif(te.unavailable() is not None, reason=str(te.unavailable()))]


def available(name: str) -> None:
    reason = te.unsupported(RECIPES[name])
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
@pytest.mark.parametrize("layers", ["fused", "separate"])
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "rowwise"])
@pytest.mark.usefixtures("fresh_engine")
class TestRecipes:
    pytestmark = needs_engine

    def test_forward_and_gradients(self, name: str, layers: str, weights: str) -> None:
        available(name)
        _, exact = truth()
        precision = te_precision(RECIPES[name], layers=layers, weights=weights)
        made, given = block(precision, "cuda"), inputs("cuda", torch.bfloat16)
        for _ in range(3):  # delayed scaling has seen the magnitudes after one
            for p in [*made.parameters(), *given[:3]]:
                p.grad = None
            with precision.autocast(1 / TOKENS):
                loss = run(made, given)
            loss.backward()
        found = gradients(made, given)
        assert found.keys() == exact.keys()
        report = {key: round(decibels(found[key], exact[key]), 1) for key in exact}
        print(name, layers, weights, report)
        # Two numbers, each a sum with much cancellation, are noisier than a tensor.
        low = {key: value for key, value in report.items() if value < least_db(name) - (6 if key == "lambdas" else 0)}
        assert not low, f"{low} of {report}, at least {least_db(name):.1f}"


@pytest.mark.usefixtures("fresh_engine")
class TestEngine:
    pytestmark = needs_engine

    def test_without_autocast_it_is_bf16_and_leaves_the_scales(self) -> None:
        precision = te_precision(RECIPES["delayed"])
        made, given = block(precision, "cuda"), inputs("cuda", torch.bfloat16)
        with precision.autocast(1 / TOKENS):
            run(made, given).backward()
        states = {key: made[key].engine.scaling_state() for key in ("qkv", "mlp", "c_proj")}
        before = copy.deepcopy(states)
        with torch.no_grad():
            run(made, given)
        for p in [*made.parameters(), *given[:3]]:
            p.grad = None
        run(made, given).backward()
        for key, state in before.items():
            assert all(torch.equal(state[what], states[key][what]) for what in state), key
        _, exact = truth()
        assert all(decibels(value, exact[key]) > 38 for key, value in gradients(made, given).items())

    def test_weights_are_cast_once_until_they_change(self) -> None:
        precision = te_precision(RECIPES["current"])
        made, given = block(precision, "cuda"), inputs("cuda", torch.bfloat16)

        def outcome() -> float:
            with torch.no_grad(), precision.autocast(1 / TOKENS):
                return float(run(made, given))

        with precision.autocast(1 / TOKENS):
            run(made, given).backward()
        first = outcome()
        made["mlp"].c_fc.weight.data.mul_(0.5)  # behind the version counter's back: the FP8 copy stays
        assert outcome() == first
        torch.autograd.graph.increment_version([made["mlp"].c_fc.weight])
        assert outcome() != first

    def test_c_q_c_k_c_v_are_views_of_one_buffer(self) -> None:
        precision = te_precision(RECIPES["delayed"])
        made, given = block(precision, "cuda"), inputs("cuda", torch.bfloat16)
        with torch.no_grad():
            run(made, given)
        weights = [made[name].weight for name in ("c_q", "c_k", "c_v")]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        made.load_state_dict({k: v.clone() for k, v in made.state_dict().items()}, assign=True)
        with torch.no_grad():
            run(made, given)
        weights = [made[name].weight for name in ("c_q", "c_k", "c_v")]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1

    def test_gradients_do_not_vanish_before_there_is_a_history(self) -> None:
        """With scale 1 a gradient of 1/(32768·8) is zero in E5M2."""
        precision = te_precision(RECIPES["delayed"])
        made, given = block(precision, "cuda"), inputs("cuda", torch.bfloat16)
        tiny = 1 / (32768 * 8)
        with torch.no_grad():
            given[3].mul_(TOKENS * tiny)
        with precision.autocast(tiny):
            run(made, given).backward()
        _, exact = truth()
        for name, grad in gradients(made, given).items():
            assert decibels(grad.double() / (TOKENS * tiny), exact[name]) > 13, name

    @pytest.mark.parametrize("name", ["delayed", "current"])
    def test_scaling_state_goes_on_where_it_was(self, name: str) -> None:
        precision = te_precision(RECIPES[name])

        def trained(steps: int, state: dict[str, dict[str, Tensor]] | None) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
            made, losses = block(precision, "cuda"), []
            for key, value in (state or {}).items():
                made[key].engine.load_scaling_state(value)
            for _ in range(steps):
                given = inputs("cuda", torch.bfloat16)
                with precision.autocast(1 / TOKENS):
                    loss = run(made, given)
                loss.backward()
                losses.append(loss.detach())
                torch.autograd.graph.increment_version(list(made.parameters()))  # as after an optimizer's step
            keys = ("qkv", "mlp", "c_proj", "next")
            return losses, {key: {k: v.clone().cpu() for k, v in made[key].engine.scaling_state().items()} for key in keys}

        whole, last = trained(4, None)
        first, state = trained(2, None)
        rest, other = trained(2, state)
        assert [*map(float, first), *map(float, rest)] == [*map(float, whole)]
        for key, value in last.items():
            assert all(torch.equal(value[what], other[key][what]) for what in value)

    def test_norm_weights_are_learned(self) -> None:
        precision = te_precision(RECIPES["current"], norm_weight=True)
        made, given = block(precision, "cuda"), inputs("cuda", torch.bfloat16)
        with precision.autocast(1 / TOKENS):
            run(made, given).backward()
        assert {name for name, _ in made.named_parameters() if "norm" in name} == {
            "qkv.norm_weight", "mlp.norm_weight", "norm.norm_weight", "next.norm_weight"
        }  # fmt: skip
        assert all(p.grad is not None and p.grad.norm() > 0 for p in made.parameters())

    def test_a_history_of_another_length_is_refused(self) -> None:
        made = block(te_precision(RECIPES["delayed"]), "cuda")
        other = block(te_precision(recipe("delayed", amax_history_len=4)), "cuda")
        given = inputs("cuda", torch.bfloat16)
        with torch.no_grad():
            run(made, given)
        with pytest.raises(ValueError, match=r"amax_history_fwd is \(16, 6\), \(4, 6\) is needed"):
            other["mlp"].engine.load_scaling_state(made["mlp"].engine.scaling_state())


def worker(rank: int, directory: str) -> None:
    """One of two processes on one GPU, over Gloo: a step of its own data, then the scaling state to a file."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    torch.save(seen(rank), f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


def seen(rank: int) -> dict[str, Tensor]:
    """The scaling state of the MLP after two steps on `rank`'s data; rank 1's gradients are four times as large."""
    precision = te_precision(RECIPES["delayed"])
    made, given = block(precision, "cuda"), inputs("cuda", torch.bfloat16)
    with torch.no_grad():
        given[0].add_(rank * given[1].flip(0))
        given[3].mul_(1 + 3 * rank)
    for _ in range(2):
        with precision.autocast(1 / TOKENS):
            loss = run(made, given)
        loss.backward()
    return {name: value.cpu() for name, value in made["mlp"].engine.scaling_state().items()}


class TestRanks:
    pytestmark = needs_engine

    def test_amaxes_are_reduced_over_ranks(self, tmp_path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(2)]
        processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        one, other = (torch.load(tmp_path / f"rank{rank}.pt", map_location="cpu", weights_only=True) for rank in range(2))
        assert all(torch.equal(one[what], other[what]) for what in one)
        # Each rank's amaxes were replaced by the larger of both, which differ where a rank is alone.
        alone = [seen(rank) for rank in range(2)]
        for what in ("amax_history_fwd", "amax_history_bwd"):
            assert not torch.equal(alone[0][what], alone[1][what]), what
            torch.testing.assert_close(one[what].amax(0), torch.maximum(alone[0][what], alone[1][what]).amax(0), rtol=0.3, atol=0)


@pytest.fixture
def fresh_engine() -> None:
    """Transformer Engine's buffers are global: those of an earlier test's modules must not be reduced with ours."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_parameters_are_those_of_every_precision(weights: str) -> None:
    ours = block(te_precision(RECIPES["delayed"], weights=weights), "meta").state_dict()
    plain = block(bf16(), "meta").state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in plain.items()}
    matrices = {value.dtype for value in ours.values() if value.ndim == 2}
    assert matrices == {torch.bfloat16 if weights == "bf16" else torch.float32}


def test_a_gate_of_few_channels_is_bf16() -> None:
    gate = te_precision(RECIPES["delayed"]).gate(12, 6)
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    assert gate(x).dtype == torch.bfloat16 and not hasattr(gate, "engine")


def test_micro_batches_that_do_not_divide_are_refused() -> None:
    precision = te_precision(RECIPES["delayed"])
    assert precision.refuses(64, 768) is None
    assert precision.refuses(24, 768) == "recipe delayed needs a multiple of 16 tokens a micro-batch, not 24"
    assert precision.refuses(64, 72) == "recipe delayed needs a multiple of 16 channels, not 72"
    assert "multiple of 128 tokens" in str(te_precision(RECIPES["blockwise"]).refuses(64, 768))
    assert bf16().refuses(1, 25) is None


def test_combinations_that_are_not_made_are_refused() -> None:
    with pytest.raises(ValueError, match="fused layers"):
        te_precision(RECIPES["delayed"], layers="separate", norm_weight=True)
    with pytest.raises(ValueError, match="bf16 weights"):
        te_precision(RECIPES["delayed"], weights="fp8", te_head=True)


def test_what_runs_where_is_told() -> None:
    told = te_precision(RECIPES["delayed"]).describe()
    assert told["q, k, v"] == "te.LayerNormLinear, one GEMM" and told["recipe"].startswith("delayed: fprop e4m3×e4m3")
    assert isinstance(te_precision(RECIPES["delayed"]), TEPrecision)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
