"""Multiply-accumulates of every backbone whose authors publish them, counted beside the published figure.

    python benchmarks/macs.py [--only PATTERN] [--page FILE]

Nothing is timed: models and images are built without memory and the operations of one forward pass on one image are
counted. A published figure is taken to be right within its last digit. `--page` writes the table as a page of the
documentation.
"""

import argparse
import fnmatch
from pathlib import Path

import torch
from common import print_table

from gridattn.lab.bench import count_macs
from gridattn.models import create_model, list_models

# Billions of multiply-accumulates as the papers and the authors' repositories print them, which mostly say FLOPs.
PUBLISHED = {
    "nat_mini": "2.7", "nat_tiny": "4.3", "nat_small": "7.8", "nat_base": "13.7",
    "dinat_mini": "2.7", "dinat_tiny": "4.3", "dinat_small": "7.8", "dinat_base": "13.7", "dinat_large": "30.6",
    "dinat_large_384": "89.7", "dinat_large_384_11x11": "92.4", "dinat_s_tiny": "4.5", "dinat_s_small": "8.7",
    "dinat_s_base": "15.4", "dinat_s_large": "34.5", "dinat_s_large_384": "101.5", "nat_isotropic_small": "4.3",
    "nat_isotropic_base": "16.9", "dinat_isotropic_small": "4.3", "dinat_isotropic_base": "16.9",
    "vitrpb_small": "4.6", "vitrpb_base": "17.5",
    "van_b0": "0.9", "van_b1": "2.5", "van_b2": "5.0", "van_b3": "9.0", "van_b4": "12.2", "van_b5": "17.2",
    "van_b6": "38.9",
    "davit_tiny": "4.5", "davit_small": "8.8", "davit_base": "15.5", "davit_large": "103.0",
    "convit_tiny": "1", "convit_tiny_plus": "2", "convit_small": "5.4", "convit_small_plus": "10", "convit_base": "17",
    "convit_base_plus": "30",
    "maxvit_tiny_tf_224": "5.6", "maxvit_tiny_tf_384": "17.7", "maxvit_tiny_tf_512": "33.7",
    "maxvit_small_tf_224": "11.7", "maxvit_small_tf_384": "36.1", "maxvit_small_tf_512": "67.6",
    "maxvit_base_tf_224": "23.4", "maxvit_base_tf_384": "74.2", "maxvit_base_tf_512": "138.5",
    "maxvit_large_tf_224": "43.9", "maxvit_large_tf_384": "133.1", "maxvit_large_tf_512": "245.4",
    "maxvit_xlarge_tf_224": "97.8", "maxvit_xlarge_tf_384": "293.7", "maxvit_xlarge_tf_512": "535.2",
    "sgformer_s": "4.8", "sgformer_m": "7.5", "sgformer_b": "15.6",
    "agent_deit_t": "1.2", "agent_deit_s": "4.4", "agent_deit_s_448": "17.7", "agent_deit_b": "17.6",
    "agent_pvt_t": "2.0", "agent_pvt_s": "4.0", "agent_pvt_m": "7.0", "agent_pvt_m_256": "9.2", "agent_pvt_l": "10.4",
    "agent_swin_t": "4.5", "agent_swin_s": "8.7", "agent_swin_s_288": "14.6", "agent_swin_b": "15.4",
    "agent_swin_b_384": "46.3", "agent_cswin_t": "4.3", "agent_cswin_s": "6.8", "agent_cswin_b": "14.9",
    "agent_cswin_b_384": "46.3",
    "ppma_t": "2.7", "ppma_s": "4.9", "ppma_b": "10.6",
    "mobilenet_v1_100": "0.569", "mobilenet_v1_100_ulsam_11": "0.517", "mobilenet_v1_075": "0.325",
    "mobilenet_v1_075_ulsam_11": "0.296", "mobilenet_v1_050": "0.149", "mobilenet_v1_050_ulsam_11": "0.136",
    "mobilenet_v1_100_ulsam_after_11": "0.5692", "mobilenet_v1_100_ulsam_after_13": "0.5691",
    "mobilenet_v2_100": "0.300", "mobilenet_v2_100_ulsam_after_16": "0.30001", "mobilenet_v2_100_ulsam_13": "0.27734",
    "mobilenet_v2_100_ulsam_16": "0.28454", "mobilenet_v2_100_ulsam_10_13": "0.26706",
    "mobilenet_v2_100_ulsam_15_16": "0.26908", "mobilenet_v2_100_ulsam_13_16": "0.26188",
    "mobilenet_v2_100_ulsam_12_13_15_16": "0.22377",
    "pose_hrnet_w48_psa_p_256x192": "16",
}  # fmt: skip
SIZES = {"pose_hrnet_w48_psa_p_256x192": (256, 192), "davit_large": (384, 384)}
"""(height, width) where the published figure is not of the variant's own image size."""
REASONS = {
    "davit_tiny": "channel attention multiplies its C x C matrix into the output projection before it meets tokens, "
    "which gives the same result with fewer products; as the authors write it the network takes 4.522",
    "convit_*": "the published figure leaves out the two products inside attention, which no module holds",
    "maxvit_*_tf_[35]*": "all published figures but one are above our count, most where attention maps are largest: "
    "they seem to take in element-wise work such as the softmax",
    "maxvit_base_tf_224": "the paper prints 23.4 and the authors' repository 24.2 for the same network",
    "ppma_t": "our count takes in the scans that apply the mask; without them it is 2.696",
}
"""Pattern of names -> why the count differs by more than 2 % and the rounding of the published figure."""

COLUMNS = ("model", "image", "published", "counted", "why they differ")
INTRODUCTION = """# Multiply-accumulates

Billions of multiply-accumulates of one forward pass on one image: as published, mostly under the name of FLOPs, and as
counted here, with convolutions, linear layers and all products inside attention. Unless a note says why, the two agree
within 2 %, or the published figure is the count rounded.

    python benchmarks/macs.py --page docs/macs.md
"""


def within(published: str, counted: float) -> bool:
    """Whether a count is within 2 % of a published figure, or the figure is the count rounded."""
    value = float(published)
    return abs(counted / value - 1) <= 0.02 or round(counted, len(published.partition(".")[2])) == value


def count(name: str) -> tuple[float, tuple[int, int]]:
    """1e9 multiply-accumulates of a variant, and the image size that they are for."""
    with torch.device("meta"):
        model = create_model(name)
        size = SIZES.get(name) or model.default_cfg["input_size"][1:]
        return count_macs(model, torch.empty(1, 3, *size)) / 1e9, size


def row(name: str) -> tuple[str, ...]:
    """A variant's line of the table."""
    counted, (height, width) = count(name)
    reason = next((text for pattern, text in REASONS.items() if fnmatch.fnmatch(name, pattern)), "?")
    why = "" if within(PUBLISHED[name], counted) else reason
    return name, f"{height}x{width}", PUBLISHED[name], f"{counted:.3f}", why


def page(rows: list[tuple[str, ...]]) -> str:
    """The table as a page of the documentation, each reason once and below it."""
    reasons = list(dict.fromkeys(why for *_, why in rows if why))
    lines = ["| " + " | ".join((*COLUMNS[:-1], "")) + " |", "|---|---|---:|---:|---|"]
    for name, image, published, counted, why in rows:
        note = f"({reasons.index(why) + 1})" if why else ""
        lines.append(f"| `{name}` | {image} | {published} | {counted} | {note} |")
    notes = [f"{number}. {reason[0].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1)]
    return "\n".join((INTRODUCTION, *lines, "", "Where they differ by more:", "", *notes, ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    rows = [row(name) for name in fnmatch.filter(PUBLISHED, arguments.only)]
    print_table("1e9 multiply-accumulates", COLUMNS, rows)
    print(f"{len(list_models()) - len(PUBLISHED)} more variants have no published figure")
    if arguments.page:
        arguments.page.write_text(page(rows), encoding="utf-8")
    if open_ends := [name for name, *_, why in rows if why == "?"]:
        raise SystemExit(f"no reason is given why these differ: {', '.join(open_ends)}")


if __name__ == "__main__":
    main()
