"""The detectors: pyramids of any backbone, anchors, losses and sampling, and one interface for all three."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss

from gridattn.systems.detect import Detector, build_detector
from gridattn.systems.detect.losses import box_losses, mask_loss
from gridattn.systems.detect.model import DETECTORS
from gridattn.systems.detect.pyramid import Pyramid, StridedAnchors
from gridattn.systems.detect.rcnn import ImageSampler

NETWORK: dict[str, Any] = {
    "backbone": "grid_vit_4stage_micro",
    "num_classes": 3,
    "image_size": 32,
    "max_size": 64,
    "channels": 8,
    "head_dim": 16,
    "levels": 3,
    "finest": 8,
    "options": {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "attention": "window"},
}


@pytest.fixture(params=DETECTORS)
def detector(request: pytest.FixtureRequest) -> Detector:
    torch.manual_seed(0)
    return build_detector(detector=request.param, **NETWORK)


def _target(*boxes: list[float], size: tuple[int, int] = (32, 32), seed: int = 0) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    box = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {"boxes": box, "labels": torch.arange(len(boxes)) % 3, "masks": masks, "seed": torch.tensor(seed)}


@pytest.mark.parametrize(
    ("backbone", "finest", "learned", "strides"),
    [
        ("van_b0", 4, False, [4, 8, 16, 32, 64]),
        ("van_b0", 8, True, [8, 16, 32, 64, 128]),
        ("mobilenet_v1_050_ulsam_11", 4, False, [4, 8, 16, 32, 64]),
        ("grid_vit_micro", 8, True, [4, 8, 16, 32, 64]),
    ],
)
def test_a_pyramid_has_its_strides_whatever_maps_the_backbone_gives(
    backbone: str, finest: int, learned: bool, strides: list[int]
) -> None:
    pyramid = Pyramid(backbone, channels=4, finest=finest, learned=learned)
    assert pyramid.strides == strides
    with torch.no_grad():
        maps = pyramid.eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps.values()] == [(1, 4, -(-64 // s), -(-96 // s)) for s in strides]


def test_every_parameter_of_a_pyramid_is_used() -> None:
    pyramid = Pyramid("grid_vit_4stage_micro", channels=4, levels=4, finest=8, learned=True)
    sum(x.square().sum() for x in pyramid(torch.randn(1, 3, 64, 64)).values()).backward()  # pyright: ignore
    assert all(p.grad is not None for p in pyramid.parameters())


def test_anchors_stand_on_the_grid_of_their_stride_also_where_it_does_not_divide_the_image() -> None:
    anchors = StridedAnchors([32], scale=1, octaves=3)
    image = ImageList(torch.zeros(1, 3, 40, 100), [(40, 100)])
    found = anchors(image, [torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)])[0]
    assert found.dtype == torch.float32
    centres = ((found[:, :2] + found[:, 2:]) / 2).view(2, 4, 9, 2)
    assert torch.equal(centres[1, 3, 0], torch.tensor([96.0, 32.0]))
    sides = (found[:9, 2:] - found[:9, :2]).prod(1).sqrt()
    assert torch.allclose(sides.sort().values.view(3, 3).mean(1), 32 * 2 ** (torch.arange(3) / 3), rtol=0.03)


def test_losses_train_and_an_image_without_objects_has_one_too(detector: Detector) -> None:
    images = [torch.rand(3, 32, 32), torch.rand(3, 20, 27)]
    targets = [_target([2, 3, 20, 28]), _target(size=(20, 27))]
    losses = detector.train()(images, targets)
    assert len(losses) == {"retinanet": 2, "faster_rcnn": 4, "mask_rcnn": 5}[_kind(detector)]
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = detector([images[1]], [targets[1]])
    assert all(torch.isfinite(value) for value in alone.values())


def _kind(detector: Detector) -> str:
    if not hasattr(detector.net, "roi_heads"):
        return "retinanet"
    return "mask_rcnn" if detector.has_masks else "faster_rcnn"


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (33, 70), (120, 9)])
def test_what_is_found_has_the_pixels_of_the_image_and_does_not_depend_on_the_batch(
    detector: Detector, size: tuple[int, int]
) -> None:
    detector.eval().set_thresholds(score=0.0, count=5)
    images = [torch.rand(3, *size), torch.rand(3, 40, 24)]
    with torch.no_grad():
        together, alone = detector(images)[0], detector(images[:1])[0]
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert len(alone["boxes"]) <= 5
    limit = torch.tensor([size[1], size[0]] * 2)
    assert (alone["boxes"] >= 0).all()
    assert (alone["boxes"] <= limit + 1e-3).all()
    assert ((alone["labels"] >= 0) & (alone["labels"] < 3)).all()
    if detector.has_masks:
        assert alone["masks"].shape == (len(alone["boxes"]), *size)
        assert alone["masks"].dtype == torch.bool


def test_sampling_is_decided_by_the_seed_of_the_image_alone(detector: Detector) -> None:
    detector.train()
    images, targets = [torch.rand(3, 32, 32)], [_target([2, 3, 20, 28], seed=7)]
    torch.manual_seed(1)
    first = detector(images, targets)
    torch.manual_seed(2)
    second = detector(images, targets)
    assert all(torch.equal(first[name], second[name]) for name in first)

    sampler = ImageSampler(4, 0.5)
    labels = [torch.tensor([1, 0, 1, 0, 0, 1, -1, 0] * 8), torch.tensor([0, 1] * 20)]
    sampler.seeds = [3, 4]
    (one, two), _ = sampler(labels)
    sampler.seeds = [4, 3]
    (two_again, one_again), _ = sampler(labels[::-1])
    assert torch.equal(one, one_again)
    assert torch.equal(two, two_again)
    assert int(one.sum()) == 2


def test_losses_on_regions_are_those_of_torchvision_in_one_process_but_l1_for_boxes() -> None:
    torch.manual_seed(0)
    logits, deltas, labels, target = (
        torch.randn(6, 4),
        torch.randn(6, 16),
        torch.tensor([0, 1, 3, 0, 2, 1]),
        torch.randn(6, 4),
    )
    theirs, _ = fastrcnn_loss(logits, deltas, [labels], [target])
    ours, box = box_losses(logits, deltas, labels, target)
    assert torch.allclose(ours, theirs)
    own = deltas.view(6, 4, 4)[torch.arange(6), labels]
    assert torch.allclose(box, (own - target)[labels > 0].abs().sum() / 6)
    target_of = _target([2, 3, 20, 28], [4, 4, 9, 30])
    regions, objects = [torch.tensor([[2.0, 2, 22, 30], [3, 3, 10, 28]])], [torch.tensor([0, 1])]
    mask_logits = torch.randn(2, 4, 28, 28)
    given = (mask_logits, regions, [target_of["masks"]], [target_of["labels"] + 1], objects)
    assert torch.allclose(mask_loss(*given), maskrcnn_loss(*given))


def test_a_detector_learns_one_image_by_heart() -> None:
    torch.manual_seed(0)
    detector = build_detector(detector="mask_rcnn", **NETWORK | {"anchor_scale": 2.0}).train()
    image = torch.zeros(3, 32, 32)
    image[:, 8:24, 4:20] = 1
    optimizer = torch.optim.AdamW(detector.parameters(), 5e-3)
    for step in range(60):
        optimizer.zero_grad()
        losses = detector([image], [_target([4, 8, 20, 24], seed=step)])
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        found = detector.eval()([image])[0]
    assert found["scores"][0] > 0.5
    assert found["labels"][0] == 0
    assert (found["boxes"][0] - torch.tensor([4.0, 8, 20, 24])).abs().max() < 3
    mask = _target([4, 8, 20, 24])["masks"][0].bool()
    assert (found["masks"][0] & mask).sum() / (found["masks"][0] | mask).sum() > 0.6


@pytest.mark.parametrize(
    ("backbone", "detector", "millions"),
    [
        ("van_b0", "mask_rcnn", 23.9),
        ("van_b2", "mask_rcnn", 46.2),
        ("van_b0", "retinanet", 13.4),
        ("van_b2", "retinanet", 36.3),
        ("davit_tiny", "retinanet", 38.5),
    ],
)
def test_parameters_for_coco_are_as_many_as_the_papers_count(backbone: str, detector: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_detector(backbone, 80, detector=detector)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="detector='yolo' is not"):
        build_detector(detector="yolo", **NETWORK)
    with pytest.raises(ValueError, match="levels=1 is not allowed; 'grid_vit_4stage_micro' gives 2 maps"):
        build_detector(**NETWORK | {"levels": 1})
    with pytest.raises(ValueError, match="head_groups=3 is for retinanet, and has to divide channels=8"):
        build_detector(**NETWORK | {"detector": "retinanet", "head_groups": 3})
    with pytest.raises(ValueError, match="model='nowhere' is not known"):
        build_detector(**NETWORK | {"backbone": "nowhere"})
