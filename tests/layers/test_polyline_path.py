"""Facts of polyline path masked attention."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gridattn.layers import GlobalAttention, PolylinePathAttention
from gridattn.layers.path_mask import MASKS, PathDecay, manhattan_log_decay, raster_rotation


def layer(**options) -> PolylinePathAttention:
    torch.manual_seed(0)
    return PolylinePathAttention(16, 2, **options).double().eval()


def sample(*grid: int) -> torch.Tensor:
    return torch.randn(2, *grid, 16, dtype=torch.float64)


def test_one_map_of_two_outputs_without_bias_predicts_the_decays_of_all_heads() -> None:
    decay = PathDecay(24, 3)
    assert {name: tuple(p.shape) for name, p in decay.named_parameters()} == {
        "dt_bias": (3,),
        "A_log": (3,),
        "dt_linear.weight": (2, 8),
    }
    x = torch.randn(1, 4, 5, 24)
    log_decay = decay(x)
    t = x.unflatten(-1, (3, 8)) @ decay.dt_linear.weight.T
    along_rows = -decay.A_log.exp() * torch.nn.functional.softplus(t[..., 0] + decay.dt_bias)
    torch.testing.assert_close(log_decay[..., 1], along_rows)
    assert ((decay(torch.zeros(1, 1, 1, 24)).exp() > 0.88) & (decay(torch.zeros(1, 1, 1, 24)) < 0)).all()


@pytest.mark.parametrize("decomposed", [False, True])
def test_decays_of_one_leave_attention_without_a_mask(decomposed) -> None:
    masked, plain = layer(decomposed=decomposed), layer(decomposed=decomposed, mask="none")
    assert masked.path_embed is not None
    plain.load_state_dict({k: v for k, v in masked.state_dict().items() if not k.startswith("path_embed")})
    x = sample(4, 6)
    assert (masked(x) - plain(x)).abs().max() > 1e-6
    with torch.no_grad():
        masked.path_embed.A_log.fill_(-80.0)
    torch.testing.assert_close(masked(x), plain(x))


def test_decays_of_zero_leave_every_position_its_own_value() -> None:
    attention, x = layer(), sample(4, 6)
    assert attention.path_embed is not None
    with torch.no_grad():
        attention.path_embed.A_log.fill_(12.0)
    value = attention.v_proj(x)
    torch.testing.assert_close(attention(x), attention.out_proj(value + attention.lepe(value)))


@pytest.mark.parametrize("decomposed", [False, True])
def test_weights_of_a_query_sum_to_one_and_reach_everywhere(decomposed) -> None:
    weights = layer(decomposed=decomposed).attention_map(sample(5, 4), (3, 1))
    torch.testing.assert_close(weights.flatten(2).sum(2), torch.ones(2, 2))
    assert (weights > 0).all()


def test_turned_pairs_keep_products_that_depend_on_the_raster_distance_only() -> None:
    attention = layer(mask="none")
    with torch.no_grad():
        for proj in (attention.q_proj, attention.k_proj):
            proj.weight.zero_()
            proj.bias.normal_()
    weights = attention.attention_map(torch.zeros(1, 3, 4, 16, dtype=torch.float64), (1, 1))[0].flatten(1)
    later = attention.attention_map(torch.zeros(1, 3, 4, 16, dtype=torch.float64), (1, 3))[0].flatten(1)
    torch.testing.assert_close(weights[:, 3] / weights[:, 7], later[:, 5] / later[:, 9])


def test_without_mask_rotation_and_convolution_it_is_global_attention(monkeypatch) -> None:
    attention, dense = layer(mask="none"), GlobalAttention(16, 2).double().eval()
    with torch.no_grad():
        attention.lepe.weight.zero_()
        assert attention.lepe.bias is not None
        attention.lepe.bias.zero_()
        dense.qkv.weight.copy_(torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]))
        dense.qkv.bias.zero_()
        dense.proj.load_state_dict(attention.out_proj.state_dict())
    still = [torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]
    monkeypatch.setattr("gridattn.layers.path_mask.raster_rotation", lambda *_: still)
    x = sample(3, 4)
    torch.testing.assert_close(attention(x), dense(x))


def test_the_fixed_mask_decays_with_manhattan_distance_by_a_rate_per_head() -> None:
    torch.testing.assert_close(manhattan_log_decay(4, base=2, spread=4)[2], torch.tensor(1 - 2.0**-4).log())
    attention = layer(mask="manhattan")
    with torch.no_grad():
        attention.q_proj.weight.zero_()
    weights = attention.attention_map(sample(4, 4), (0, 0))
    rates = attention.manhattan.exp().float()
    torch.testing.assert_close(weights[0, :, 1, 2] / weights[0, :, 0, 0], rates**3)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("masking", ["added", "multiplied"])
def test_every_mask_is_counted_right(mask, decomposed, masking) -> None:
    attention = layer(mask=mask, decomposed=decomposed, masking=masking)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert attention(sample(5, 7)[:1]).isfinite().all()
    assert abs(counter.get_total_flops() / 2 / attention.macs((5, 7)) - 1) < 0.02


def test_one_exported_graph_serves_all_grids() -> None:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 1: dynamic, 2: dynamic},)
    attention = layer()
    program = torch.export.export(attention, (sample(4, 5),), dynamic_shapes=shapes).module()
    for grid in ((5, 5), (3, 8)):
        x = sample(*grid)
        torch.testing.assert_close(program(x), attention(x))


def test_rotation_repeats_row_after_row() -> None:
    sin, cos = raster_rotation((2, 3), 8)
    torch.testing.assert_close(sin[1, 0], (3 * 10000 ** -torch.linspace(0, 1, 4)).sin())
    torch.testing.assert_close(sin**2 + cos**2, torch.ones(2, 3, 4))


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="an even size is allowed"):
        PolylinePathAttention(9, 3)
    with pytest.raises(ValueError, match="mask='diagonal' is not known"):
        PolylinePathAttention(16, 2, mask="diagonal")
