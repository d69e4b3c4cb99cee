"""A Precision makes the layers of a model: the one seam through which formats enter.

A model asks it for embeddings, norms, projections, an MLP and a head, and names no dtype itself. Whatever the precision,
the parameters have the same names and shapes, so a checkpoint of one loads in any other.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nvfp8.head import LinearCrossEntropy
from nvfp8.layers import Linear, NormLinear, ReluSquaredMLP, RMSNorm


@dataclass(frozen=True)
class Precision:
    """Layers that compute in `compute_dtype` from fp32 matrices; embedding tables are stored in `compute_dtype`."""

    name: str
    compute_dtype: torch.dtype

    def embedding(self, rows: int, width: int) -> nn.Embedding:
        """A lookup table (rows, width) in the compute dtype: it feeds the stream and is its own master."""
        return nn.Embedding(rows, width, dtype=self.compute_dtype)

    def norm(self) -> RMSNorm:
        """RMSNorm over the last axis, without scale."""
        return RMSNorm()

    def linear(self, in_features: int, out_features: int) -> Linear:
        """A projection that can add into the residual stream."""
        return Linear(in_features, out_features)

    def norm_linear(self, *projections: Linear) -> NormLinear:
        """Residual mix and norm in front of `projections`, which run as one GEMM."""
        return NormLinear(*projections)

    def mlp(self, width: int, hidden: int) -> ReluSquaredMLP:
        """The whole MLP branch, norm and residual included."""
        return ReluSquaredMLP(width, hidden)

    def head(self, width: int, vocab: int, padded_vocab: int, softcap: float) -> LinearCrossEntropy:
        """lm_head with its loss."""
        return LinearCrossEntropy(width, vocab, padded_vocab, softcap)

    def describe(self) -> dict[str, str]:
        """What each part of the model runs in, for the line printed at start and the run's record."""
        kind = str(self.compute_dtype).removeprefix("torch.")
        return {"GEMMs": f"{kind} operands, fp32 accumulation", "residual stream": kind, "matrices": "float32", "embeddings": kind}


def fp32() -> Precision:
    """Everything in fp32: the reference, and what a CPU trains in."""
    return Precision("fp32", torch.float32)


def bf16() -> Precision:
    """bf16 stream and GEMM operands, fp32 matrices: nanochat's own way."""
    return Precision("bf16", torch.bfloat16)
