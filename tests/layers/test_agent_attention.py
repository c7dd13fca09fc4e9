"""Facts about the agent attention layers and the diffusion block."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gridattn.layers.agent import (
    AgentAttention,
    AgentBias,
    ClassTokenAgentAttention,
    convert_official_agent,
)
from gridattn.layers.agent_diffusion import AgentDiffusionBlock, AgentMerging, agent_schedule
from gridattn.layers.agent_window import AgentWindowAttention, CrossWindowAttention


def silence(module: nn.Module, *kinds: str) -> nn.Module:
    """Sets all parameters to zero whose name has one of the parts."""
    for name, parameter in module.named_parameters():
        if any(kind in name for kind in kinds):
            nn.init.zeros_(parameter)
    return module.double().eval()


def noisy(module: nn.Module) -> nn.Module:
    """Draws the biases large enough to matter."""
    for part in module.modules():
        if isinstance(part, AgentBias):
            for parameter in part.parameters():
                nn.init.normal_(parameter)
    return module.double().eval()


def seen(layer: nn.Module, grid: tuple[int, ...], query: tuple[int, ...]) -> Tensor:
    """Positions that the output at `query` depends on."""
    x = torch.randn(1, *grid, layer.dim, dtype=torch.float64, requires_grad=True)
    layer(x)[(0, *query)].sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(-1) > 1e-14


def test_without_biases_and_convolution_it_is_generalized_linear_attention() -> None:
    layer = silence(AgentAttention(16, 2, agent_size=3), "bias.block", "bias.axes", "dwc")
    x = torch.randn(2, 6, 7, 16, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (2, 8)).flatten(1, 2).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    pooled = torch.nn.functional.adaptive_avg_pool2d(layer.qkv(x).chunk(3, -1)[0].movedim(-1, 1), 3)
    agents = pooled.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
    phi_q, phi_k = (8**-0.5 * q @ agents.mT).softmax(-1), (8**-0.5 * agents @ k.mT).softmax(-1).mT
    out = (phi_q @ (phi_k.mT @ v)).transpose(1, 2).flatten(2).view_as(x)
    torch.testing.assert_close(layer(x), layer.proj(out))
    torch.testing.assert_close((phi_q @ phi_k.mT).sum(-1), torch.ones(2, 2, 42).double())


@pytest.mark.parametrize(
    "layer",
    [
        AgentAttention(16, 2, grid=(5, 6), agent_size=(2, 3)),
        AgentAttention(16, 2, grid=(5, 6), agent_size=2, reduction=2),
        AgentWindowAttention(16, 2, window_size=4, shifted=True),
        CrossWindowAttention(16, 2, window_size=4, agent_size=2),
    ],
)
def test_equal_values_come_out_everywhere_whatever_the_biases(layer) -> None:
    layer = silence(noisy(layer), "dwc", "qkv.weight")
    y = layer(torch.randn(1, 5, 9, 16, dtype=torch.float64))
    torch.testing.assert_close(y, layer.proj(layer.qkv.bias[32:]).expand_as(y))


@pytest.mark.parametrize("grid", [(14, 14), (5, 9), (3, 1)])
@pytest.mark.parametrize(
    "layer",
    [
        AgentAttention(16, 2, agent_size=3),
        AgentWindowAttention(16, 2, window_size=4),
        AgentWindowAttention(16, 2, window_size=4, shifted=True),
        CrossWindowAttention(16, 2, window_size=4, agent_size=3),
        CrossWindowAttention(16, 2, window_size=4, agent_size=None),
    ],
)
def test_maps_are_distributions_over_real_positions_alone(layer, grid) -> None:
    layer = noisy(layer)
    weights = layer.attention_map(torch.randn(2, *grid, 16, dtype=torch.float64), tuple(n - 1 for n in grid))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones(2, 2))


def test_the_dense_form_at_the_trained_size_is_the_layer_itself_bit_for_bit() -> None:
    layer = noisy(AgentAttention(16, 2, grid=(8, 6), agent_size=(2, 3)))
    dense = AgentAttention(16, 2, grid=(8, 6), agent_size=(2, 3), dense_agent_size=(2, 3)).double().eval()
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 6, 16, dtype=torch.float64)
    assert torch.equal(dense(x), layer(x))
    assert dense(torch.randn(1, 13, 4, 16, dtype=torch.float64)).shape == (1, 13, 4, 16)


def test_attention_products_double_with_the_positions() -> None:
    layer = AgentAttention(16, 2, agent_size=3).eval()

    def products(grid: tuple[int, int]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, *grid, 16))
        return counter.get_total_flops()

    assert products((28, 14)) == 2 * products((14, 14))


def test_the_class_token_does_not_see_the_convolution_but_patches_do() -> None:
    layer = noisy(ClassTokenAgentAttention(16, 2, grid=(6, 6), agent_size=2))
    x, token = torch.randn(1, 6, 6, 16).double(), torch.randn(1, 1, 16).double()
    before = layer(x, token)
    with torch.no_grad():
        layer.mixer.dwc.weight.mul_(2)
    after = layer(x, token)
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


def test_the_class_token_is_seen_by_all_positions_but_pools_no_agent() -> None:
    layer = noisy(ClassTokenAgentAttention(16, 2, grid=(6, 6), agent_size=2))
    x, token = torch.randn(1, 6, 6, 16).double(), torch.randn(1, 1, 16).double()
    assert ((layer(x, token + 1)[0] - layer(x, token)[0]).abs().amax(-1) > 1e-9).all()
    with torch.no_grad():
        layer.token_key_bias.fill_(-1e9)  # no agent sees the token
    torch.testing.assert_close(layer(x, token)[0], layer(x))


def test_a_reduction_of_one_is_no_reduction() -> None:
    layer = AgentAttention(16, 2, reduction=1)
    assert layer.patch is None
    state = {name: t for name, t in layer.state_dict().items() if name.startswith(("qkv", "mixer"))}
    reduced = AgentAttention(16, 2, grid=(14, 14), reduction=2)
    assert {tuple(t.shape) for name, t in reduced.state_dict().items() if "aggregate_bias.axes" in name} == {(2, 49, 7)}
    assert {tuple(t.shape) for name, t in state.items() if "aggregate_bias.axes" in name} == {(2, 49, 14)}


def test_with_a_reduction_keys_are_patches_and_positions_beyond_the_last_patch_are_queries_only() -> None:
    layer = silence(AgentAttention(16, 2, grid=(6, 6), agent_size=1, reduction=2), "dwc", "bias.block", "bias.axes")
    with torch.no_grad():
        layer.qkv.weight[:16] = 0  # equal weights: what is left is which values arrive
    reached = seen(layer, (7, 6), (0, 0))
    assert reached[:6].all()
    assert not reached[6].any()


def test_a_window_depends_on_itself_only() -> None:
    layer = noisy(AgentWindowAttention(16, 2, window_size=4))
    expected = torch.zeros(10, 7, dtype=torch.bool)
    expected[4:8, 4:7] = True
    assert torch.equal(seen(layer, (10, 7), (5, 6)), expected)


def test_a_shifted_window_goes_round_the_border_as_in_the_official_layer() -> None:
    layer = noisy(AgentWindowAttention(16, 2, grid=(8,), window_size=4, shifted=True))
    assert seen(layer, (8,), (7,)).tolist() == [True, True, False, False, False, False, True, True]
    assert seen(layer, (8,), (3,)).tolist() == [False, False, True, True, True, True, False, False]


def test_a_window_over_the_whole_grid_is_agent_attention() -> None:
    layer = noisy(AgentAttention(16, 2, grid=(5, 7), agent_size=3))
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    windowed = AgentWindowAttention(16, 2, grid=(5, 7), window_size=8, agent_size=3, shifted=True).double().eval()
    whole = CrossWindowAttention(16, 2, grid=(5, 7), window_size=None, agent_size=3).double().eval()
    windowed.load_state_dict(layer.state_dict())
    whole.load_state_dict({n.replace("mixer", "branches.0"): t for n, t in layer.state_dict().items()})
    torch.testing.assert_close(windowed(x), layer(x))
    torch.testing.assert_close(whole(x), layer(x))


@pytest.mark.parametrize("agent_size", [None, 2])
def test_stripes_cross_each_half_of_the_heads_along_one_axis(agent_size) -> None:
    layer = noisy(CrossWindowAttention(16, 4, window_size=3, agent_size=agent_size))
    weights = layer.attention_map(torch.randn(1, 8, 7, 16, dtype=torch.float64), (4, 6))[0] > 0
    vertical, horizontal = torch.zeros(2, 8, 7, dtype=torch.bool)
    vertical[:, 6:] = True
    horizontal[3:6] = True
    for head, expected in enumerate((vertical, vertical, horizontal, horizontal)):
        assert torch.equal(weights[head], expected)


def test_separate_query_and_key_projections_of_the_pyramid_form_are_one_projection() -> None:
    layer = AgentAttention(8, 2, grid=(4, 4), agent_size=2, reduction=2)
    official = {"q.weight": torch.randn(8, 8), "kv.weight": torch.randn(16, 8), "sr.bias": torch.randn(8)}
    official |= {"q.bias": torch.randn(8), "kv.bias": torch.randn(16), "ha_bias": torch.randn(1, 2, 4, 1, 4)}
    layer.load_state_dict(convert_official_agent(official), strict=False)
    x = torch.randn(1, 8)
    expected = torch.cat(
        [torch.nn.functional.linear(x, official[f"{n}.weight"], official[f"{n}.bias"]) for n in ("q", "kv")], 1
    )
    torch.testing.assert_close(layer.qkv(x), expected)
    assert layer.patch is not None
    assert torch.equal(layer.patch.bias, official["sr.bias"])
    assert torch.equal(layer.mixer.broadcast_bias.axes[0][1, 3], official["ha_bias"][0, 1, :, 0, 3])


def test_one_exported_graph_serves_all_grids() -> None:
    dynamic = torch.export.Dim.DYNAMIC
    for layer in (AgentAttention(16, 2, agent_size=3), AgentWindowAttention(16, 2, window_size=4)):
        x = torch.randn(2, 9, 11, 16)
        program = torch.export.export(
            layer.eval(), (x,), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},)
        ).module()
        for grid in ((8, 8), (13, 5)):
            x = torch.randn(3, *grid, 16)
            torch.testing.assert_close(program(x), layer(x))


def block(merging: AgentMerging | None = None) -> AgentDiffusionBlock:
    torch.manual_seed(0)
    return AgentDiffusionBlock(16, 2, 8, 12, merging).double().eval()


def inputs(grid: tuple[int, ...] = (8, 12)) -> tuple[Tensor, Tensor]:
    return torch.randn(2, *grid, 16, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)


def test_the_schedule_has_agents_early_and_plain_merging_late() -> None:
    assert agent_schedule(0).counts((64, 64)) == (2458, 256)
    assert agent_schedule(20).counts((64, 64)) == (2458, 0)
    assert [agent_schedule(s, ratio=0.1).counts((64, 64))[0] for s in (19, 20)] == [3687, 3687]


def test_taking_merging_away_restores_the_block_bit_for_bit() -> None:
    x, context = inputs()
    patched, plain = block(AgentMerging(random=False)), block()
    assert not torch.allclose(patched(x, context), plain(x, context))
    patched.merging = None
    assert torch.equal(patched(x, context), plain(x, context))
    patched.merging = AgentMerging(ratio=0.0)
    assert torch.equal(patched(x, context), plain(x, context))


def test_with_too_many_agents_the_result_is_plain_merging() -> None:
    x, context = inputs()
    merging = AgentMerging(cell=2, ratio=0.4, agent_ratio=0.5, random=False)
    assert merging.counts((8, 12))[1] == 0
    other = replace(merging, broadcast_exponent=1.0, shortcut=3.0)
    assert torch.equal(block(merging)(x, context), block(other)(x, context))


def test_agents_share_the_query_projection_and_the_shortcut_adds_values() -> None:
    attention = block().self_attention
    x, agents = torch.randn(1, 9, 16).double(), torch.randn(1, 3, 16).double()
    settings = AgentMerging(broadcast_exponent=1.0, shortcut=0.0)
    q, k, v, a = (
        projection(t).unflatten(-1, (2, 8)).transpose(1, 2)
        for projection, t in ((attention.to_q, x), (attention.to_k, x), (attention.to_v, x), (attention.to_q, agents))
    )
    pure = (8**-0.5 * q @ a.mT).softmax(-1) @ (8**-0.5 * a @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(
        attention(x, agents=agents, settings=settings), attention.to_out(pure.transpose(1, 2).flatten(2))
    )
    shortcut = replace(settings, shortcut=0.5)
    expected = attention.to_out((pure + 0.5 * v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, agents=agents, settings=shortcut), expected)


def test_first_tokens_of_cells_are_deterministic_and_drawn_ones_follow_their_generator() -> None:
    x, context = inputs()
    fixed, drawn = block(AgentMerging(random=False)), block(AgentMerging(random=True))
    assert torch.equal(fixed(x, context), fixed(x, context))
    seeds = [drawn(x, context, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.allclose(seeds[0], seeds[2])


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="agent_size=0"):
        AgentAttention(16, 2, agent_size=0)
    with pytest.raises(ValueError, match="reduction=2 is not allowed with a class token"):
        ClassTokenAgentAttention(16, 2, reduction=2)
    with pytest.raises(ValueError, match="num_heads=1 is not allowed; two sets of stripes"):
        CrossWindowAttention(16, 1)
    with pytest.raises(ValueError, match="window_size=0"):
        CrossWindowAttention(16, 2, window_size=0)
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        AgentMerging(ratio=1.5)
    with pytest.raises(ValueError, match="step=50 is not allowed"):
        agent_schedule(50)
