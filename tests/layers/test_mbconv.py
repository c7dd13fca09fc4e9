"""Facts about the MBConv block."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.mbconv import MbConv, SqueezeExcitation, mbconv_options


def with_statistics(block: MbConv) -> MbConv:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return block


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("variant", ["tf", "rw"])
def test_in_evaluation_the_folded_norms_equal_the_layers_one_by_one(stride: int, variant: str) -> None:
    block = with_statistics(MbConv(6, 8, stride=stride, **mbconv_options(variant, 6))).double().eval()
    x = torch.randn(2, 8, 12, 6, dtype=torch.float64)
    inner = block.act(block.norm1(block.expand(block.pre_norm(x)))).movedim(-1, 1)
    padding = (0, 1, 0, 1) if stride == 2 and variant == "tf" else (1, 1, 1, 1)
    inner = block.depthwise(F.pad(inner, padding)).movedim(1, -1)
    residual = block.project(block.squeeze_excitation(block.act(block.norm2(inner))))
    assert block.shortcut is not None
    pooled = x if stride == 1 else F.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)
    torch.testing.assert_close(block(x), residual + block.shortcut(pooled))


def test_training_uses_the_statistics_of_the_batch() -> None:
    block = MbConv(8).train()
    x = 3.0 + 2.0 * torch.randn(4, 6, 6, 8)
    block(x)
    assert block.pre_norm.running_mean is not None
    torch.testing.assert_close(block.pre_norm.running_mean, 0.01 * x.mean((0, 1, 2)))
    torch.testing.assert_close(block(x), block(x))


@pytest.mark.parametrize(("grid", "expected"), [((12, 20), (6, 10)), ((7, 9), (4, 5)), ((1, 2), (1, 1))])
def test_a_stride_of_2_halves_the_grid_upwards(grid: tuple[int, int], expected: tuple[int, int]) -> None:
    for variant in ("tf", "rw"):
        block = MbConv(8, 16, stride=2, **mbconv_options(variant, 8)).eval()
        assert block(torch.randn(1, *grid, 8)).shape == (1, *expected, 16)


def influence(block: MbConv, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    block._depthwise(x)[0, 0, 0].sum().backward()
    assert x.grad is not None
    return x.grad.abs().sum(-1)[0] > 0


def test_same_padding_puts_nothing_before_an_even_map_and_one_after_it() -> None:
    x = torch.randn(1, 6, 8, 32)
    tf = influence(MbConv(8, stride=2).eval(), x)
    assert tf[:3, :3].all()
    assert tf.sum() == 9
    rw = influence(MbConv(8, stride=2, pad_both_sides=True).eval(), x.detach().clone())
    assert rw[:2, :2].all()
    assert rw.sum() == 4


def test_squeeze_excitation_scales_whole_channels() -> None:
    layer = SqueezeExcitation(8, 2)
    x = torch.rand(2, 5, 6, 8) + 0.5
    ratio = layer(x) / x
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert (ratio < 1).all()


def test_the_shortcut_is_the_identity_where_nothing_changes() -> None:
    block = MbConv(8).eval()
    nn.init.zeros_(block.project.weight)
    nn.init.zeros_(block.project.bias)
    x = torch.randn(1, 5, 7, 8)
    assert block.shortcut is None
    assert torch.equal(block(x), x)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"stride=3 is not known; allowed: 1, 2"):
        MbConv(8, stride=3)
    with pytest.raises(ValueError, match=r"activation='relu'"):
        MbConv(8, activation="relu")
    with pytest.raises(ValueError, match=r"variant='pt'"):
        mbconv_options("pt", 8)
