"""The network of L-SFAN: the mechanism, its hand-worked example, and weights in the published layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gridattn.models.state import CheckpointError
from gridattn.systems.l_sfan import LSFAN, build_lsfan, convert_checkpoint, convert_state, load_network, relevance
from gridattn.systems.l_sfan.convert import network_of

SMALL = {"sensors": 5, "frames": 20, "channels": (2, 4), "num_heads": 2, "batch_norm": False}


def small(**changes: object) -> LSFAN:
    torch.manual_seed(0)
    return LSFAN(**(SMALL | changes)).eval()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"batch_norm": False}, 2682),
        ({}, 2722),
        ({"batch_norm": False, "hidden": 480}, 233_562),
        ({"batch_norm": False, "num_heads": 0}, 1594),
        ({"batch_norm": False, "sensors": 6, "frames": 150, "num_classes": 7}, 2399),
    ],
)
def test_parameters_are_as_many_as_counted(changes: dict, count: int) -> None:
    assert sum(parameter.numel() for parameter in LSFAN(**changes).parameters()) == count


def _by_hand(heads: int) -> tuple[LSFAN, Tensor]:
    network = LSFAN(2, 4, 2, channels=(1, 2), num_heads=heads, batch_norm=False).eval()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        network.block1.conv.weight[0, 0, 1, 1] = 1
        second = network.block2.conv.weight
        second[0, 0, 1, 1], second[1, 0, 1, 0], second[1, 0, 0, 1] = 1, 2, 1
        assert network.attention is not None
        rows = [[1, 0], [0, 1], [0, 1], [1, 0], [1, 1], [0, 1]]
        network.attention.qkv.weight.copy_(0.2 * torch.tensor(rows))
        network.attention.proj.weight.copy_(torch.eye(2))
        network.attention.proj.bias.copy_(torch.tensor([0.5, -0.5]))
        network.head.weight.copy_(torch.tensor([[1.0, -1, 2, 0], [0, 1, 0, -1]]))  # pyright: ignore
        network.head.bias.copy_(torch.tensor([0.1, 0.2]))  # pyright: ignore
    return network, torch.tensor([[[1, -2, 3, 0.5], [-1, 2, 0, 4]]])


@pytest.mark.parametrize(
    ("heads", "attention", "tokens", "logits"),
    [
        (
            1,
            [[[0.382056, 0.617944], [0.317849, 0.682151]]],
            [[2.241533, 0.517944], [2.318581, 0.582151]],
            [1.058841, 1.936430],
        ),
        (
            2,
            [[[0.354344, 0.645656], [0.310026, 0.689974]], [[0.480011, 0.519989], [0.430454, 0.569546]]],
            [[2.274788, 0.419989], [2.327969, 0.469546]],
            [0.886797, 2.058423],
        ),
    ],
)
def test_the_example_worked_by_hand(heads: int, attention: list, tokens: list, logits: list) -> None:
    network, x = _by_hand(heads)
    steps = network.steps(x)
    close = {"atol": 2e-6, "rtol": 0}
    torch.testing.assert_close(steps.pooled, torch.tensor([[[3.0, 4], [2, 7]]]), **close)
    torch.testing.assert_close(steps.attention, torch.tensor([attention]), **close)
    torch.testing.assert_close(steps.attended, torch.tensor([tokens]), **close)
    torch.testing.assert_close(network(x), torch.tensor([logits]), **close)


def test_attention_is_a_distribution_over_the_sensors() -> None:
    attention = small().steps(torch.randn(3, 5, 20)).attention
    assert attention is not None
    assert attention.shape == (3, 2, 5, 5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 5))


def test_a_batch_gives_what_its_windows_give_one_by_one() -> None:
    network, x = small(batch_norm=True), torch.randn(4, 5, 23)
    torch.testing.assert_close(network(x), torch.cat([network(row[None]) for row in x]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pool", ["time", "sensor", "both"])
@pytest.mark.parametrize("attend", ["sensors", "channels"])
def test_one_window_of_one_sensor_works(pool: str, attend: str) -> None:
    heads = 1 if attend == "channels" else 2
    network = small(sensors=1, pool=pool, attend=attend, num_heads=heads)
    assert network(torch.randn(1, 1, 20)).shape == (1, 2)
    steps = network.steps(torch.randn(1, 1, 20))
    tokens = steps.pooled.shape[2] if attend == "sensors" else 4
    assert steps.attention is not None
    assert steps.attention.shape == (1, heads, tokens, tokens)


def test_the_interior_of_a_constant_signal_does_not_depend_on_its_length() -> None:
    network = small()
    x = torch.randn(1, 5, 1)
    short, long = (network.steps(x.expand(1, 5, frames)).maps for frames in (32, 96))
    middle = short[..., 4:5]
    torch.testing.assert_close(short[..., 2:-2], middle.expand(-1, -1, -1, 4))
    torch.testing.assert_close(long[..., 2:-2], middle.expand(-1, -1, -1, 20))


@pytest.mark.parametrize("frames", [4, 5, 6, 7])
def test_four_to_seven_frames_leave_one_step_before_pooling(frames: int) -> None:
    assert small().steps(torch.randn(2, 5, frames)).maps.shape == (2, 4, 5, 1)


def test_without_attention_projections_logits_do_not_depend_on_the_signal() -> None:
    network = small()
    assert network.attention is not None
    for weight in (network.attention.qkv.weight, network.attention.proj.weight):
        nn.init.zeros_(weight)
    a, b = network(torch.randn(1, 5, 20)), network(torch.randn(1, 5, 20))
    assert torch.equal(a, b)


def test_the_logits_of_steps_are_those_of_forward() -> None:
    for changes in ({}, {"residual": True}, {"num_heads": 0}, {"hidden": 7}, {"attend": "channels", "num_heads": 5}):
        network, x = small(**changes), torch.randn(2, 5, 20)
        torch.testing.assert_close(network.steps(x).logits, network(x))


def test_attention_alone_does_not_care_about_the_order_of_the_sensors() -> None:
    network, order = small(), torch.tensor([3, 0, 4, 1, 2])
    tokens = torch.randn(2, 5, 4)
    torch.testing.assert_close(network._attend(tokens[:, order]), network._attend(tokens)[:, order])


def test_relevance_marks_the_one_sensor_that_moves() -> None:
    network = LSFAN(9, 40, 2, channels=(1, 1), num_heads=0, batch_norm=False).eval()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        network.block1.conv.weight[0, 0, 1, 1] = network.block2.conv.weight[0, 0, 1, 1] = 1
        network.head.weight[1] = 1  # pyright: ignore
    x = torch.zeros(1, 9, 42)
    x[0, 6, 8:16] = 1
    found = relevance(network, x)[0]
    assert found.shape == (9, 42)
    assert found[6, 8:16].min() > 0
    assert found.sum() == found[6, 8:16].sum()


def test_relevance_explains_the_class_asked_for_and_leaves_no_gradient() -> None:
    network, x = small(), torch.randn(2, 5, 21)
    maps = [relevance(network, x, torch.full((2,), label)) for label in (0, 1)]
    assert not torch.equal(*maps)
    assert all(map_.min() >= 0 for map_ in maps)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_bfloat16_and_compiled_networks_agree_with_float32() -> None:
    network, x = small(), torch.randn(2, 5, 20)
    expected = network(x)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(network.bfloat16()(x.bfloat16()).float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 3}, "frames=3"),
        ({"pool": "space"}, "pool='space'"),
        ({"attend": "all"}, "attend='all'"),
        ({"channels": (4,)}, r"channels=\[4\]"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"hidden": 0}, "hidden=0"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_inputs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 frames"):
        small()(torch.randn(1, 5, 3))
    with pytest.raises(ValueError, match=r"\(N, 5, T\)"):
        small()(torch.randn(1, 4, 20))
    with pytest.raises(ValueError, match="pool='sensor'"):
        small(pool="sensor")(torch.randn(1, 5, 30))


def _published(network: LSFAN) -> dict[str, Tensor]:
    names = {"block1.conv.": "conv1.", "block2.conv.": "conv2.", "block1.norm.": "bn1.", "block2.norm.": "bn2."}
    names |= {"attention.qkv.": "attention.in_proj_", "attention.proj.": "attention.out_proj."}
    names |= {"head.0.": "fc1.", "head.3.": "fc2."} if isinstance(network.head, nn.Sequential) else {"head.": "fc."}
    state = {}
    for name, tensor in network.state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        state[names[ours] + name.removeprefix(ours)] = tensor
    return state


@pytest.mark.parametrize("changes", [{}, {"hidden": 6}, {"batch_norm": True}, {"num_heads": 0}])
def test_weights_in_the_published_layout_give_the_same_logits(changes: dict) -> None:
    network = small(**changes)
    state = _published(network)
    other = build_lsfan(**network_of(state, num_heads=2, frames=20))
    other.load_state_dict(convert_state(state))
    x = torch.randn(2, 5, 20)
    torch.testing.assert_close(other.eval()(x), network(x))


def test_a_converted_checkpoint_is_a_trained_network(tmp_path: Path) -> None:
    network = small()
    torch.save(_published(network), tmp_path / "published.pth")
    kept = {"mean": [0.0] * 5, "std": [1.0] * 5, "classes": ["no", "yes"], "num_heads": 2, "window": 20}
    convert_checkpoint(tmp_path / "published.pth", tmp_path / "ours", **kept)
    loaded = load_network(str(tmp_path / "ours"))
    x = torch.randn(2, 5, 20)
    torch.testing.assert_close(loaded.network(x), network(x))
    assert loaded.channels[0] == "sensor 0"


def test_checkpoints_of_other_networks_are_refused(tmp_path: Path) -> None:
    kept = {"mean": [0.0] * 5, "std": [1.0] * 5, "classes": ["no", "yes"], "num_heads": 2}
    state = _published(small())
    for broken, message in (
        ({"conv1.weight": state["conv1.weight"]}, "missing"),
        (state | {"lstm.weight": torch.ones(2)}, "lstm.weight"),
        ({name: t for name, t in state.items() if name != "fc.bias"}, "1 missing"),
    ):
        torch.save(broken, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(tmp_path / "bad.pth", tmp_path / "ours", **kept)
    torch.save(state, tmp_path / "good.pth")
    with pytest.raises(ValueError, match="mean has 1 entries"):
        convert_checkpoint(tmp_path / "good.pth", tmp_path / "ours", **kept | {"mean": [0.0]})
    assert not (tmp_path / "ours").exists()
