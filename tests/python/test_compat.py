"""The upstream signatures of moecore.compat, against torch formulations of upstream's semantics.

Grids follow the upstream suites (test_shuffle_rows, test_moe_permute_unpermute, test_moe_align_block_size,
test_fused_topk, test_grouped_topk, bench_prepare_moe_input).
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moecore.compat import sgl_kernel, vllm  # noqa: E402

DEVICES = ["cpu"]
if torch.cuda.is_available():
    import moecore

    if moecore.is_available("cuda"):
        DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def random_ids(num_tokens: int, num_experts: int, top_k: int, device: str) -> torch.Tensor:
    return torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k].int().to(device)


# ---- routing


@pytest.mark.parametrize("num_tokens", [1, 33, 56])
@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 3), (16, 4), (128, 8), (352, 4)])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_topk(device, num_tokens, num_experts, top_k, renormalize, scoring, dtype, id_dtype):
    logits = torch.randn(num_tokens, num_experts).to(device, dtype)
    weights = torch.empty(num_tokens, top_k, device=device)
    ids = torch.empty(num_tokens, top_k, device=device, dtype=id_dtype)
    indices = torch.empty(num_tokens, top_k, device=device, dtype=torch.int32)
    op = vllm.topk_softmax if scoring == "softmax" else vllm.topk_sigmoid
    op(weights, ids, indices, logits, renormalize)

    scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
    expected, _ = scores.topk(top_k)
    picked = scores.gather(1, ids.long())
    assert torch.equal(picked.sort(descending=True).values, picked)
    assert torch.allclose(picked, expected, rtol=1e-6)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(weights, expected, rtol=1e-5, atol=1e-7)
    t = torch.arange(num_tokens, device=device)[:, None]
    j = torch.arange(top_k, device=device)
    assert torch.equal(indices.long(), j * num_tokens + t)


def test_topk_padding_and_bias(device):
    logits = torch.randn(5, 16).to(device)
    weights, ids = torch.empty(5, 2, device=device), torch.empty(5, 2, device=device, dtype=torch.int32)
    indices = torch.empty_like(ids)
    bias = torch.zeros(16, device=device)
    bias[3] = 10
    padding = torch.tensor([False, True, False, False, True], device=device)
    vllm.topk_softmax(weights, ids, indices, logits, True, bias, padding)
    assert (ids[padding] == -1).all()
    assert weights.isfinite().all()
    assert (ids[~padding][:, 0] == 3).all()
    unbiased = logits.softmax(-1)
    picked = unbiased.gather(1, ids.clamp(min=0).long())
    expected = picked / picked.sum(-1, keepdim=True)
    assert torch.allclose(weights[~padding], expected[~padding], rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 33, 64])
@pytest.mark.parametrize(
    ("num_experts", "groups", "topk_group", "top_k"), [(256, 8, 4, 8), (64, 1, 1, 4), (128, 4, 2, 6)]
)
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("scoring_func", [0, 1])
def test_grouped_topk(device, num_tokens, num_experts, groups, topk_group, top_k, scale, scoring_func):
    logits = torch.randn(num_tokens, num_experts).to(device)
    bias = torch.randn(num_experts).to(device)
    given = logits if scoring_func else logits.sigmoid()
    weights, ids = vllm.grouped_topk(given, groups, topk_group, top_k, True, scale, bias, scoring_func)

    scores = logits.double().sigmoid()
    keys = (scores + bias.double()).view(num_tokens, groups, -1)
    rank = keys.topk(min(2, keys.shape[-1]), -1).values.sum(-1)
    best = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, rank.topk(topk_group).indices, True)
    masked = keys.masked_fill(~best[:, :, None], float("-inf")).view(num_tokens, -1)
    expected_ids = masked.topk(top_k).indices
    assert torch.equal(ids.long(), expected_ids)
    picked = scores.gather(1, expected_ids)
    expected = picked / picked.sum(-1, keepdim=True) * scale
    assert torch.allclose(weights.double(), expected, rtol=2e-5)
    if scoring_func:
        other = sgl_kernel.moe_fused_gate(logits, bias, groups, topk_group, top_k, 0, scale, True)
        assert torch.equal(other[0], weights)
        assert torch.equal(other[1], ids)


def test_fused_gate_appends_shared_experts(device):
    logits, bias = torch.randn(7, 32).to(device), torch.zeros(32, device=device)
    weights, ids = sgl_kernel.moe_fused_gate(logits, bias, 4, 2, 5, 1, 2.5)
    routed = sgl_kernel.moe_fused_gate(logits, bias, 4, 2, 4, 0, 2.5)
    assert torch.equal(weights[:, :4], routed[0])
    assert torch.equal(ids[:, :4], routed[1])
    assert (ids[:, 4] == 32).all()
    assert torch.allclose(weights[:, 4], torch.tensor(1 / 2.5, device=device))


def test_sgl_topk_softmax_caps_and_biases_the_logits(device):
    logits, bias = (torch.randn(9, 16) * 5).to(device), torch.randn(16).to(device)
    weights, ids = torch.empty(9, 4, device=device), torch.empty(9, 4, device=device, dtype=torch.int32)
    sgl_kernel.topk_softmax(weights, ids, logits, True, 3.0, bias)
    scores = (3 * torch.tanh(logits / 3) + bias).softmax(-1)
    picked, expected_ids = scores.topk(4)
    assert torch.equal(ids.long(), expected_ids)
    assert torch.allclose(weights, picked / picked.sum(-1, keepdim=True), rtol=1e-5)
    sgl_kernel.topk_sigmoid(weights, ids, logits, False, bias)
    assert torch.allclose(weights, logits.sigmoid().gather(1, ids.long()), rtol=1e-5)


# ---- bookkeeping


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 1024])
@pytest.mark.parametrize(("top_k", "num_experts"), [(2, 8), (4, 16), (8, 64)])
@pytest.mark.parametrize("scales", [False, True])
def test_moe_mm_data(device, num_tokens, top_k, num_experts, scales):
    n, k = 96, 160
    ids = random_ids(num_tokens, num_experts, top_k, device)
    routes = ids.numel()

    def i32(*shape: int) -> torch.Tensor:
        return torch.full(shape, -77, dtype=torch.int32, device=device)

    for op in (vllm.get_cutlass_moe_mm_data, sgl_kernel.prepare_moe_input):
        offsets, sizes1, sizes2 = i32(num_experts + 1), i32(num_experts, 3), i32(num_experts, 3)
        input_permutation, output_permutation = i32(routes), i32(routes)
        blockscale = i32(num_experts + 1) if scales else None
        op(ids, offsets, sizes1, sizes2, input_permutation, output_permutation, num_experts, n, k, blockscale)

        counts = torch.bincount(ids.flatten().long(), minlength=num_experts)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        assert torch.equal(offsets.long(), torch.cat([zero, counts.cumsum(0)]))
        if blockscale is not None:
            padded = (counts + 127) // 128 * 128
            assert torch.equal(blockscale.long(), torch.cat([zero, padded.cumsum(0)]))
        swap = op is vllm.get_cutlass_moe_mm_data and blockscale is None and routes <= 64
        for sizes, wide, depth in ((sizes1, 2 * n, k), (sizes2, k, n)):
            rows, columns = (sizes[:, 1], sizes[:, 0]) if swap else (sizes[:, 0], sizes[:, 1])
            assert torch.equal(rows.long(), counts)
            assert (columns == wide).all()
            assert (sizes[:, 2] == depth).all()
        order = torch.argsort(ids.flatten(), stable=True)
        assert torch.equal(input_permutation.long(), order // top_k)
        assert torch.equal(output_permutation.long(), torch.argsort(order))


@pytest.mark.parametrize("num_tokens", [1, 3, 256, 2256])
@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 32), (2, 160), (16, 257)])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("mapped", [False, True])
def test_moe_align_block_size(device, num_tokens, top_k, num_experts, block_size, mapped):
    ids = random_ids(num_tokens, num_experts, top_k, device)
    expert_map = None
    if mapped:
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
        expert_map[::2] = torch.arange((num_experts + 1) // 2, dtype=torch.int32, device=device)
    capacity = ids.numel() + num_experts * (block_size - 1)
    sorted_ids = torch.empty(capacity, dtype=torch.int32, device=device)
    expert_ids = torch.empty((capacity + block_size - 1) // block_size, dtype=torch.int32, device=device)
    post_pad = torch.empty(1, dtype=torch.int32, device=device)
    vllm.moe_align_block_size(ids, num_experts, block_size, sorted_ids, expert_ids, post_pad, expert_map)

    expected, owners = [], []
    local = ids.flatten().cpu() if expert_map is None else expert_map.cpu()[ids.flatten().cpu().long()]
    for e in range(num_experts):
        routes = (local == e).nonzero().flatten().tolist()
        blocks = -(-len(routes) // block_size)
        expected += routes + [ids.numel()] * (blocks * block_size - len(routes))
        owners += [e] * blocks
    total = int(post_pad.item())
    assert total == len(expected)
    assert sorted_ids[:total].tolist() == expected
    assert (sorted_ids[total:] == ids.numel()).all()
    assert expert_ids[: len(owners)].tolist() == owners
    assert (expert_ids[len(owners) :] == -1).all()
    if not mapped:
        again = torch.empty_like(sorted_ids)
        sgl_kernel.moe_align_block_size(ids, num_experts + 1, block_size, again, expert_ids, post_pad)
        assert torch.equal(again, sorted_ids)


# ---- rows


@pytest.mark.parametrize("num_tokens", [1, 16, 256])
@pytest.mark.parametrize("hidden", [1, 17, 128, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_shuffle_rows(device, num_tokens, hidden, dtype):
    x = torch.randn(num_tokens, hidden).to(device).to(dtype)
    maps = [
        torch.arange(num_tokens),
        torch.randperm(num_tokens),
        torch.arange(num_tokens).repeat_interleave(3),
        torch.randint(-3, num_tokens + 3, (2 * num_tokens,)),
        torch.arange(num_tokens).flip(0),
        torch.empty(0, dtype=torch.int64),
    ]
    for index in maps:
        index = index.to(device)
        valid = (index >= 0) & (index < num_tokens)
        expected = x.view(torch.uint8)[index.clamp(0, num_tokens - 1)]
        expected[~valid] = 0
        assert torch.equal(vllm.shuffle_rows(x, index.int()).view(torch.uint8), expected)
        shape = (index.numel(), hidden)
        assert torch.equal(sgl_kernel.shuffle_rows(x, index, shape).view(torch.uint8), expected)


@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 2048), (33, 7168), (500, 2048)])
@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 2), (64, 6)])
@pytest.mark.parametrize("ep_size", [1, 4])
def test_moe_permute_unpermute(device, num_tokens, hidden, num_experts, top_k, ep_size):
    x = torch.randn(num_tokens, hidden).to(device, torch.bfloat16)
    ids = random_ids(num_tokens, num_experts, top_k, device)
    weights = torch.rand(num_tokens, top_k).to(device)
    local = num_experts // ep_size
    expert_map = None
    if ep_size > 1:
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
        expert_map[local : 2 * local] = torch.arange(local, dtype=torch.int32, device=device)
    scale = torch.rand(num_tokens, 4).to(device)
    rows, row_scale, offsets, inverse, permuted = vllm.moe_permute(
        x, scale, ids, num_experts, local if ep_size > 1 else -1, expert_map
    )
    key = ids.flatten().long() if expert_map is None else expert_map[ids.long()].flatten().long()
    live = key >= 0
    order = torch.argsort(torch.where(live, key, num_experts), stable=True)[: int(live.sum())]
    valid = order.numel()
    assert offsets.dtype == torch.int64
    assert int(offsets[-1]) == valid
    counts = torch.bincount(key[live], minlength=local if ep_size > 1 else num_experts)
    assert torch.equal(offsets.diff(), counts)
    assert torch.equal(rows[:valid], x[order // top_k])
    assert (rows[valid:] == 0).all()
    assert torch.equal(row_scale[:valid], scale[order // top_k])
    assert torch.equal(permuted[:valid].long(), order)
    assert (permuted[valid:] == ids.numel()).all()
    assert torch.equal(inverse.flatten()[order].long(), torch.arange(valid, device=device))

    out = torch.full_like(x, float("nan"))
    vllm.moe_unpermute(out, rows, weights, inverse, offsets)
    dense = torch.zeros(num_tokens * top_k, hidden, dtype=torch.float64, device=device)
    dense[order] = rows[:valid].double()
    expected = (dense.view(num_tokens, top_k, hidden) * weights.double()[:, :, None]).sum(1)
    assert torch.allclose(out.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden"), [(512, 2, 4096), (33, 4, 1000), (7, 8, 5), (0, 2, 8)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_apply_shuffle_mul_sum(device, num_tokens, top_k, hidden, dtype):
    rows = torch.randn(num_tokens * top_k, hidden).to(device, dtype)
    permutation = torch.randperm(num_tokens * top_k).int().to(device)
    factors = torch.rand(num_tokens, top_k).to(device, dtype)
    out = torch.full((num_tokens, hidden), float("nan"), dtype=dtype, device=device)
    gathered = rows[permutation.long()].view(num_tokens, top_k, hidden).double()
    tolerance = {"rtol": 2.0**-7 if dtype == torch.bfloat16 else 2.0**-9, "atol": 1e-5}
    sgl_kernel.apply_shuffle_mul_sum(rows, out, permutation, factors.flatten())
    assert torch.allclose(out.double(), (gathered * factors.double()[:, :, None]).sum(1), **tolerance)
    sgl_kernel.apply_shuffle_mul_sum(rows, out, permutation)
    assert torch.allclose(out.double(), gathered.sum(1), **tolerance)


def test_moe_sum(device):
    x = torch.randn(17, 4, 100).to(device)
    out = torch.empty(17, 100, device=device)
    vllm.moe_sum(x, out)
    assert torch.allclose(out, x.sum(1), atol=1e-5)
    sgl_kernel.moe_sum(x, out)
    assert torch.allclose(out, x.sum(1), atol=1e-5)
    ids = torch.randint(-1, 6, (17, 4)).to(device)
    expert_map = torch.tensor([0, -1, 1, -1, 2, 3], device=device, dtype=torch.int32)
    vllm.moe_sum(x, out, ids, expert_map)
    live = (ids >= 0) & (expert_map[ids.clamp(min=0)] >= 0)
    assert torch.allclose(out, (x * live[:, :, None]).sum(1), atol=1e-5)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations(device, kind):
    x = torch.randn(3, 5, 64).to(device)
    op = {
        "silu": sgl_kernel.silu_and_mul,
        "gelu": sgl_kernel.gelu_and_mul,
        "gelu_tanh": sgl_kernel.gelu_tanh_and_mul,
    }
    gate, up = x.double().chunk(2, -1)
    act = torch.nn.functional.silu(gate) if kind == "silu" else None
    if act is None:
        act = torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    assert torch.allclose(op[kind](x).double(), act * up, rtol=1e-5, atol=1e-6)
