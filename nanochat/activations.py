"""What a micro-batch keeps for backward and what its largest moments work in, in bytes, counted tensor by tensor.

For every kind of layers one function says which tensors each autograd Function saves, and what lies beside them where backward
begins, which is when everything that was kept is still there. Nothing is fitted to measurements: where a count rests on the
source of a library, the comment says which. Units: x is one tensor of the stream, tokens · width in the compute dtype.

| kept by a block, in x | own layers, bf16 | own in FP8 | te fused, per-tensor scales | te fused, block scales | te separate |
| --- | --- | --- | --- | --- | --- |
| the mixed stream, or the branch it is computed from | 1 | 1 | 1 | 1 | 2 (mixed and not) |
| norm's output for the q, k, v GEMMs | – | – | ½ | ½ | 1½, and 1 more where a gate reads it |
| q, k, v, attention's output | 4 | 4 | 4 | 4 | 4 |
| that output in FP8 | – | – | ½ | ½ | ½ |
| the MLP's input | 1 | 1 | 1 | 1 | 1 |
| its norm's output | – | – | 1 (both layouts) | 1 | ½ |
| c_fc's output | – | – | 4 | 4 | 4 (relu of it) |
| relu² of it | 4 | 2 | 2 | 4 (both layouts) | 2 |
| in all | 10 | 8 | 14 | 16 and scales | 16 on average |
"""

from dataclasses import dataclass

from nanochat.gpt import GATE_CHANNELS, GPTConfig
from nvfp8.fp8_head import PARTS
from nvfp8.head import CHUNK_BYTES
from nvfp8.precision import FP8Precision, Precision, TEPrecision
from nvfp8.recipe import GEMMS, Recipe

Bytes = dict[str, float]  # what -> bytes
DP_WORKSPACE = 256 * 2**20  # cudnn-frontend's default CUDNN_FRONTEND_ATTN_DP_WORKSPACE_LIMIT (scaled_dot_product_flash_attention.h)


@dataclass(frozen=True)
class MicroBatch:
    """What activations depend on.

    Attributes:
        shape: of the model.
        rows: sequences.
        itemsize: bytes of the stream's dtype.
        attention: the backend.
        deterministic: whether attention's backward is.
    """

    shape: GPTConfig
    rows: int
    itemsize: int
    attention: str
    deterministic: bool

    @property
    def tokens(self) -> int:
        """Positions of all rows."""
        return self.rows * self.shape.sequence_len

    @property
    def x(self) -> int:
        """Bytes of one tensor of the stream."""
        return self.tokens * self.shape.n_embd * self.itemsize

    @property
    def kv(self) -> float:
        """Width of k or v as a part of the stream's."""
        return self.shape.n_kv_head / self.shape.n_head


@dataclass(frozen=True)
class Block:
    """A block's part.

    Attributes:
        attention: kept by its first half, until that half's backward is done.
        mlp: kept by its second half.
        mlp_backward: moments inside the MLP's backward, each what lies there beside everything kept.
    """

    attention: Bytes
    mlp: Bytes
    mlp_backward: tuple[Bytes, ...]


@dataclass(frozen=True)
class Head:
    """The head's part.

    Attributes:
        moment: when it needs most.
        working: what lies there then, beside everything kept.
    """

    moment: str
    working: Bytes


def ends(precision: Precision, batch: MicroBatch) -> Bytes:
    """Kept outside of blocks, from the embedding to the end of backward."""
    # Own bf16 and separate layers keep the middle stream anyway, as the input of the block after it.
    besides = isinstance(precision, FP8Precision) or (isinstance(precision, TEPrecision) and precision.layers == "fused")
    return {
        "the stream of the middle block, for the backout": batch.x if besides else 0,
        "embedding: rows, their norm, which smear keeps": 2 * batch.x,
        "x0, the stream before the first block": batch.x,
        "1/rms outside of blocks": batch.tokens * 8,
    }


def block(precision: Precision, batch: MicroBatch, layer: int) -> Block:
    """What block `layer` keeps and works in. New kinds of layers get a function here, and a test with a measured peak."""
    if isinstance(precision, FP8Precision):
        return _fp8(precision, batch, layer)
    if isinstance(precision, TEPrecision):
        return _separate(precision, batch, layer) if precision.layers == "separate" else _fused(precision, batch, layer)
    return _own(precision, batch, layer)


def after_attention(batch: MicroBatch) -> Bytes:
    """What backward works in inside the last block's attention, with that block's MLP done, beside what is then kept."""
    shape = batch.shape
    length = -(-shape.sequence_len // 64) * 64
    scores = batch.rows * shape.n_head * length * length * 2
    working = {
        "gradients of the stream, of attention's output and of the middle": 3 * batch.x,
        "dq, dk, dv": (1 + 2 * batch.kv) * batch.x,
    }
    sums = batch.tokens * shape.n_head * 4
    if batch.attention == "cudnn" and (batch.deterministic or scores <= DP_WORKSPACE):
        # Its front end forces the algorithm that stores dP where determinism is asked for, and takes it where dP is small.
        return working | {"cuDNN's workspace: dP, rows x heads x T² in bf16": scores + sums}
    return working | {"attention's workspace: dq in fp32, sums": batch.tokens * shape.n_embd * 4 + sums}


def head(precision: Precision, batch: MicroBatch) -> Head:
    """What the head works in where it needs most."""
    shape, tokens = batch.shape, batch.tokens
    weight = shape.padded_vocab * shape.n_embd
    if isinstance(precision, TEPrecision) and precision.te_head:
        one = fp8_bytes(precision.recipe)
        return Head(
            "backward of the head",
            {
                "the stream before the last norm": batch.x,
                "head: its input in FP8": tokens * shape.n_embd * one,
                "head: whole logits": tokens * shape.padded_vocab * 2,
                "head: their gradient in FP8, both layouts": tokens * shape.padded_vocab * 2 * one,
                "head: dx": batch.x,
                "head: dW": weight * 2,
            },
        )
    if isinstance(precision, FP8Precision) and len(precision.head_in_bf16) < len(GEMMS):
        return _fp8_head(precision, batch)
    logits = tokens * shape.padded_vocab * batch.itemsize
    cast = 0 if precision.matrix_dtype == precision.compute_dtype else weight * batch.itemsize
    return Head(
        "forward of the head",
        {
            "the stream before the last norm": batch.x,
            "head: its input and dx": 2 * batch.x,
            "head: a chunk of logits": min(CHUNK_BYTES, logits),
            "head: dW in fp32": weight * 4,
            "head: cast copy of its weight": cast,
        },
    )


def _fp8_head(precision: FP8Precision, batch: MicroBatch) -> Head:
    """`nvfp8.fp8_head`, inside the loss's kernel of any chunk but the first."""
    shape, weight = batch.shape, batch.shape.padded_vocab * batch.shape.n_embd
    chunk = min(CHUNK_BYTES, batch.tokens * shape.padded_vocab)  # logits of a chunk; a byte each in either layout of their gradient
    layouts = len({"dgrad", "wgrad"} - precision.head_in_bf16)
    return Head(
        "forward of the head",
        {
            "the stream before the last norm": batch.x,
            "head: its input and dx": 2 * batch.x,
            "head: its input in FP8, a chunk": chunk / shape.padded_vocab * shape.n_embd,
            "head: a chunk's gradient in FP8, by layouts": layouts * chunk,
            "head: logits of a part of the chunk": 2 * chunk / PARTS,  # bf16
            "head: dW in fp32": weight * 4,
        },
    )


def fp8_bytes(recipe: Recipe) -> float:
    """Bytes an element of a quantized activation or gradient, one layout, its scales included."""
    return {"block1x128": 1 + 4 / 128, "mx32": 1 + 1 / 32, "nv16": 0.5 + 1 / 16}.get(recipe.fprop.left.scaling, 1.0)


def _rope_and_attention(batch: MicroBatch, layer: int) -> Bytes:
    """What `project_heads` and attention keep, whatever computes the projections."""
    shape, tokens, size = batch.shape, batch.tokens, batch.itemsize
    kept: Bytes = {
        "q, k, v and attention's output": (2 + 2 * batch.kv) * batch.x,
        "log-sum-exp of attention": tokens * shape.n_head * 4,
        "1/rms of q and k": tokens * (shape.n_head + shape.n_kv_head) * 4,
    }
    window = shape.window(layer)
    if batch.attention == "sdpa" and window < shape.sequence_len - 1:
        kept["k and v padded for windows"] = 2 * batch.kv * batch.x * (1 + window / shape.sequence_len)
    if shape.has_value_embedding(layer):
        kept["gates of value embeddings"] = tokens * size * (GATE_CHANNELS + shape.n_kv_head)
    return kept


def _before(batch: MicroBatch, layer: int) -> float:
    """1 where a block's input is a tensor of its own, 0 where it is x0."""
    return float(layer > 0) * batch.x


def _own(precision: Precision, batch: MicroBatch, layer: int) -> Block:
    """`nvfp8.layers`. NormLinear keeps the branch it is handed; the stream it is handed is what the MLP before it keeps."""
    x, tokens = batch.x, batch.tokens
    matrix = 4 * batch.shape.n_embd**2
    cast = 0 if precision.matrix_dtype == precision.compute_dtype else matrix * batch.itemsize
    return Block(
        _rope_and_attention(batch, layer)
        | {"branch of the block before, or the stream of the middle one": _before(batch, layer), "1/rms of the stream": tokens * 4},
        {"the MLP's input": x, "relu²": 4 * x, "1/rms of the MLP's input": tokens * 4},
        (
            # weight_gradient of c_fc, the last GEMM: all that this backward made is still named.
            {
                "gradients of the stream and of the middle": 2 * x,
                "MLP: gradient of the hidden layer": 4 * x,
                "MLP: x̂, its gradient and dx": 3 * x,
                "MLP: gradients of c_fc and c_proj": 2 * matrix * precision.matrix_dtype.itemsize,
            },
            # One GEMM earlier its weight is cast, where x̂ and dx are not there yet: smaller but for narrow batches.
            {
                "gradients of the stream and of the middle": 2 * x,
                "MLP: gradient of the hidden layer": 4 * x,
                "MLP: gradient of x̂": x,
                "MLP: gradient of c_proj, cast copy of c_fc": matrix * precision.matrix_dtype.itemsize + cast,
            },
        ),
    )


def _fp8(precision: FP8Precision, batch: MicroBatch, layer: int) -> Block:
    """Our own FP8 layers: the mixed stream, the MLP's input and aᵀ are kept, o is cast again; what is left in bf16 is not counted.

    With a scale known beforehand (delayed) gradients leave their kernels in FP8; without, they are there in bf16 too. Scales by row
    or block: one layout is cast after the other; emulated, by way of three fp32 copies. Only scales by tensor were measured.
    """
    scaling, x, one = precision.recipe.fprop.left.scaling, batch.x, fp8_bytes(precision.recipe)
    small = x * one / batch.itemsize
    matrix = 4 * batch.shape.n_embd**2 * precision.matrix_dtype.itemsize
    outer = {"gradients of the stream and of the middle": 2 * x, "MLP: its gradient in FP8, both layouts": 2 * small}
    attention = _rope_and_attention(batch, layer) | {"the mixed stream": x, "1/rms of the stream": batch.tokens * 4}
    kept, again = (0.0, 4 * small) if precision.recompute else (4 * small, 0.0)
    mlp: Bytes = {"the MLP's input": x, "relu² in FP8": kept, "1/rms of the MLP's input": batch.tokens * 4}
    if scaling not in ("delayed", "current"):
        fine = {"x̂ and attention's output in FP8": 2 * small}, {"the MLP's x̂ in FP8": small, "relu²": 4 * x}
        working: Bytes = {"gradients of the stream and of the middle": 2 * x, "MLP: gradient of the hidden layer": 4 * x}
        copies = {"MLP: three fp32 copies of it": 24 * x} if precision.emulated else {"MLP: its transpose": 4 * x}
        return Block(attention | fine[0], mlp | fine[1], (working | copies | {"MLP: its transpose in FP8": 4 * small},))
    return Block(
        attention,
        mlp,
        (
            outer
            | {
                "MLP: gradient of relu² in bf16": 0 if scaling == "delayed" else 4 * x,
                "MLP: relu² in FP8, made again": again,
                "MLP: gradient of the hidden layer in FP8, both layouts": 8 * small,
                "MLP: gradient of c_proj": matrix,
            },
            # In the norm's backward its own gradient is gone, and dx is written for the layer before in both FP8 layouts too.
            {
                "gradients of the stream and of the middle": 2 * x,
                "MLP: gradient of the hidden layer in FP8, both layouts": 8 * small,
                "MLP: gradient of x̂, dx": 2 * x,
                "MLP: x̂ᵀ in FP8, dx in both layouts": 3 * small,
                "MLP: gradients of c_fc and c_proj": 2 * matrix,
            },
        ),
    )


def _fused(precision: TEPrecision, batch: MicroBatch, layer: int) -> Block:
    """LayerNormLinear and LayerNormMLP of Transformer Engine 2.20, on chips whose FP8 GEMMs want transposes (all but 10.0).

    `module/layernorm_linear.py` drops the row-wise copy of the norm's output after forward, `layernorm_mlp.py` does not. The
    latter makes relu²'s transpose in forward for block scales only; for per-tensor ones in backward.
    """
    x, one = batch.x, fp8_bytes(precision.recipe)
    small = x * one / batch.itemsize  # one layout in FP8
    scaling = precision.recipe.fprop.left.scaling
    both = scaling not in ("delayed", "current")
    # dbias_dsrelu quantizes as it goes with these (`_get_act_func_supported_list`); with others its bf16 result exists too.
    in_one = scaling in ("delayed", "mx32")
    matrix = 4 * batch.shape.n_embd**2 * 2
    outer = {"gradients of the stream and of the middle": 2 * x, "MLP: its gradient in FP8, both layouts": 2 * small}
    transposed = 0 if both else 4 * small
    relu = "relu² in FP8" + (", both layouts" if both else "")
    return Block(
        _rope_and_attention(batch, layer)
        | {
            "the mixed stream": x,
            "x̂ in FP8": small,
            "attention's output in FP8": small,
            "1/rms of the stream, twice": batch.tokens * 8,
        },
        {
            "the MLP's input": x,
            "the MLP's x̂ in FP8, both layouts": 2 * small,
            "c_fc's output": 4 * x,
            relu: (8 if both else 4) * small,
            "1/rms of the MLP's input": batch.tokens * 4,
        },
        (
            outer
            | {
                "MLP: gradient of relu²": 4 * x,
                "MLP: relu² transposed": transposed,
                "MLP: gradient of c_proj": matrix,
            },
            # relu² is released once c_proj's gradient is there (clear_tensor_data).
            outer
            | {
                "MLP: gradient of relu²": 4 * x,
                "MLP: gradient of the hidden layer in bf16": 0 if in_one else 4 * x,
                "MLP: the same in FP8, both layouts": 8 * small,
                relu: -(8 if both else 4) * small,
                "MLP: gradient of c_proj": matrix,
            },
        ),
    )


def _separate(precision: TEPrecision, batch: MicroBatch, layer: int) -> Block:
    """te.Linear for each Linear, all else autograd's: the mix keeps its input, rms_norm the mix, relu what square keeps too."""
    x, one = batch.x, fp8_bytes(precision.recipe)
    small = x * one / batch.itemsize
    matrix = 4 * batch.shape.n_embd**2 * 2
    return Block(
        _rope_and_attention(batch, layer)
        | {
            "the stream before the mix": _before(batch, layer),
            "the mixed stream": x,
            "x̂ in FP8, for each projection": 3 * small,
            "x̂, of which a gate reads channels": x * batch.shape.has_value_embedding(layer),
            "attention's output in FP8": small,
            "1/rms of the stream": batch.tokens * 4,
        },
        {
            "the MLP's input": x,
            "the MLP's x̂ in FP8": small,
            "relu of c_fc's output": 4 * x,
            "relu² in FP8": 4 * small,
            "1/rms of the MLP's input": batch.tokens * 4,
        },
        (
            {
                "gradients of the stream and of the middle": 2 * x,
                "MLP: gradients of relu² and relu, and a product between": 12 * x,
                "relu² in FP8": -4 * small,  # c_proj is done with it
                "MLP: gradient of c_proj": matrix,
            },
        ),
    )
