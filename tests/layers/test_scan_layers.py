"""Facts of selective scan layers and of the LaMamba block."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gridattn.layers import LaMambaBlock, ScanWindowAttention, SelectiveScan, WindowAttention


def scan(**options) -> SelectiveScan:
    torch.manual_seed(0)
    return SelectiveScan(8, **options).double().eval()


def sample(*grid: int) -> torch.Tensor:
    return torch.randn(2, *grid, 8, dtype=torch.float64)


def seen_from(layer, grid, query) -> torch.Tensor:
    return layer.attention_map(torch.randn(1, *grid, layer.dim, dtype=torch.float64), query)[0, 0] > 0


@pytest.mark.parametrize("paths", ["continuous", "cross"])
@pytest.mark.parametrize("grid", [(9,), (4, 6), (3, 4, 3)])
def test_every_position_reaches_every_other(paths, grid) -> None:
    layer = scan(paths=paths, grid=grid)
    assert seen_from(layer, grid, tuple(size // 2 for size in grid)).all()


def test_one_path_alone_passes_nothing_backwards() -> None:
    layer = scan(paths="cross", kernel_size=1)
    with torch.no_grad():
        layer.x_proj_weight[1:].zero_()
    seen = seen_from(layer, (4, 5), (2, 1)).flatten()
    assert seen.nonzero().flatten().tolist() == list(range(12))


def test_transposing_the_grid_swaps_the_roles_of_the_paths() -> None:
    layer, turned = scan(paths="cross"), scan(paths="cross")
    swapped = [1, 0, 3, 2]
    with torch.no_grad():
        for parameter in (turned.x_proj_weight, turned.dt_projs_weight, turned.dt_projs_bias):
            parameter.copy_(parameter[swapped])
        for parameter in (turned.A_logs, turned.Ds):
            parameter.normal_()
            own = getattr(layer, "A_logs" if parameter is turned.A_logs else "Ds")
            own.copy_(parameter.unflatten(0, (4, -1))[swapped].flatten(0, 1))
        turned.conv_weight.copy_(layer.conv_weight.transpose(2, 3))
    x = sample(4, 6)
    torch.testing.assert_close(turned(x.transpose(1, 2)).transpose(1, 2), layer(x))


def test_a_closed_gate_gives_nothing() -> None:
    layer = scan()
    with torch.no_grad():
        layer.in_proj.weight[16:].zero_()
    assert (layer(sample(4, 5)) == 0).all()


def test_a_new_layer_forgets_state_n_at_rate_n() -> None:
    layer = SelectiveScan(8, state_dim=3)
    torch.testing.assert_close(layer.A_logs.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(64, 3))
    steps = torch.nn.functional.softplus(layer.dt_projs_bias)
    assert ((steps > 0.9e-3) & (steps < 0.11)).all()


def test_a_compiled_layer_has_the_same_gradients() -> None:
    torch.compiler.reset()
    layer, x = scan(), sample(3, 4).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        *(torch.autograd.grad(f(x).square().sum(), [x, layer.A_logs]) for f in (compiled, layer))
    ):
        torch.testing.assert_close(ours, expected)


def test_windows_after_the_scan_see_what_windows_alone_do_not() -> None:
    torch.manual_seed(0)
    both = ScanWindowAttention(8, 2, window_size=3).double().eval()
    assert seen_from(both, (6, 6), (0, 0)).all()
    assert seen_from(both.window, (6, 6), (0, 0)).sum() == 9


def block(**options) -> LaMambaBlock:
    torch.manual_seed(0)
    window = WindowAttention(8, 2, window_size=4)
    return LaMambaBlock(SelectiveScan(8), window, **{"condition_dim": 5} | options).double()


def test_a_new_conditioned_block_is_the_identity() -> None:
    x = sample(5, 6)
    assert torch.equal(block()(x, torch.randn(2, 5, dtype=torch.float64)), x)


def test_each_sample_follows_its_own_condition() -> None:
    module, x = block(), sample(5, 6)[:1].repeat(2, 1, 1, 1)
    torch.nn.init.normal_(module.modulation.weight)
    condition = torch.randn(2, 5, dtype=torch.float64)
    y = module(x, condition)
    assert (y[0] - y[1]).abs().max() > 1e-3
    torch.testing.assert_close(module(x, condition.flip(0)), y.flip(0))


def test_a_condition_of_the_same_width_needs_no_projection_unless_asked_for() -> None:
    assert isinstance(block(condition_dim=8).condition_projection, torch.nn.Identity)
    assert isinstance(block(condition_dim=8, project_condition=True).condition_projection, torch.nn.Linear)


def test_multiply_accumulates_of_a_block_are_what_torch_counts() -> None:
    torch.manual_seed(0)
    module = LaMambaBlock(SelectiveScan(8, step_rank=2), WindowAttention(8, 2), 5).double()
    condition = torch.randn(1, 5, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(sample(8, 8)[:1], condition)
    assert abs(counter.get_total_flops() / 2 / module.macs((8, 8)) - 1) < 0.02


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="paths='spiral' is not known"):
        SelectiveScan(8, paths="spiral")
    with pytest.raises(ValueError, match=r"expansion=0.05 leaves no channel"):
        SelectiveScan(8, expansion=0.05)
    with pytest.raises(ValueError, match="condition_dim=5 needs project_condition=True"):
        block(project_condition=False)
    with pytest.raises(ValueError, match="window has dim=16 but scan has dim=8"):
        LaMambaBlock(SelectiveScan(8), WindowAttention(16, 2), 8)
