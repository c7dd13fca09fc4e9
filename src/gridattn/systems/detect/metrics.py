"""COCO's average precision of boxes and masks."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

_NAMES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
    "mar_1": "ar_1",
    "mar_10": "ar_10",
    "mar_100": "ar_100",
    "mar_small": "ar_small",
    "mar_medium": "ar_medium",
    "mar_large": "ar_large",
}


class AveragePrecision(nn.Module):
    """COCO's twelve numbers, for boxes and, with masks, for masks.

    AP is the mean over the classes and over the overlaps 0.50, 0.55 .. 0.95 of the area under the curve of precision
    over recall; AP50 and AP75 are those at one overlap; small objects have less than 32^2 pixels, large ones more than
    96^2; AR is the recall with at most 1, 10 or 100 detections of an image. Crowds are neither hits nor misses.

    Computed by torchmetrics with faster-coco-eval, over all processes of a training.

    Args:
        masks: whether masks are measured too.
    """

    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.kinds = {"bbox": "box", "segm": "mask"} if masks else {"bbox": "box"}
        self.metric = MeanAveragePrecision(
            iou_type=("bbox", "segm") if masks else "bbox", class_metrics=True, backend="faster_coco_eval"
        )
        self.metric.warn_on_many_detections = False

    def update(self, found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        """Adds images: what `Detector` found in them and their targets (`ObjectSamples`)."""
        names = ["boxes", "scores", "labels"]
        if "segm" in self.kinds:
            names.append("masks")
        predictions = [{name: one[name] for name in names} for one in found]
        names = ["iscrowd" if name == "scores" else name for name in names]
        truth = [{**{name: one[name] for name in names}, "area": one["area"]} for one in targets]
        for one in [*predictions, *truth]:
            if "masks" in one:
                one["masks"] = one["masks"].bool()
        self.metric.update(predictions, truth)

    def compute(self, classes: list[str] | None = None) -> dict[str, Any]:
        """The numbers by name, such as `box_ap50`; those that no object of the dataset decides are left out.

        Args:
            classes: names by label; the AP of each is then added as `box_ap_per_class`.
        """
        values = self.metric.compute()
        several = len(self.kinds) > 1
        report: dict[str, Any] = {}
        for kind, name in self.kinds.items():
            prefix = f"{kind}_" if several else ""
            for theirs, ours in _NAMES.items():
                value = float(values[prefix + theirs])
                if value >= 0:
                    report[f"{name}_{ours}"] = value
            if classes is not None:
                per_class = torch.atleast_1d(values[f"{prefix}map_per_class"]).tolist()
                labels = torch.atleast_1d(values["classes"]).tolist()
                known = {classes[label]: value for label, value in zip(labels, per_class)}
                report[f"{name}_ap_per_class"] = {c: v for c, v in known.items() if v >= 0}
        return report

    def reset(self) -> None:
        """Forgets all images."""
        self.metric.reset()


def nothing_found(image: Tensor, masks: bool) -> dict[str, Tensor]:
    """A detector's answer for an image (3, H, W) in which it finds nothing."""
    found = {"boxes": image.new_zeros(0, 4), "scores": image.new_zeros(0), "labels": image.new_zeros(0).long()}
    if masks:
        found["masks"] = image.new_zeros(0, *image.shape[1:]).bool()
    return found
