"""Facts about SG-Former's attentions and blocks."""

import pytest
import torch
from torch import Tensor, nn

from gridattn.layers.hybrid_scale import GuidedAttention, HybridScaleAttention, LepeAttention
from gridattn.layers.self_guided import (
    SelfGuidedAttention,
    SelfGuidedBlock,
    SelfGuidedPair,
    convert_official_attention,
    convert_official_block,
)


def zero(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def test_where_patches_fill_the_grid_padding_and_cropping_are_the_same() -> None:
    padded = HybridScaleAttention(16, 4, reduction=4).eval()
    cropped = HybridScaleAttention(16, 4, reduction=4, border="crop").eval()
    cropped.load_state_dict(padded.state_dict())
    for grid, same in (((8, 12), True), ((8, 10), False)):
        x = torch.randn(2, *grid, 16)
        (y, s), (expected, expected_map) = (layer(x, return_significance=True) for layer in (padded, cropped))
        assert torch.allclose(y, expected) == same
        assert torch.allclose(s, expected_map) == same


def test_a_grid_shorter_than_a_patch_has_one_coarse_key() -> None:
    layer = HybridScaleAttention(16, 4, reduction=8, border="crop").eval()
    assert layer._patches(torch.randn(1, 3, 17, 16)).shape == (1, 1, 2, 16)


def test_in_front_of_the_projection_coarse_heads_come_first_and_window_heads_last() -> None:
    layer = HybridScaleAttention(16, 4, reduction=2, window_size=2).eval()
    zero(layer.lepe)
    nn.init.eye_(layer.proj.weight)
    nn.init.zeros_(layer.proj.bias)
    x = torch.randn(1, 6, 6, 16)
    other = x.clone()
    other[0, 4:, 4:] += 1.0
    changed = (layer(other) - layer(x))[0, 0, 0]
    assert (changed[:8] != 0).all()
    assert (changed[8:] == 0).all()


def test_no_gradient_flows_through_the_significance_map() -> None:
    layer = SelfGuidedAttention(16, 4, reduction=4)
    zero(layer.hybrid.proj)  # nothing of the hybrid layer arrives but its map
    layer(torch.randn(1, 14, 14, 16)).sum().backward()
    for projection in (layer.hybrid.q, layer.hybrid.kv_coarse, layer.hybrid.kv_local, layer.hybrid.patch):
        assert projection.weight.grad is not None
        assert not projection.weight.grad.any()


def test_the_ranking_of_the_hybrid_layer_decides_what_the_guided_layer_attends_to() -> None:
    torch.manual_seed(1)
    layer = SelfGuidedAttention(16, 4, reduction=4).eval()
    zero(layer.hybrid.proj)
    x = torch.randn(1, 14, 14, 16)
    before = layer(x)
    with torch.no_grad():
        layer.hybrid.q.weight.neg_()
    assert (layer(x) - before).abs().max() > 1e-3


def test_guided_attention_to_equal_tokens_gives_every_position_their_value() -> None:
    layer = GuidedAttention(16, 4, reduction=4)
    zero(layer.attention.lepe)
    for sums in layer.aggregate:
        assert isinstance(sums, nn.Linear)
        nn.init.constant_(sums.weight, 1 / sums.in_features)
        nn.init.zeros_(sums.bias)
    token = torch.randn(16)
    y = layer(token.expand(2, 14, 14, 16), torch.rand(2, 14, 14))
    value = layer.attention.kv(token)[16:]
    torch.testing.assert_close(y, layer.attention.proj(value).expand_as(y))


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_guided_layers_own_sums_and_hybrid_layers_own_patches(reduction) -> None:
    guided, hybrid = GuidedAttention(16, 4, reduction=reduction), HybridScaleAttention(16, 4, reduction=reduction)
    sizes = {8: [196, 56, 28], 4: [49, 14, 7], 2: [2, 1]}[reduction]
    assert [tuple(t.shape) for n, t in guided.named_parameters() if n.startswith("aggregate") and t.ndim == 2] == [
        (1, size) for size in sizes
    ]
    assert hybrid.patch.weight.shape == (16, 16, reduction, reduction)
    assert not any("aggregate" in name for name, _ in hybrid.named_parameters())


def test_a_pair_equals_its_two_blocks_one_after_the_other() -> None:
    pair = SelfGuidedPair(16, 4, reduction=4).eval()
    x = torch.randn(2, 7, 9, 16)
    y, significance = pair(x, return_significance=True)
    middle, again = pair.hybrid(x, return_significance=True)
    assert torch.equal(significance, again)
    torch.testing.assert_close(y, pair.guided(middle, significance=significance))
    assert torch.equal(pair(x), y)


def test_a_plain_block_returns_one_tensor() -> None:
    block = SelfGuidedBlock(LepeAttention(16, 4), 16, mlp_ratio=2).eval()
    assert isinstance(block(torch.randn(1, 5, 5, 16)), Tensor)


def official(kind: str, dim: int = 8) -> dict[str, Tensor]:
    shapes = {"lepe_linear": (dim, dim), "lepe_conv": (dim, 1, 3, 3), "proj": (dim, dim)}
    if kind == "hybrid":
        shapes |= {"sr": (dim, dim, 2, 2), "norm": (dim,), "kv1": (dim, dim), "kv2": (dim, dim)}
        shapes |= {"q1": (dim // 2, dim), "q2": (dim // 2, dim)}
    elif kind == "guided":
        shapes |= {"q": (dim, dim), "kv1": (dim, dim), "kv2": (dim, dim), "f1": (1, 2), "f2": (1, 1)}
    else:
        shapes |= {"q": (dim, dim), "kv": (2 * dim, dim)}
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    return state | {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("hybrid", HybridScaleAttention(8, 2)),
        ("guided", GuidedAttention(8, 2)),
        ("plain", LepeAttention(8, 2)),
    ],
)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_official_weights_fit_by_name(kind, layer, qkv_bias) -> None:
    state = official(kind)
    if not qkv_bias:
        state = {n: t for n, t in state.items() if not n.startswith(("q", "kv")) or n.endswith("weight")}
        layer = type(layer)(8, 2, qkv_bias=False)
    layer.load_state_dict(convert_official_attention(state), strict=True)
    if kind == "guided":
        expected = torch.cat([state["kv1.weight"][:4], state["kv2.weight"][:4]])
        assert torch.equal(layer.attention.kv.weight[:8], expected)  # keys of the first and of the last heads
    block = {f"attn.{name}": t for name, t in state.items()} | {"mlp.dwconv.dwconv.weight": torch.ones(1)}
    assert "mlp.dwconv.weight" in convert_official_block(block)


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads=3 is not allowed"):
        HybridScaleAttention(12, 3)
    with pytest.raises(ValueError, match=r"reduction=3 is not known; allowed: 2, 4, 8"):
        SelfGuidedAttention(16, 4, reduction=3)
    with pytest.raises(ValueError, match=r"border='wrap' is not known"):
        HybridScaleAttention(16, 4, border="wrap")  # type: ignore[arg-type]
