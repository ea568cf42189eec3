"""moecore.integrations.transformers: whole tiny models, and every experts class of transformers."""

from __future__ import annotations

import copy
import importlib
import re
import time
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moecore  # noqa: E402
import moecore.integrations.transformers as integration  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # transformers and torch warn on their own account


# --- Whole models ---

COMMON = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def mixtral():
    config = transformers.MixtralConfig(
        **COMMON, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **COMMON,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        **COMMON,
        head_dim=16,
        intermediate_size=64,
        num_local_experts=8,
        num_experts_per_tok=4,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    return transformers.GptOssForCausalLM(config)


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    return transformers.DeepseekV3ForCausalLM(config)


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss, "deepseek_v3": deepseek_v3}


def build(name, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = MODELS[name]().eval().to(dtype)
    with torch.no_grad():  # biases and routers start at zero: make them matter
        for parameter_name, p in model.named_parameters():
            if p.abs().sum() == 0 or parameter_name.endswith("bias"):
                p.normal_(0, 0.02)
    return model


def logits(model, implementation, tokens):
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        return model(tokens).logits.double()


@pytest.fixture
def calls(monkeypatch):
    """How often the experts function runs."""
    count = []

    def counted(*args):
        count.append(args[0])
        return integration.experts_forward(*args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "moecore", counted)
    return count


@pytest.mark.parametrize("name", MODELS)
def test_f32_logits_match_eager(name, calls):
    model = build(name)
    tokens = torch.randint(0, 257, (2, 17))
    expected = logits(model, "eager", tokens)
    actual = logits(model, "moecore", tokens)
    sparse_layers = 1 if name == "deepseek_v3" else 2
    assert len(calls) == sparse_layers
    assert (actual - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_is_identical(name):
    model = build(name)
    prompt = torch.randint(0, 257, (1, 9))
    made = {}
    for implementation in ("eager", "moecore"):
        model.set_experts_implementation(implementation)
        made[implementation] = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(made["eager"], made["moecore"])


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("name", MODELS)
def test_bf16_layer_is_closer_to_the_truth_than_the_built_in_ones(name):
    """moecore rounds to bf16 twice where they round at every step, and all are measured against float64."""
    squares = dict.fromkeys(("eager", "grouped_mm", "moecore"), 0.0)
    for seed in range(4):
        model = build(name, seed, torch.bfloat16)
        experts = next(m for m in model.modules() if hasattr(m, "is_transposed"))
        exact = copy.deepcopy(experts).double()
        x = torch.randn(64, COMMON["hidden_size"], dtype=torch.bfloat16)
        weights, ids = torch.randn(64, experts.num_experts).softmax(-1).topk(4)
        weights = weights.bfloat16()
        with torch.no_grad():
            exact.config = copy.copy(experts.config)
            exact.config._experts_implementation = "eager"
            truth = exact(x.double(), ids, weights.double())
            for implementation in squares:
                experts.config._experts_implementation = implementation
                y = experts(x, ids, weights)
                assert y.dtype == torch.bfloat16
                squares[implementation] += rms(y.double() - truth) ** 2
    assert squares["moecore"] <= min(squares["eager"], squares["grouped_mm"])


@pytest.mark.parametrize("name", MODELS)
def test_bf16_logits_are_as_close_to_f32_as_grouped_mm(name):
    """In a whole bf16 model attention and the head dominate, so that all implementations are equally far.

    Equally: a single token that rounds to another expert moves the distance by more than the implementations
    differ. They are pooled over eight models, and 1 % is left to chance. The distances to eager itself are no
    measure, since eager and grouped_mm share their roundings of gate and up, which moecore does not make.
    """
    squares = dict.fromkeys(("eager", "grouped_mm", "moecore"), 0.0)
    for seed in range(8):
        model = build(name, seed, torch.bfloat16)
        tokens = torch.randint(0, 257, (2, 17))
        truth = logits(copy.deepcopy(model).float(), "eager", tokens)
        for implementation in squares:
            squares[implementation] += rms(logits(model, implementation, tokens) - truth) ** 2
    assert squares["moecore"] ** 0.5 <= 1.01 * max(squares["eager"], squares["grouped_mm"]) ** 0.5


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="before torch 2.13 assume_constant_result takes no module as an argument",
)
@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_graph_breaks(name):
    model = build(name)
    tokens = torch.randint(0, 257, (2, 17))
    expected = logits(model, "eager", tokens)
    model.set_experts_implementation("moecore")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(tokens, use_cache=False).logits.double()
    assert (actual - expected).abs().max() <= 1e-5


# --- Every experts class ---


class StubConfig:
    """The fields that experts classes of transformers 5.18 read."""

    _experts_implementation = "eager"
    hidden_size = moe_hidden_size = 64
    intermediate_size = moe_intermediate_size = expert_intermediate_size = expert_dim = 48
    num_local_experts = num_experts = n_routed_experts = moe_num_experts = 8
    num_experts_per_tok = top_k_experts = moe_topk = 2
    moe_num_shared_experts = zero_expert_num = 0
    moe_latent_size = None
    use_bias = mlp_bias = False
    rms_norm_eps = 1e-6
    swiglu_limit, swiglu_alpha, swiglu_beta = 7.0, 1.702, 1.0

    def __init__(self, activation):
        self.hidden_act = self.hidden_activation = self.activation_function = activation
        self.mlp_hidden_act = "relu2"


def experts_classes():
    found = []
    for path in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        text = path.read_text()
        for name in re.findall(r"@use_experts_implementation(?:\([^\n]*\))?\nclass (\w+)\(", text):
            module = f"transformers.models.{path.parent.name}.{path.stem}"
            found.append(pytest.param(module, name, id=f"{path.parent.name}-{name}"))
    return found


CLASSES = experts_classes()
REFUSED: set[str] = set()  # classes of transformers 5.18 whose activation moecore lacks: none


def build_experts(module, name, activation="silu", seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = getattr(importlib.import_module(module), name)
    torch.manual_seed(seed)
    experts = cls(StubConfig(activation)).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.requires_grad_(False)


def run(experts, implementation, *inputs):
    experts.config._experts_implementation = implementation
    with torch.no_grad():
        return experts(*inputs)


def test_transformers_has_the_classes_that_were_counted():
    if transformers.__version__ == "5.18.0":
        assert len(CLASSES) == 56


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("module", "name"), CLASSES)
def test_class_matches_eager(module, name, activation):
    experts = build_experts(module, name, activation)
    x = 3 * torch.randn(11, 64)  # beyond the limits of the classes that clamp
    weights, ids = torch.randn(11, 8).softmax(-1).topk(2)
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=name):
            run(experts, "moecore", x, ids, weights)
        return
    expected = run(experts, "eager", x, ids, weights)
    actual = run(experts, "moecore", x, ids, weights)
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


MIXTRAL = ("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")
GPT_OSS = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")

KNOWN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


@pytest.mark.parametrize("activation", sorted(transformers.activations.ACT2FN))
def test_every_activation_is_recognised_or_refused(activation):
    experts = build_experts(*MIXTRAL, activation)
    x, ids, weights = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    if activation not in KNOWN_ACTIVATIONS:
        with pytest.raises(NotImplementedError, match=r"MixtralExperts.*set_experts_implementation"):
            run(experts, "moecore", x, ids, weights)
        return
    assert integration._describe(experts).kind == KNOWN_ACTIVATIONS[activation]
    expected = run(experts, "eager", x, ids, weights)
    assert (run(experts, "moecore", x, ids, weights) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_an_unknown_gate_is_refused_by_name():
    experts = build_experts(*MIXTRAL)

    class ShiftedExperts(type(experts)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate) * (up + 1e-3)

    experts.__class__ = ShiftedExperts
    with pytest.raises(NotImplementedError, match=r"ShiftedExperts .*its own _apply_gate"):
        run(experts, "moecore", torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


def test_a_new_activation_on_a_known_module_is_seen():
    experts = build_experts(*MIXTRAL)
    x, ids, weights = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    before = run(experts, "moecore", x, ids, weights)
    experts.act_fn = torch.nn.ReLU()
    after = run(experts, "moecore", x, ids, weights)
    assert not torch.equal(before, after)
    assert (after - run(experts, "eager", x, ids, weights)).abs().max() <= 1e-4


# --- Inputs ---


@pytest.mark.parametrize("layer", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_tokens(layer, dtype):
    experts = build_experts(*layer).to(dtype)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    y = run(experts, "moecore", torch.zeros(0, 64, dtype=dtype), ids, torch.zeros(0, 2))
    assert y.shape == (0, 64)
    assert y.dtype == dtype


def test_sentinel_ids_of_expert_parallelism_are_dropped():
    experts = build_experts(*MIXTRAL)
    x, weights = torch.randn(6, 64), torch.rand(6, 2)
    ids = torch.randint(0, 8, (6, 2))
    dropped = torch.zeros(6, 2, dtype=torch.bool)
    dropped[:, 1] = True
    dropped[3] = True
    sentinels = torch.where(dropped, 8, ids)
    expected = run(experts, "moecore", x, ids, torch.where(dropped, 0.0, weights))
    poisoned = torch.where(dropped, torch.nan, weights)  # a dropped slot's weight must not be read either
    actual = run(experts, "moecore", x, sentinels, poisoned)
    assert torch.equal(actual, expected)
    assert (actual[3] == 0).all()


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_router_outputs_of_other_dtypes(weights_dtype, ids_dtype):
    experts = build_experts(*MIXTRAL)
    x, ids = torch.randn(6, 64), torch.randint(0, 8, (6, 2))
    weights = torch.rand(6, 2).to(torch.bfloat16)
    expected = run(experts, "moecore", x, ids, weights.float())
    assert torch.equal(run(experts, "moecore", x, ids.to(ids_dtype), weights.to(weights_dtype)), expected)


def test_f32_states_on_bf16_weights_as_under_autocast():
    experts = build_experts(*MIXTRAL).bfloat16()
    x, ids, weights = torch.randn(6, 64), torch.randint(0, 8, (6, 2)), torch.rand(6, 2)
    y = run(experts, "moecore", x, ids, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, run(experts, "moecore", x.bfloat16(), ids, weights).float())


def test_strided_states():
    experts = build_experts(*MIXTRAL)
    x, ids, weights = torch.randn(6, 64), torch.randint(0, 8, (6, 2)), torch.rand(6, 2)
    expected = run(experts, "moecore", x, ids, weights)
    rows = torch.zeros(6, 100)
    rows[:, 10:74] = x
    assert torch.equal(run(experts, "moecore", rows[:, 10:74], ids, weights), expected)
    assert torch.equal(run(experts, "moecore", x.t().contiguous().t(), ids, weights), expected)
    assert torch.equal(
        run(experts, "moecore", x, ids.t().contiguous().t(), weights.t().contiguous().t()), expected
    )


def test_float64_weights_are_refused():
    experts = build_experts(*MIXTRAL).double()
    with pytest.raises(NotImplementedError, match=r"MixtralExperts\.gate_up_proj .*float64"):
        run(experts, "moecore", torch.randn(2, 64).double(), torch.zeros(2, 1).long(), torch.ones(2, 1))


def test_gradients_are_refused():
    experts = build_experts(*MIXTRAL)
    experts.config._experts_implementation = "moecore"
    x, ids, weights = torch.randn(2, 64), torch.zeros(2, 1).long(), torch.ones(2, 1)
    experts(x, ids, weights)  # grad mode alone is no reason
    with pytest.raises(RuntimeError, match="MixtralExperts forward only"):
        experts(x.requires_grad_(), ids, weights)
    experts.requires_grad_(True)
    with pytest.raises(RuntimeError, match="MixtralExperts forward only"):
        experts(x.detach(), ids, weights)
    with torch.inference_mode():
        experts(x.detach(), ids, weights)


# --- Weights ---


def test_plain_weights_are_used_in_place_and_changes_are_seen():
    experts = build_experts(*MIXTRAL)
    x, ids, weights = torch.randn(6, 64), torch.randint(0, 8, (6, 2)), torch.rand(6, 2)
    packed = len(integration._packed)
    run(experts, "moecore", x, ids, weights)
    assert len(integration._packed) == packed
    experts.gate_up_proj.data.mul_(0.5)
    expected = run(experts, "eager", x, ids, weights)
    assert (run(experts, "moecore", x, ids, weights) - expected).abs().max() <= 1e-4


def test_transposed_weights_are_packed_once_until_they_change():
    experts = build_experts(*GPT_OSS)
    x, ids, weights = torch.randn(6, 64), torch.randint(0, 8, (6, 2)), torch.rand(6, 2)

    def check(experts):
        expected = run(experts, "eager", x, ids, weights)
        actual = run(experts, "moecore", x, ids, weights)
        assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()

    integration._packed.clear()
    check(experts)
    first = [p.tensor for p in integration._packed.values()]
    assert len(first) == 2
    check(experts)
    assert all(a is b.tensor for a, b in zip(first, integration._packed.values(), strict=True))
    with torch.no_grad():
        experts.gate_up_proj.mul_(1.5)  # in place: another version
    check(experts)
    experts.down_proj.data = torch.randn_like(experts.down_proj)  # another storage
    check(experts)
    experts.gate_up_proj.data.mul_(0.5)  # uncounted
    integration.repack()
    check(experts)
    experts.to(torch.bfloat16)
    run(experts, "moecore", x.bfloat16(), ids, weights)
    del experts, first
    run(build_experts(*GPT_OSS, seed=1), "moecore", x, ids, weights)
    assert sum(not p.storage.expired() for p in integration._packed.values()) == 0
    integration._packed.clear()


def test_registering_again_changes_nothing():
    integration.register()
    integration.register()
    assert ALL_EXPERTS_FUNCTIONS["moecore"] is integration.experts_forward


# --- Speed ---


def test_not_slower_than_grouped_mm_by_an_order_of_magnitude():
    """A sanity check that the fast path runs, with room for noise; bench/ compares seriously."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = StubConfig("silu")
    config.hidden_size, config.moe_intermediate_size, config.num_experts = 1024, 384, 32
    experts = Qwen3MoeExperts(config).bfloat16().requires_grad_(False)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(64, 1024).bfloat16()
    weights, ids = torch.randn(64, 32).softmax(-1).topk(4)
    seconds = {}
    for implementation in ("grouped_mm", "moecore"):
        run(experts, implementation, x, ids, weights)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(experts, implementation, x, ids, weights)
            times.append(time.perf_counter() - start)
        seconds[implementation] = min(times)
    assert seconds["moecore"] < 10 * seconds["grouped_mm"]


# --- FP8 ---


def fp8_weights(w):
    """e4m3 codes and the scales of 128 x 128 blocks, as an FP8 checkpoint holds them."""
    e, n, k = w.shape
    blocks = w.view(e, n // 128, 128, k // 128, 128)
    scale = blocks.abs().amax((2, 4)) / 448
    codes = (blocks / scale[:, :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(e, n, k), scale


def fp8_model(activation="silu"):
    """A small Qwen3-MoE whose experts are FP8Experts, and the same with their weights dequantised."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "ALL_FP8_EXPERTS_FUNCTIONS"):
        pytest.skip("this transformers has no interface for FP8 experts")
    from transformers.integrations.moe import use_experts_implementation

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **{**COMMON, "hidden_size": 256},
        head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        hidden_act=activation,
    )
    exact = transformers.Qwen3MoeForCausalLM(config).eval()
    model = copy.deepcopy(exact)
    experts_class = use_experts_implementation(
        experts_class=type("FP8TestExperts", (fp8.FP8Experts,), {}),
        experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS,
    )
    for layer, other in zip(model.model.layers, exact.model.layers, strict=True):
        old, new = layer.mlp.experts, experts_class(config=model.config, block_size=(128, 128))
        for name in ("gate_up_proj", "down_proj"):
            codes, scale = fp8_weights(getattr(old, name).data)
            setattr(new, name, torch.nn.Parameter(codes, requires_grad=False))
            setattr(new, f"{name}_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
            wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
            getattr(other.mlp.experts, name).data = codes.float() * wide
        layer.mlp.experts = new
    return model, exact


@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_experts(compiled):
    model, exact = fp8_model()
    tokens = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(1))
    model.set_experts_implementation("moecore")
    with torch.no_grad():
        expected = exact(tokens).logits
        run_model = torch.compile(model, backend="aot_eager") if compiled else model
        actual = run_model(tokens).logits
    # What is left is the quantisation of the activations: e4m3 keeps 2^-4 of a block's largest magnitude.
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_fp8_experts_quantise_activations_in_blocks():
    model, _ = fp8_model("gelu_pytorch_tanh")
    experts = model.model.layers[0].mlp.experts
    experts.config._experts_implementation = "moecore"
    x, weights = torch.randn(9, 256).bfloat16(), torch.rand(9, 2)
    ids = torch.randint(0, 9, (9, 2))  # 8 is the sentinel
    with torch.no_grad():
        out = experts(x, ids, weights)
    layer = moecore.Experts(
        experts.gate_up_proj.data,
        experts.down_proj.data,
        order="gate_up",
        activation="gelu_tanh",
        weight_format="fp8_block128",
        w13_scales=experts.gate_up_proj_scale_inv.data,
        w2_scales=experts.down_proj_scale_inv.data,
    )
    assert torch.equal(out, moecore.fused_experts(x, weights, ids, layer, x_format="fp8_block128"))


def test_fp8_experts_that_have_no_path_are_refused():
    model, _ = fp8_model()
    experts = model.model.layers[0].mlp.experts
    experts.config._experts_implementation = "moecore"
    experts.block_size = (64, 64)
    inputs = torch.randn(2, 256), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=r"block_size is \(64, 64\), expected \(128, 128\)"),
    ):
        experts(*inputs)
    experts.block_size, experts.activation_scheme = (128, 128), "static"
    with torch.no_grad(), pytest.raises(NotImplementedError, match="activation_scheme is static"):
        experts(*inputs)
