"""Facts about class semantics-based attention."""

import pytest
import torch

from gridattn.layers.class_semantics import ClassSemanticsAttention


def layer_and_input(**options) -> tuple[ClassSemanticsAttention, torch.Tensor, torch.Tensor]:
    layer = ClassSemanticsAttention(8, grid=(12,), semantic_dim=6, **options)
    return layer, torch.randn(2, 12, 8), torch.randn(2, 12, 6)


def test_gates_at_one_half_leave_the_features_unchanged() -> None:
    layer, x, r = layer_and_input()
    for gate in (layer.channel.fc2, layer.temporal.conv2):
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.zeros_(gate.bias)
    torch.testing.assert_close(layer(x, r), x)


def test_gates_depend_on_the_semantics_alone() -> None:
    layer, x, r = layer_and_input()
    torch.testing.assert_close(layer(2 * x, r), 2 * layer(x, r))
    assert not torch.allclose(layer(x, r + 1), layer(x, r))


def test_gates_lie_between_zero_and_one() -> None:
    layer, _, r = layer_and_input()
    for gate in layer.gates(r.mT):
        assert ((gate > 0) & (gate < 1)).all()


def test_one_step_of_the_semantics_moves_the_time_gate_only_two_steps_around_and_the_channel_gate() -> None:
    layer, _, r = layer_and_input()
    other = r.clone()
    other[:, 6] += 1
    (channel, time), (channel2, time2) = layer.gates(r.mT), layer.gates(other.mT)
    moved = (time != time2).any(0).flatten()
    assert not moved[:4].any()
    assert moved[4:9].any()
    assert not moved[9:].any()
    assert not torch.equal(channel, channel2)


def test_the_order_of_time_matters_to_the_channel_gate() -> None:
    layer, _, r = layer_and_input()
    torch.nn.init.normal_(layer.channel.squeeze.weight)
    assert not torch.allclose(layer.gates(r.mT)[0], layer.gates(r.flip(1).mT)[0])


def test_another_length_keeps_the_channel_gate_of_a_constant_signal() -> None:
    layer, _, r = layer_and_input()
    constant = r[:, :1].mT
    torch.testing.assert_close(layer.gates(constant.expand(-1, -1, 12))[0], layer.gates(constant.expand(-1, -1, 31))[0])


@pytest.mark.parametrize("fuse", ["sum", "mean", "channel", "time", "concat"])
def test_fusions_combine_the_two_gated_features(fuse: str) -> None:
    layer, x, r = layer_and_input(fuse=fuse)
    a, t = layer.gates(r.mT)
    expected = {
        "sum": lambda: x * a.mT + x * t.mT,
        "mean": lambda: (x * a.mT + x * t.mT) / 2,
        "channel": lambda: x * a.mT,
        "time": lambda: x * t.mT,
        "concat": lambda: layer.mix(torch.cat([x * a.mT, x * t.mT], -1).mT).mT,
    }
    torch.testing.assert_close(layer(x, r), expected[fuse]())


def test_semantics_of_another_length_are_interpolated() -> None:
    layer, x, r = layer_and_input()
    assert layer(x, r[:, :5]).shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse": "product"}, "fuse='product' is not known"),
        ({"reduction": 0}, "reduction=0"),
        ({"hidden": -1}, "hidden=-1"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassSemanticsAttention(8, grid=(12,), **options)


def test_semantics_that_do_not_fit_are_named() -> None:
    layer, x, r = layer_and_input()
    with pytest.raises(ValueError, match="semantics has shape"):
        layer(x, r[:1])
