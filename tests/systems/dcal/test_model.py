"""Branches, losses and metrics of DCAL."""

import pytest
import timm
import torch
from torch import Tensor

from gridattn.ops.rollout import attention_rollout
from gridattn.systems.dcal import DCAL, build_dcal
from gridattn.systems.dcal.losses import batch_hard_triplet, dynamic_total
from gridattn.systems.dcal.metrics import ranked_queries, retrieval_report
from gridattn.systems.dcal.model import BRANCHES
from gridattn.systems.dcal.task import partners

SIZE = (12, 20)


def network(**changes: object) -> DCAL:
    torch.manual_seed(0)
    values = {"img_size": SIZE, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "ratio": 0.3}
    model = DCAL(5, **(values | changes)).eval()  # pyright: ignore[reportArgumentType]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def pictures(count: int = 4, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


# --- the branches


@pytest.mark.parametrize("pair", ["stream", "figure"])
@pytest.mark.parametrize("depth", [1, 3])
def test_an_image_paired_with_itself_gives_self_attention(pair: str, depth: int) -> None:
    logits = network(pair=pair, pwca_depth=depth)(pictures(), partner=torch.arange(4)).logits
    torch.testing.assert_close(logits["pwca"], logits["sa"], atol=1e-5, rtol=1e-5)


def test_the_readings_of_the_pair_wise_branch_differ_and_both_depend_on_the_partner() -> None:
    found = {}
    for pair in ("stream", "figure"):
        model = network(pair=pair)
        found[pair] = [model(pictures(), partner=torch.arange(4).roll(shift)).logits["pwca"] for shift in (1, 2)]
        assert not torch.allclose(*found[pair], atol=1e-4)
    assert not torch.allclose(found["stream"][0], found["figure"][0], atol=1e-4)


def test_without_the_pair_wise_branch_inference_is_the_same_and_the_parameters_are_as_many() -> None:
    whole, without = network(), network(pwca_depth=0)
    without.load_state_dict(whole.state_dict())
    expected, found = whole(pictures()).logits, without(pictures(), partner=torch.arange(4)).logits
    assert set(found) == set(expected) == {"sa", "glca"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    alone = network(glca_depth=0, pwca_depth=0)
    assert not any(name.startswith("glca") for name in alone.state_dict())


def test_a_local_block_with_the_weights_of_the_last_block_gives_the_class_token_of_self_attention() -> None:
    model = network(ratio=1.0)
    model.start_local()
    features = model(pictures()).features
    torch.testing.assert_close(features["glca"], features["sa"])


@pytest.mark.parametrize("depth", [1, 2])
def test_the_class_token_of_the_local_branch_depends_on_no_selection_but_the_mean_does(depth: int) -> None:
    few, many = network(ratio=0.1, glca_depth=depth), network(ratio=0.9, glca_depth=depth)
    few_seen, many_seen = few.selection(pictures()), many.selection(pictures())
    assert (few_seen.index.shape[1], many_seen.index.shape[1]) == (2, 14)
    assert few_seen.tokens is not None
    assert many_seen.tokens is not None
    torch.testing.assert_close(few_seen.tokens[:, :2], many_seen.tokens[:, :2])
    torch.testing.assert_close(few(pictures()).logits["glca"], many(pictures()).logits["glca"])
    torch.testing.assert_close(few.read_out(few_seen.tokens), few(pictures()).features["glca"])
    few.readout = many.readout = "local_mean"
    assert not torch.allclose(few(pictures()).logits["glca"], many(pictures()).logits["glca"], atol=1e-4)
    streams = many.backbone.streams(pictures())
    turned = many.local(streams, many_seen.index.flip(1))
    torch.testing.assert_close(many.read_out(turned), many(pictures()).features["glca"])


def test_the_selection_is_that_of_the_rollout_below_the_branch() -> None:
    model = network(glca_depth=2, ratio=0.4)
    streams = model.backbone.streams(pictures())
    full = attention_rollout([block.attention(x) for block, x in zip(model.backbone.blocks, streams[:1])])  # pyright: ignore
    seen = model.selection(pictures())
    torch.testing.assert_close(seen.response.flatten(1), full[:, 0, 1:])
    assert torch.equal(seen.index[:, 1:] - 1, full[:, 0, 1:].topk(6).indices)
    assert (seen.index[:, 0] == 0).all()


@pytest.mark.parametrize("size", [(12, 20), (7, 33), (1, 1)])
@pytest.mark.parametrize("readout", ["cls", "local_mean"])
def test_images_of_any_size_alone_or_in_a_batch(size: tuple[int, int], readout: str) -> None:
    model, images = network(readout=readout), pictures(3, size)
    expected = model(images).logits["glca"]
    torch.testing.assert_close(model(images[:1]).logits["glca"], expected[:1], atol=1e-5, rtol=1e-4)
    assert model.selection(images).response.shape[1:] == (-(-size[0] // 4), -(-size[1] // 4))


def test_bfloat16_and_compilation() -> None:
    model, partner = network(readout="local_mean", depth=2), partners(4)
    expected = model(pictures(), partner).logits["pwca"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pictures(), partner).logits["pwca"], expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(pictures(), partner).logits["pwca"]
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_two_processes_make_the_pairs_of_one() -> None:
    one = partners(8)
    for rank in range(2):
        assert torch.equal(one[rank::2], 2 * partners(4) + rank)
    assert sorted(partners(5).tolist()) == list(range(5))
    assert all(i != p for i, p in enumerate(partners(5).tolist()))


@pytest.mark.parametrize(
    ("model", "size", "ratio", "classes", "parameters", "giga"),
    [
        ("deit_tiny", (448, 448), 0.1, 200, 6_159_763, (7.122, 0.111)),
        ("deit_small", (448, 448), 0.1, 200, 23_820_691, (22.579, 0.396)),
        ("vit_base", (448, 448), 0.1, 200, 93_647_251, (78.494, 1.487)),
        ("r50_vit_base", (448, 448), 0.1, 200, 105_738_707, None),
        ("deit_tiny", (256, 128), 0.3, 1041, 6_358_437, (0.780, 0.026)),
        ("deit_small", (256, 128), 0.3, 1041, 24_216_357, (2.930, 0.099)),
        ("vit_base", (256, 128), 0.3, 1041, 94_436_901, (11.339, 0.390)),
        ("deit_tiny", (256, 256), 0.3, 576, 6_203_523, (1.706, 0.055)),
        ("deit_small", (256, 256), 0.3, 576, 23_907_459, (6.141, 0.205)),
        ("deit_base", (256, 256), 0.3, 576, 93_820_035, (23.197, 0.788)),
    ],
)
def test_parameters_and_costs_are_those_of_the_paper(
    model: str, size: tuple[int, int], ratio: float, classes: int, parameters: int, giga: tuple[float, float] | None
) -> None:
    with torch.device("meta"):
        built = build_dcal(model, num_classes=classes, img_size=size, ratio=ratio)
    assert sum(p.numel() for p in built.parameters()) == parameters
    if giga is not None:
        macs = built.macs(size)
        assert (macs["sa"] / 1e9, macs["glca"] / 1e9) == pytest.approx(giga, abs=6e-4)


def test_the_hybrid_has_the_stem_of_timms() -> None:
    with torch.device("meta"):
        ours = build_dcal("r50_vit_base", num_classes=2, img_size=224).backbone
        theirs = timm.create_model("vit_base_r50_s16_224", num_classes=0)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"glca_depth": 3}, "glca_depth=3"),
        ({"pwca_depth": 4}, "pwca_depth=4"),
        ({"pair": "both"}, "pair='both'"),
        ({"readout": "max"}, "readout='max'"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"hybrid": True}, "patch_size=4"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**changes)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1, 12, 20\)"):
        network()(pictures()[:, :1])


# --- losses


def test_the_total_worked_by_hand_and_its_gradient() -> None:
    losses = torch.tensor([2.0, 1.5, 2.5], dtype=torch.float64)
    weights = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64, requires_grad=True)
    total = dynamic_total(dict(zip(BRANCHES, losses)), weights)
    (gradient,) = torch.autograd.grad(total, weights)
    assert float(total.detach()) == pytest.approx(2.933100, abs=1e-6)
    torch.testing.assert_close(gradient, 0.5 * (1 - torch.exp(-weights) * losses))
    assert gradient.tolist() == pytest.approx([-0.240818, -0.618869, -0.523413], abs=1e-6)
    smallest = dynamic_total(dict(zip(BRANCHES, losses)), losses.log())
    assert float(smallest) == pytest.approx(2.507452, abs=1e-6)


def test_a_branch_that_is_left_out_adds_nothing() -> None:
    weights = torch.tensor([0.3, 5.0, 7.0])
    assert float(dynamic_total({"sa": torch.tensor(2.0)}, weights)) == pytest.approx(0.5 * (2 * 0.7408182 + 0.3))


def test_the_triplet_loss_takes_the_farthest_positive_and_the_nearest_negative() -> None:
    features = torch.tensor([[0.0], [2.0], [5.0], [5.5]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    gaps = torch.tensor([2.0 - 5.0, 2.0 - 3.0, 0.5 - 3.0, 0.5 - 3.5])
    torch.testing.assert_close(batch_hard_triplet(features, labels), torch.nn.functional.softplus(gaps).mean())
    torch.testing.assert_close(batch_hard_triplet(features, labels, 2.0), (gaps + 2).relu().mean())
    alone = batch_hard_triplet(features, torch.zeros(4, dtype=torch.long))
    alone.backward()
    assert float(alone.detach()) == 0.0
    same = torch.zeros(4, 2, requires_grad=True)
    batch_hard_triplet(same, labels).backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


# --- metrics


def ranked(distances: Tensor, cameras: Tensor | None = None) -> dict[str, Tensor]:
    identities = torch.tensor([1, 2, 1, 2, 3, 1])
    own = torch.arange(6) % 3 if cameras is None else cameras
    return ranked_queries(distances, torch.tensor([1, 2, 9]), identities, torch.tensor([0, 0, 0]), own)


def test_the_list_worked_by_hand() -> None:
    distances = torch.arange(6.0)[None]
    match = torch.tensor([1, 0, 1, 0, 0, 1])
    found = ranked_queries(distances, torch.ones(1), match, torch.ones(1), torch.zeros(6))
    assert float(found["ap"]) == pytest.approx(0.722222, abs=1e-6)
    assert float(found["inp"]) == 0.5
    assert int(found["first"]) == 1


def test_a_monotone_transform_of_distances_changes_nothing() -> None:
    distances = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    expected = ranked(distances)
    for transform in (torch.exp, torch.sqrt, lambda d: 3 * d**3 - 7):
        assert all(torch.equal(value, ranked(transform(distances))[name]) for name, value in expected.items())


def test_items_of_the_querys_identity_and_camera_take_no_rank_and_queries_without_match_count_not() -> None:
    distances = torch.tensor([[0.0, 5.0, 1.0, 2.0, 3.0, 4.0]] * 3)
    found = ranked(distances)  # identity 1 is seen by the cameras 0, 2 and 2
    assert len(found["ap"]) == 2
    assert int(found["first"][0]) == 1
    assert float(found["ap"][0]) == pytest.approx((1 / 1 + 2 / 4) / 2)


def test_a_report_without_a_query_that_has_a_match() -> None:
    features, one, two = torch.zeros(2, 3), torch.tensor([1, 1]), torch.tensor([2, 2])
    report = retrieval_report(features, features, one, two, one, one)
    assert (report["mAP"], report["valid_queries"], report["cmc"][0]) == (0.0, 0, 0.0)
