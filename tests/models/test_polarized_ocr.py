"""Facts of segmentation with object-contextual representations."""

import pytest
import torch
from torch import nn

from gridattn.models import (
    CheckpointError,
    MultiScaleObjectContextNet,
    ObjectContextNet,
    PolarizedHRNet,
    create_model,
)
from gridattn.models.polarized_ocr import OFFICIAL_NAMES


def small(family: type[ObjectContextNet] = MultiScaleObjectContextNet) -> ObjectContextNet:
    torch.manual_seed(0)
    body = PolarizedHRNet(8, depths=(1, 1, 1, 1), blocks=1, layout="sequential", num_classes=0)
    model = family(body, 5, 16, 8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    ("body", "family", "count"),
    [
        ("hrnet_w48_psa_s", ObjectContextNet, 75_757_222),
        ("hrnet_w48_psa_p", ObjectContextNet, 76_727_878),
        ("hrnet_w48_psa_s", MultiScaleObjectContextNet, 77_527_974),
        ("hrnet_w48_psa_p", MultiScaleObjectContextNet, 78_498_630),
    ],
)
def test_parameters_are_those_of_the_published_network(body, family, count) -> None:
    with torch.device("meta"):
        model = family(create_model(body, num_classes=0), num_classes=19)
    assert sum(p.numel() for p in model.parameters()) == count


def test_scores_have_the_size_of_the_image_at_each_scale() -> None:
    result = small()(torch.randn(2, 3, 45, 70), scales=(0.5, 1.0, 1.5))
    sizes = {"05x": (22, 35), "10x": (45, 70), "15x": (67, 105)}
    for label, size in sizes.items():
        assert result[f"pred_{label}"].shape == (2, 5, *size)
        assert result[f"attn_{label}"].shape == (2, 1, *size)
    assert result["pred"].shape == result["aux"].shape == (2, 5, 45, 70)


def test_one_scale_is_the_network_without_attention_over_scales() -> None:
    model = small()
    images = torch.randn(1, 3, 40, 32)
    plain = ObjectContextNet.forward(model, images)
    result = model(images, scales=(1.0,))
    assert torch.equal(result["pred"], plain["pred"])
    assert torch.equal(result["aux"], plain["aux"])


@pytest.mark.parametrize(("bias", "scale"), [(40.0, "05x"), (-40.0, "10x")])
def test_the_attention_of_the_smaller_size_decides_which_size_counts(bias, scale) -> None:
    model = small()
    gate = model.get_submodule("scale_attention.2")
    gate.register_forward_hook(lambda _m, args, _out: torch.full_like(args[0][:, :1], bias))
    result = model(torch.randn(1, 3, 40, 32))
    expected = nn.functional.interpolate(result[f"pred_{scale}"], (40, 32), mode="bilinear")
    torch.testing.assert_close(result["pred"], expected)


def test_pixels_attend_to_classes_with_weights_that_sum_to_one() -> None:
    model = small(ObjectContextNet)
    pixels, classes = torch.randn(2, 16, 6, 7), torch.randn(2, 16, 1, 1).expand(2, 16, 5, 1)
    # Where all class vectors are one and the same, every pixel gets that one's value.
    expected = model.context(model.value(classes[:, :, :1]).expand(2, 8, 6, 7))
    torch.testing.assert_close(model.attend(pixels, classes), expected)


def test_published_names_load_strictly() -> None:
    model, other = small(), small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    theirs = {ours: name for name, ours in OFFICIAL_NAMES.items()}
    state = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if not name.endswith("num_batches_tracked"):
            state[f"{theirs[module]}.{leaf}" if module in theirs else name.replace("body.", "backbone.", 1)] = tensor
    assert {"ocr.cls_head.bias", "ocr.conv3x3_ocr.1.0.weight", "scale_attn.bn1.running_mean"} <= set(state)
    other.load_official(state)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(x)["pred"], model(x)["pred"])
    del state["ocr.cls_head.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(head.bias\)"):
        other.load_official(state)


def test_scales_need_the_image_itself() -> None:
    with pytest.raises(ValueError, match=r"scales=\(0.5, 2.0\) is not allowed"):
        small()(torch.randn(1, 3, 32, 32), scales=(0.5, 2.0))
