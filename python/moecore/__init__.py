"""moecore: the Mixture-of-Experts data path on CPU and CUDA, for tensors of any DLPack framework."""

from __future__ import annotations

from moecore import _core
from moecore._core import (
    BackendError,
    get_num_threads,
    measure_roof,
    release_scratch,
    set_num_threads,
    supported,
)
from moecore.config import (
    cmake_dir,
    cpu_features,
    cuda_archs,
    include_dir,
    is_available,
    show_config,
)
from moecore.ops import (
    OPS,
    Experts,
    Plan,
    activate,
    explain,
    finalize,
    finalize_quantize,
    fused_experts,
    fused_experts_workspace_bytes,
    grouped_gemm,
    grouped_gemm_workspace_bytes,
    permute,
    plan,
    plan_workspace_bytes,
    route,
    route_plan,
    shuffle_rows,
    transpose_experts,
    view_as,
)
from moecore.quantization import (
    QuantFormat,
    Quantized,
    convert_scales,
    dequantize,
    expert_scale_rows,
    global_scale,
    quantize,
)

BackendError.__module__ = "moecore"
__version__: str = _core.version()

__all__ = [
    "OPS",
    "BackendError",
    "Experts",
    "Plan",
    "QuantFormat",
    "Quantized",
    "__version__",
    "activate",
    "cmake_dir",
    "convert_scales",
    "cpu_features",
    "cuda_archs",
    "dequantize",
    "expert_scale_rows",
    "explain",
    "finalize",
    "finalize_quantize",
    "fused_experts",
    "fused_experts_workspace_bytes",
    "get_num_threads",
    "global_scale",
    "grouped_gemm",
    "grouped_gemm_workspace_bytes",
    "include_dir",
    "is_available",
    "measure_roof",
    "permute",
    "plan",
    "plan_workspace_bytes",
    "quantize",
    "release_scratch",
    "route",
    "route_plan",
    "set_num_threads",
    "show_config",
    "shuffle_rows",
    "supported",
    "transpose_experts",
    "view_as",
]
