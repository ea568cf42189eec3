"""Products with the weights of experts, and the whole layer."""

from __future__ import annotations

from typing import Any, Generic, cast

from moecore import _core
from moecore._core import QuantFormat
from moecore._frameworks import framework_of
from moecore.ops.arguments import FLOATS, as_format, check_dtype, check_least, dim, padded, traced_ops
from moecore.typing import DLPackTensor, StreamLike, TensorT


def grouped_gemm(
    x: TensorT,
    weights: DLPackTensor,
    expert_offsets: DLPackTensor,
    *,
    bias: DLPackTensor | None = None,
    row_token: DLPackTensor | None = None,
    activation: str | None = None,
    order: str = "gate_up",
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    row_weights: DLPackTensor | None = None,
    x_format: QuantFormat | str | None = None,
    x_scales: DLPackTensor | None = None,
    x_global_scale: DLPackTensor | None = None,
    weight_format: QuantFormat | str | None = None,
    weight_scales: DLPackTensor | None = None,
    weight_global_scale: DLPackTensor | None = None,
    out_dtype: str | None = None,
    out: TensorT | None = None,
    workspace: DLPackTensor | None = None,
    stream: StreamLike = None,
) -> TensorT:
    """out[r] = x[r] @ weights[e].T for the rows r of expert e, accumulated in f32 and rounded once.

    x [R,K], weights [E,N,K], expert_offsets i32 [E+1] -> [R,N]; one dtype of f32|bf16|f16. In this order:
    `row_weights` [R] multiply a row's product, `bias` [E,N] is added, `activation` (with `order`, `alpha`,
    `beta`, `limit` as in activate(), which are refused without one) is applied to the f32 result and halves
    the columns. With `row_token` i32 [R], row r reads x[row_token[r]] of x [T,K]. Rows from
    expert_offsets[E] on are left as they are: uninitialised without `out`.

    Quantised operands are codes (u8, fp4 with half the columns, or the element type) with a format and
    scales, which stand in the linear layout:

    ==============  ==================================  ==============================
    format          x_scales                            weight_scales
    ==============  ==================================  ==============================
    "fp8_tensor"    f32 [1,1]                           f32 [E]
    "fp8_token"     f32 [X,1]                           f32 [E,N]
    "fp8_block128"  f32 [X,K/128], or "column_major"    f32 [E,N/128,K/128]
    "mxfp8"         e8m0 [X,K/32]                       -
    "nvfp4"         e4m3 [X,K/16], global scale [1]     e4m3 [E,N,K/16], global [1]|[E]
    "mxfp4"         -                                   e8m0 [E,N,K/32]
    ==============  ==================================  ==============================

    x may be a float with any weights; fp8_tensor and fp8_token go with each other, fp8_block128 with itself,
    mxfp8 and nvfp4 with mxfp4 and nvfp4 weights. The result has x's dtype, or where x is quantised
    `out_dtype` (f32|bf16|f16, by default bf16).
    """
    check_dtype("grouped_gemm", "out_dtype", out_dtype, FLOATS)
    if (traced := traced_ops()) is not None:
        return traced.grouped_gemm(  # type: ignore[no-any-return]
            x,
            weights,
            expert_offsets,
            bias,
            row_token,
            activation,
            order,
            alpha,
            beta,
            limit,
            row_weights,
            x_format,
            x_scales,
            x_global_scale,
            weight_format,
            weight_scales,
            weight_global_scale,
            out_dtype,
            out,
        )
    fw = framework_of("grouped_gemm", "x", x)
    fw.admit("grouped_gemm", x, weights, bias, row_weights, x_scales, weight_scales)
    x_format, weight_format = as_format(x_format), as_format(weight_format)
    num_rows, n = dim(x if row_token is None else row_token, 0), dim(weights, 1)
    if out is None:
        shape = (num_rows, n if activation is None or order == "plain" else n // 2)
        out = fw.empty(x, shape, out_dtype if x_format is None else out_dtype or "bf16")
    if workspace is None and not fw.on_host(x):
        size = grouped_gemm_workspace_bytes(
            num_rows,
            n,
            _depth(weights, weight_format),
            dim(weights, 0),
            fw.dtype_name(out),
            fw.device(x),
            x_format,
            weight_format,
        )
        workspace = fw.empty(x, (size,), "u8")
    _core.grouped_gemm(
        x,
        weights,
        expert_offsets,
        out,
        bias=bias,
        row_token=row_token,
        activation=activation,
        order=order,
        alpha=alpha,
        beta=beta,
        limit=limit,
        row_weights=row_weights,
        x_format=x_format,
        x_scales=x_scales,
        x_global_scale=x_global_scale,
        weight_format=weight_format,
        weight_scales=weight_scales,
        weight_global_scale=weight_global_scale,
        workspace=workspace,
        stream=stream,
    )
    return fw.finish(out)  # type: ignore[no-any-return]


class Experts(Generic[TensorT]):
    """The weights of one layer's experts, and how to read them.

    w13 [E,2I,H] (order "plain": [E,I,H]), w2 [E,H,I], optional biases [E,2I] and [E,H] in f32 or the weights'
    dtype. `order` says how the gate and up rows stand in w13 and is never guessed: "gate_up", "up_gate",
    "interleaved", or "plain" for an activation without a gate. `transposed=True` takes w13 [E,H,2I] and w2
    [E,I,H] and packs them into new tensors; transpose_experts() does the same expert by expert into memory of
    the caller. `activation`, `alpha`, `beta` and `limit` are those of activate().

    Quantised weights: w13 and w2 are codes of `weight_format`, with scales (and for nvfp4 global scales) as
    grouped_gemm() takes them. That is how published checkpoints store them: docs/formats.md.
    """

    def __init__(
        self,
        w13: TensorT,
        w2: TensorT,
        *,
        order: str,
        transposed: bool = False,
        activation: str = "silu",
        alpha: float | None = None,
        beta: float | None = None,
        limit: float | None = None,
        w13_bias: TensorT | None = None,
        w2_bias: TensorT | None = None,
        weight_format: QuantFormat | str | None = None,
        w13_scales: TensorT | None = None,
        w2_scales: TensorT | None = None,
        w13_global_scale: TensorT | None = None,
        w2_global_scale: TensorT | None = None,
    ) -> None:
        if transposed and weight_format is not None:
            raise ValueError("Experts: transposed is True, expected False with a weight_format")
        self.w13 = transpose_experts(w13) if transposed else w13
        self.w2 = transpose_experts(w2) if transposed else w2
        self.order = order
        self.activation = activation
        self.alpha = alpha
        self.beta = beta
        self.limit = limit
        self.w13_bias = w13_bias
        self.w2_bias = w2_bias
        self.weight_format = weight_format
        self.w13_scales = w13_scales
        self.w2_scales = w2_scales
        self.w13_global_scale = w13_global_scale
        self.w2_global_scale = w2_global_scale

    @classmethod
    def from_gpt_oss(
        cls,
        gate_up_blocks: TensorT,
        gate_up_scales: TensorT,
        gate_up_bias: TensorT | None,
        down_blocks: TensorT,
        down_scales: TensorT,
        down_bias: TensorT | None,
    ) -> Experts[TensorT]:
        """The experts of a gpt-oss checkpoint, used where they lie.

        gate_up_proj_blocks u8 [E,2I,H/32,16], gate_up_proj_scales u8 [E,2I,H/32], down_proj_blocks u8
        [E,H,I/32,16], down_proj_scales u8 [E,H,I/32]; biases [E,2I] and [E,H] in f32 or the dtype of x.
        """
        w13, w2 = (
            cast(Any, blocks).reshape(*cast(Any, blocks).shape[:2], -1)
            for blocks in (gate_up_blocks, down_blocks)
        )
        return cls(
            w13,
            w2,
            order="interleaved",
            activation="swiglu_oai",
            w13_bias=gate_up_bias,
            w2_bias=down_bias,
            weight_format="mxfp4",
            w13_scales=gate_up_scales,
            w2_scales=down_scales,
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return dim(self.w13, 0)

    @property
    def hidden(self) -> int:
        """H."""
        return _depth(self.w13, as_format(self.weight_format))

    @property
    def inter(self) -> int:
        """I."""
        return _depth(self.w2, as_format(self.weight_format))

    def workspace_bytes(
        self,
        num_tokens: int,
        top_k: int,
        *,
        dtype: str | None = None,
        x_format: QuantFormat | str | None = None,
    ) -> int:
        """Bytes of workspace that fused_experts() needs for any routing of T tokens to K experts each.

        `dtype` is that of x: by default the weights', or bf16 where they are quantised.
        """
        fw = framework_of("Experts", "w13", self.w13)
        if dtype is None:
            dtype = fw.dtype_name(self.w13) if self.weight_format is None else "bf16"
        return fused_experts_workspace_bytes(
            num_tokens,
            top_k,
            self.num_experts,
            self.hidden,
            self.inter,
            dtype,
            fw.device(self.w13),
            x_format,
            self.weight_format,
        )

    def __repr__(self) -> str:
        return (
            f"moecore.Experts(num_experts={self.num_experts}, hidden={self.hidden}, inter={self.inter}, "
            f"order={self.order!r}, activation={self.activation!r}"
            + (f", weight_format={self.weight_format!r})" if self.weight_format is not None else ")")
        )


def fused_experts(
    x: TensorT,
    weights: DLPackTensor,
    ids: DLPackTensor,
    experts: Experts[TensorT],
    *,
    expert_map: DLPackTensor | None = None,
    first_expert: int = 0,
    apply_router_weight_on_input: bool = False,
    residual: DLPackTensor | None = None,
    x_format: QuantFormat | str | None = None,
    x_scale: DLPackTensor | None = None,
    inter_scale: DLPackTensor | None = None,
    out: TensorT | None = None,
    workspace: DLPackTensor | None = None,
    stream: StreamLike = None,
) -> TensorT:
    """The whole expert layer: plan, grouped_gemm + activation, grouped_gemm, finalize.

    x [T,H], weights f32|f16|bf16 [T,K], ids i32|i64 [T,K] -> [T,H]; x and the experts share one dtype of
    f32|bf16|f16, unless these are quantised. `expert_map`, `first_expert`: as in plan().
    `apply_router_weight_on_input` multiplies the first product by the router weight instead of weighting the
    sum. `residual` [T,H] is added in f32. On cuda a workspace of experts.workspace_bytes(T, K) bytes (with
    `dtype` and `x_format` as here) is allocated unless passed; on cpu each thread keeps its own.

    With an `x_format` that grouped_gemm() takes beside the format of the experts, x and the activated rows
    (in x's dtype) are quantised before each product. `x_scale` and `inter_scale` are the scales f32 [1,1] of
    "fp8_tensor_static" or the global scales f32 [1] of "nvfp4".
    """
    if (traced := traced_ops()) is not None:
        return traced.fused_experts(  # type: ignore[no-any-return]
            x,
            weights,
            ids,
            experts,
            expert_map,
            first_expert,
            apply_router_weight_on_input,
            residual,
            x_format,
            x_scale,
            inter_scale,
            out,
        )
    fw = framework_of("fused_experts", "x", x)
    fw.admit(
        "fused_experts",
        x,
        weights,
        experts.w13,
        experts.w2,
        experts.w13_bias,
        experts.w2_bias,
        experts.w13_scales,
        experts.w2_scales,
        residual,
    )
    x_format = as_format(x_format)
    if out is None:
        out = fw.empty(x, (dim(x, 0), dim(x, 1)))
    if workspace is None and not fw.on_host(x):
        size = experts.workspace_bytes(dim(ids, 0), dim(ids, 1), dtype=fw.dtype_name(x), x_format=x_format)
        workspace = fw.empty(x, (size,), "u8")
    _core.fused_experts(
        x,
        weights,
        ids,
        experts.w13,
        experts.w2,
        out,
        activation=experts.activation,
        order=experts.order,
        alpha=experts.alpha,
        beta=experts.beta,
        limit=experts.limit,
        w13_bias=experts.w13_bias,
        w2_bias=experts.w2_bias,
        expert_map=expert_map,
        first_expert=first_expert,
        apply_router_weight_on_input=apply_router_weight_on_input,
        residual=residual,
        x_format=x_format,
        x_scale=x_scale,
        inter_scale=inter_scale,
        weight_format=as_format(experts.weight_format),
        w13_scales=experts.w13_scales,
        w2_scales=experts.w2_scales,
        w13_global_scale=experts.w13_global_scale,
        w2_global_scale=experts.w2_global_scale,
        workspace=workspace,
        stream=stream,
    )
    return fw.finish(out)  # type: ignore[no-any-return]


def transpose_experts(src: TensorT, *, out: TensorT | None = None, stream: StreamLike = None) -> TensorT:
    """out[e,n,k] = src[e,k,n]: a transposed checkpoint's weights in the layout of Experts.

    [E,A,B] -> [E,B,A] of any dtype of 8 to 64 bits. With `out`, slices of experts (`src[e:e+1]`) convert a
    checkpoint one expert at a time without a second copy in memory.
    """
    if (traced := traced_ops()) is not None:
        return traced.transpose_experts(src, out)  # type: ignore[no-any-return]
    fw = framework_of("transpose_experts", "src", src)
    fw.admit("transpose_experts", src)
    if out is None:
        out = fw.empty(src, (dim(src, 0), dim(src, 2), dim(src, 1)))
    _core.transpose_experts(src, out, stream=stream)
    return fw.finish(out)  # type: ignore[no-any-return]


def _depth(weights: Any, format: QuantFormat | None) -> int:
    """Elements in a row of weights: a byte holds two of fp4, unless it was tagged as e2m1."""
    if format is None or not format.is_fp4:
        return dim(weights, 2)
    tagged = framework_of("grouped_gemm", "weights", weights).dtype_name(weights) == "e2m1"
    return dim(weights, 2) * (1 if tagged else 2)


def grouped_gemm_workspace_bytes(
    rows: int,
    n: int,
    k: int,
    num_experts: int,
    dtype: str,
    device: str = "cpu",
    x_format: QuantFormat | str | None = None,
    weight_format: QuantFormat | str | None = None,
) -> int:
    """Bytes of workspace that grouped_gemm() needs, at any alignment, for weights [num_experts, n, k].

    `dtype` is that of the result. ValueError for negative sizes.
    """
    check_least("grouped_gemm_workspace_bytes", 0, rows=rows, n=n, k=k, num_experts=num_experts)
    return padded(
        _core.grouped_gemm_workspace_bytes(
            rows, n, k, num_experts, dtype, device, as_format(x_format), as_format(weight_format)
        )
    )


def fused_experts_workspace_bytes(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inter: int,
    dtype: str,
    device: str = "cpu",
    x_format: QuantFormat | str | None = None,
    weight_format: QuantFormat | str | None = None,
) -> int:
    """Bytes of workspace that fused_experts() needs, at any alignment and for every routing.

    ValueError for negative sizes.
    """
    check_least(
        "fused_experts_workspace_bytes",
        0,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        hidden=hidden,
        inter=inter,
    )
    return padded(
        _core.fused_experts_workspace_bytes(
            num_tokens,
            top_k,
            num_experts,
            hidden,
            inter,
            dtype,
            device,
            as_format(x_format),
            as_format(weight_format),
        )
    )
