"""One record a paper: what it is called, where it stands, and what in this package implements it.

The state of a paper is not written here. It is computed from the registers: a paper counts as implemented where a
registered attention and registered models name its arXiv id as their source, and where its systems exist.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec


@dataclass(frozen=True)
class Paper:
    """A paper of the collection.

    Attributes:
        slug: short name.
        title: full title.
        year: year of publication.
        arxiv: arXiv id.
        summary: one line on what it does.
        further: arXiv ids of the same line of work.
        layer: whether it has a mechanism of its own that belongs in the register of attentions.
        backbone: whether it has backbones that belong in the register of models.
        systems: slugs of task systems.
        modules: modules of this package.

    Example:
        >>> find_paper("halonet").status in ("whole", "part", "absent")
        True
    """

    slug: str
    title: str
    year: int
    arxiv: str
    summary: str
    further: tuple[str, ...] = ()
    layer: bool = False
    backbone: bool = False
    systems: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def available(self) -> tuple[str, ...]:
        """Names of what exists: attentions, models, systems, modules."""
        return self._parts[0]

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts that belong to the paper and do not exist."""
        return self._parts[1]

    @property
    def status(self) -> str:
        """`whole` (every part exists), `part`, or `absent`."""
        if not self.available:
            return "absent"
        return "part" if self.missing else "whole"

    @cached_property
    def _parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        from gridattn.layers import attention_info, list_attentions
        from gridattn.models import list_models, model_info
        from gridattn.systems import list_systems

        layers = [name for name in list_attentions() if self._owns(attention_info(name).source)]
        models = [name for name in list_models() if self._owns(model_info(name).source)]
        systems = [name for name in self.systems if name in list_systems()]
        modules = [name for name in self.modules if find_spec(name)]
        missing = [
            *(["attention layer"] if self.layer and not layers else []),
            *(["backbone"] if self.backbone and not models else []),
            *(f"system {name}" for name in self.systems if name not in systems),
            *(f"module {name}" for name in self.modules if name not in modules),
        ]
        return (*layers, *models, *systems, *modules), tuple(missing)

    def _owns(self, source: str) -> bool:
        return any(number in source for number in (self.arxiv, *self.further))


def find_paper(slug: str) -> Paper:
    """The record of one paper.

    Raises:
        ValueError: an unknown slug.
    """
    for paper in PAPERS:
        if paper.slug == slug:
            return paper
    raise ValueError(f"paper {slug!r} is not known; allowed: {', '.join(paper.slug for paper in PAPERS)}")


PAPERS: tuple[Paper, ...] = (
    Paper(
        "neighborhood-attention",
        "Faster Neighborhood Attention; Neighborhood Attention Transformer; Dilated Neighborhood Attention Transformer",
        2024,
        "2403.04690",
        "each position attends to a window around itself, with stride, dilation and causality per axis",
        further=("2204.07143", "2209.15001", "2504.16922"),
        layer=True,
        backbone=True,
    ),
    Paper(
        "gna-simulator",
        "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        2025,
        "2504.16922",
        "analytical speed-up model of strided neighborhood attention: tiles visited, bounds",
        modules=("gridattn.lab.simulate",),
    ),
    Paper(
        "agent-attention",
        "Agent Attention: On the Integration of Softmax and Linear Attention",
        2024,
        "2312.08874",
        "a few agent tokens gather from and broadcast to all positions, at linear cost",
        layer=True,
        backbone=True,
    ),
    Paper(
        "attnet",
        "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
        2025,
        "2510.20092",
        "depthwise kernels generated from the whole feature map, with lateral inhibition",
        layer=True,
        backbone=True,
    ),
    Paper(
        "convit",
        "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
        2021,
        "2103.10697",
        "gated positional self-attention that starts as a convolution",
        layer=True,
        backbone=True,
    ),
    Paper(
        "croma",
        "CROMA: Remote Sensing Representations with Contrastive Radar-Optical Masked Autoencoders",
        2023,
        "2311.00566",
        "self-supervised radar and optical encoders with distance biases on the grid",
        layer=True,
        backbone=True,
        systems=("croma",),
    ),
    Paper(
        "csa",
        "Class Semantics-based Attention for Action Detection",
        2021,
        "2109.02613",
        "temporal action detection with attention computed from class-semantic features",
        systems=("csa",),
    ),
    Paper(
        "davit",
        "DaViT: Dual Attention Vision Transformers",
        2022,
        "2204.03645",
        "window attention among positions alternating with group attention among channels",
        layer=True,
        backbone=True,
    ),
    Paper(
        "dcal",
        "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
        2022,
        "2205.02151",
        "global-local and pair-wise cross-attention on a plain vision transformer",
        systems=("dcal",),
    ),
    Paper(
        "diffportrait3d",
        "DiffPortrait3D: Controllable Diffusion for Zero-Shot Portrait View Synthesis",
        2024,
        "2312.13016",
        "one portrait to consistent novel views by reference-, pose- and view-conditioned diffusion",
        systems=("diffportrait3d",),
    ),
    Paper(
        "epit",
        "Learning Non-Local Spatial-Angular Correlation for Light Field Image Super-Resolution",
        2023,
        "2302.08058",
        "light-field super-resolution by transformers on epipolar-plane images",
        systems=("epit",),
    ),
    Paper(
        "group-pose",
        "Group Pose: A Simple Baseline for End-to-End Multi-person Pose Estimation",
        2023,
        "2308.07313",
        "all people's keypoints in one pass with group self-attention and deformable sampling",
        systems=("group-pose",),
    ),
    Paper(
        "halonet",
        "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        2021,
        "2103.12731",
        "blocks of queries attend to their block plus a halo",
        layer=True,
        backbone=True,
    ),
    Paper(
        "joint-ssl",
        "Joint Self-Supervised Image-Volume Representation Learning with Intra-Inter Contrastive Clustering",
        2023,
        "2212.01893",
        "one encoder from unlabelled medical images and volumes, deformable attention over slices",
        systems=("joint-ssl",),
    ),
    Paper(
        "l-sfan",
        "L-SFAN: Lightweight Spatially-focused Attention Network for Pain Behavior Detection",
        2024,
        "2406.16913",
        "2-D filters, oriented pooling and attention across body-worn sensors",
        systems=("l-sfan",),
    ),
    Paper(
        "lamamba-diff",
        "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba",
        2024,
        "2408.02615",
        "latent diffusion U-Net of window attention and four-direction selective scan",
        systems=("lamamba-diff",),
    ),
    Paper(
        "lscenellm",
        "LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences",
        2025,
        "2412.01292",
        "question answering in large 3-D scenes that looks closer where the language model attends",
        systems=("lscenellm",),
    ),
    Paper(
        "maxvit",
        "MaxViT: Multi-Axis Vision Transformer",
        2022,
        "2204.01697",
        "block attention and dilated grid attention after each MBConv",
        layer=True,
        backbone=True,
    ),
    Paper(
        "medusa",
        "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture "
        "for Medical Image Analysis",
        2022,
        "2110.06063",
        "one global spatial attention map injected at four depths of a classifier",
        systems=("medusa",),
    ),
    Paper(
        "monoxiver",
        "Monocular 3D Object Detection with Bounding Box Denoising in 3D by Perceiver",
        2023,
        "2304.01289",
        "oriented 3-D boxes from one image, refined by a Perceiver over copies of each box",
        systems=("monoxiver",),
    ),
    Paper(
        "ms-occ",
        "MS-Occ: Multi-Stage LiDAR-Camera Fusion for 3D Semantic Occupancy Prediction",
        2025,
        "2504.15888",
        "occupancy grid around a car from cameras and LiDAR",
        systems=("ms-occ",),
    ),
    Paper(
        "oat",
        "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction",
        2024,
        "2407.13335",
        "which objects of a shelf the eyes fixate, in order, during visual search",
        systems=("oat",),
    ),
    Paper(
        "ppma",
        "Polyline Path Masked Attention for Vision Transformer",
        2025,
        "2506.15940",
        "attention with a content-dependent decay along horizontal-vertical paths",
        layer=True,
        backbone=True,
    ),
    Paper(
        "psa",
        "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
        2021,
        "2107.00782",
        "a channel branch and a spatial branch at full resolution, for pose and segmentation",
        layer=True,
        systems=("psa-pose", "psa-segmentation"),
    ),
    Paper(
        "routing-transformer",
        "Efficient Content-Based Sparse Attention with Routing Transformers",
        2020,
        "2003.05997",
        "queries attend to keys of the same cluster of an online k-means",
        layer=True,
        systems=("routing-transformer",),
    ),
    Paper(
        "selfpose3d",
        "SelfPose3d: Self-Supervised Multi-Person Multi-View 3d Pose Estimation",
        2024,
        "2404.02041",
        "3-D poses from calibrated cameras, trained without 3-D or 2-D ground truth",
        systems=("selfpose3d",),
    ),
    Paper(
        "sg-former",
        "SG-Former: Self-guided Transformer with Evolving Token Reallocation",
        2023,
        "2308.12216",
        "keys and values gathered finely where a significance map says so",
        layer=True,
        backbone=True,
    ),
    Paper(
        "tic",
        "TiC: Exploring Vision Transformer in Convolution",
        2023,
        "2310.04134",
        "single-head attention over a dilated k x k neighbourhood, zero logits outside the image",
        layer=True,
        backbone=True,
    ),
    Paper(
        "ulsam",
        "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
        2020,
        "2006.15102",
        "one spatial softmax map for each sub-space of channels",
        layer=True,
        backbone=True,
    ),
    Paper(
        "van",
        "Visual Attention Network",
        2022,
        "2202.09741",
        "a gate from decomposed large-kernel convolutions",
        layer=True,
        backbone=True,
    ),
    Paper(
        "vcd-texture",
        "VCD-Texture: Variance Alignment based 3D-2D Co-Denoising for Text-Guided Texturing",
        2024,
        "2407.04461",
        "text-guided mesh texturing by denoising all views together",
        systems=("vcd-texture",),
    ),
    Paper(
        "vitgaze",
        "ViTGaze: Gaze Following with Interaction Features in Vision Transformers",
        2024,
        "2403.12778",
        "where a person in the image looks, from the attention maps of a plain ViT",
        systems=("vitgaze",),
    ),
)
