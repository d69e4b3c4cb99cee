"""Causal, windowed attention through cuDNN's graph API: the fastest attention on Hopper that pip can install.

A graph is built once for each shape, stride and window (about half a second) and then only executed, on the current stream,
with memory from PyTorch's allocator. Forward keeps o and the log-sum-exp of each row. cuDNN's left bound counts keys and so
is the window plus one.

What cuDNN refuses is known beforehand (`unsupported`), so that nobody meets its exception in the middle of a run.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvfp8.hardware import Capability, missing


@cache
def available() -> bool:
    """Whether the Python package `nvidia-cudnn-frontend` is installed."""
    return importlib.util.find_spec("cudnn") is not None


def unsupported(head_dim: int, length: int, capability: Capability) -> str | None:
    """Why cuDNN has no forward and backward for a shape, or None where it has: the checks of its own front end (1.23).

    Any length from 2 on runs (multiples of 64 were for cuDNN 8), any window, and any number of K/V heads that divides the
    query heads.

    Args:
        head_dim: E.
        length: T.
        capability: CUDA compute capability.
    """
    largest = 256 if missing("wgmma", capability) is None else 128
    if head_dim % 8 or head_dim > largest:
        return f"its head dimension must be a multiple of 8 up to {largest} on this device, not {head_dim}"
    return "it has no backward for a single position" if length == 1 else None


@cache
def _handle(device: int) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)  # cuDNN names dimensions (B, H, T, E) and takes any strides


class _Graph:
    """One built cuDNN graph: its tensors by name, and how to run it."""

    def __init__(self, device: int):
        import cudnn

        self.handle = _handle(device)
        kind = cudnn.data_type
        self.graph = cudnn.pygraph(
            io_data_type=kind.BFLOAT16, intermediate_data_type=kind.FLOAT, compute_data_type=kind.FLOAT, handle=self.handle
        )
        self.tensors: dict[str, Any] = {}

    def inputs(self, **tensors: Tensor) -> list[Any]:
        for name, tensor in tensors.items():
            self.tensors[name] = self.graph.tensor_like(tensor)
        return [self.tensors[name] for name in tensors]

    def output(self, name: str, symbol: Any, like: Tensor) -> None:
        symbol.set_output(True).set_dim(like.shape).set_stride(like.stride())
        if like.dtype == torch.float32:
            import cudnn

            symbol.set_data_type(cudnn.data_type.FLOAT)
        self.tensors[name] = symbol

    def build(self) -> None:
        import cudnn

        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace = self.graph.get_workspace_size()

    def run(self, **tensors: Tensor) -> None:
        import cudnn

        stream = torch.cuda.current_stream()
        cudnn.set_stream(handle=self.handle, stream=stream.cuda_stream)
        device = next(iter(tensors.values())).device
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        self.graph.execute({self.tensors[name]: tensor for name, tensor in tensors.items()}, workspace, handle=self.handle)


def _band(shape_q: tuple[int, ...], window: int) -> dict[str, Any]:
    import cudnn

    band: dict[str, Any] = {
        "attn_scale": shape_q[-1] ** -0.5,
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_right_bound": 0,
    }
    if window < shape_q[1] - 1:
        band["diagonal_band_left_bound"] = window + 1
    return band


_graphs: dict[tuple[Any, ...], _Graph] = {}


def _key(window: int, *tensors: Tensor) -> tuple[Any, ...]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return (window, deterministic, tensors[0].device.index, *((x.shape, x.stride()) for x in tensors))


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, length, 1, dtype=torch.float32, device=q.device)
    arguments = {"q": _heads_first(q), "k": _heads_first(k), "v": _heads_first(v)}
    key = _key(window, q, k, v)
    if key not in _graphs:
        graph = _Graph(q.device.index)
        symbols = dict(zip("qkv", graph.inputs(**arguments), strict=True))
        o, stats = graph.graph.sdpa(name="forward", generate_stats=True, **symbols, **_band(q.shape, window))
        graph.output("o", o, _heads_first(out))
        graph.output("lse", stats, lse)
        graph.build()
        _graphs[key] = graph
    _graphs[key].run(**arguments, o=_heads_first(out), lse=lse)
    return out, lse


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    names = ("q", "k", "v", "o", "dO", "stats")
    arguments = dict(zip(names, [*map(_heads_first, (q, k, v, out, d_out)), lse], strict=True))
    results = dict(zip(("dq", "dk", "dv"), map(_heads_first, gradients), strict=True))
    key = _key(window, q, k, v, out, d_out)
    if key not in _graphs:
        graph = _Graph(q.device.index)
        symbols = dict(zip(names, graph.inputs(**arguments), strict=True))
        produced = graph.graph.sdpa_backward(
            name="backward",
            use_deterministic_algorithm=torch.are_deterministic_algorithms_enabled(),
            **symbols,
            **_band(q.shape, window),
        )
        for (name, result), symbol in zip(results.items(), produced, strict=True):
            graph.output(name, symbol, result)
        graph.build()
        _graphs[key] = graph
    _graphs[key].run(**arguments, **results)
    return gradients[0], gradients[1], gradients[2]


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        out, lse = _forward(q, k, v, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(d_out.contiguous(), q, k, v, out, lse, ctx.window), None


def attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention over the keys t−window … t.

    Args:
        q: (B, T, H, E) bf16 on CUDA, any strides with E innermost.
        k: (B, T, K, E), K divides H.
        v: (B, T, K, E).
        window: earlier positions seen besides the own one.

    Returns:
        (B, T, H, E) bf16, contiguous. Under `torch.use_deterministic_algorithms` the backward is deterministic.

    Raises:
        cudnn.cudnnGraphNotSupportedError: no kernel for the shape, although `unsupported` names no reason: a gap in it.
    """
    return _CudnnAttention.apply(q, k, v, window)
