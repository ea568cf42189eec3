"""Upstream names and signatures over moecore's ops, so that an engine switches by an import.

`moecore.compat.vllm` stands in for `vllm._custom_ops` and vLLM's moe_permute_unpermute module,
`moecore.compat.sgl_kernel` for `sgl_kernel`. Each function is a thin adapter without kernels of its own and
takes torch tensors on CPU or CUDA. Where moecore's bits differ from upstream's on purpose, docs/compat.md
says how and why.
"""
