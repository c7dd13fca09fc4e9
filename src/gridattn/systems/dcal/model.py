"""DCAL: a plain vision transformer with a global-local branch and, in training, a pair-wise branch.

                                  blocks 1 .. L-M           blocks L-M+1 .. L
    images -> patches, CLS  --X_0--> self-attention --X_(L-M)--> self-attention --> norm, CLS, head          (SA)
                                              CLS + R patches -> M local blocks --> norm, CLS or mean, head  (GLCA)
    in training, the last T blocks once more, with the tokens of a partner image --> norm, CLS, head         (PWCA)

Source: Zhu et al., Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification,
CVPR 2022, arXiv 2205.02151.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.global_local import DualCrossBlock, select_tokens
from gridattn.models.common import drop_path_rates, init_linear
from gridattn.ops.common import check_choice, check_probability, per_axis
from gridattn.ops.rollout import count_of, rollout_row, share_of
from gridattn.systems.dcal.backbone import ViT

READOUTS = ("cls", "local_mean")
PAIRS = ("stream", "figure")
BRANCHES = ("sa", "glca", "pwca")


class Branches(NamedTuple):
    """What the branches give, by their names `sa`, `glca` and `pwca`.

    Attributes:
        features: (B, D) each, normalised.
        logits: (B, num_classes) each.
    """

    features: dict[str, Tensor]
    logits: dict[str, Tensor]


class Selection(NamedTuple):
    """What the global-local branch looks at.

    Attributes:
        response: (B, h, w), what the class token owes to each patch by the rollout of the blocks below the branch.
        index: (B, 1 + R), the selected tokens; 0 is the class token, patch p is 1 + p in row-major order.
        tokens: (B, 1 + R, D), what the branch makes of them, before its norm; None without the branch.
    """

    response: Tensor
    index: Tensor
    tokens: Tensor | None


class DCAL(nn.Module):
    """A vision transformer trained by dual cross-attention.

    Parameters are named as in timm's vision transformers, under `backbone.`; `glca.0.` and so on are blocks of the same
    names. The pair-wise branch has no parameters of its own but the third of `loss_w`.

    Args:
        num_classes: classes, or identities of the training set.
        img_size: nominal height and width; images of other sizes get interpolated position embeddings.
        patch_size: side of the patches.
        embed_dim: channels D.
        depth: blocks L.
        num_heads: heads.
        mlp_ratio: channels inside the feed-forwards, as a multiple of `embed_dim`.
        hybrid: puts the first three stages of a ResNet-50 before the patches; `patch_size` is then 16.
        ratio: part of the patches that the global-local branch selects, in (0, 1].
        glca_depth: blocks M of the global-local branch, beside the last M; 0 leaves it out.
        pwca_depth: blocks T that the pair-wise branch runs through, the last ones; None for all, 0 leaves it out.
        pair: what of the partner is attended to, `stream` or `figure` (see `paired`).
        readout: `cls` reads the class token of the global-local branch, `local_mean` the mean of its tokens.
        neck: batch normalisation without offset between features and heads, for re-identification.
        drop_path_rate: stochastic depth, growing linearly to this rate.

    Raises:
        ValueError: a setting outside its range.

    Example:
        >>> model = DCAL(5, img_size=(12, 20), patch_size=4, embed_dim=24, depth=3, num_heads=3)
        >>> images = torch.randn(4, 3, 12, 20)
        >>> {name: y.shape for name, y in model(images, partner=torch.tensor([2, 3, 0, 1])).logits.items()}
        {'sa': torch.Size([4, 5]), 'glca': torch.Size([4, 5]), 'pwca': torch.Size([4, 5])}
        >>> list(model(images).logits)
        ['sa', 'glca']
    """

    def __init__(
        self,
        num_classes: int,
        img_size: int | Sequence[int] = 448,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        *,
        hybrid: bool = False,
        ratio: float = 0.1,
        glca_depth: int = 1,
        pwca_depth: int | None = None,
        pair: str = "stream",
        readout: str = "cls",
        neck: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "depth": depth}.items():
            per_axis(value, 1, name)
        check_choice("pair", pair, PAIRS)
        check_choice("readout", readout, READOUTS)
        check_probability("drop_path_rate", drop_path_rate)
        pwca_depth = depth if pwca_depth is None else pwca_depth
        for name, value, most in (("glca_depth", glca_depth, depth - 1), ("pwca_depth", pwca_depth, depth)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ValueError(f"{name}={value!r} is not allowed; it must be an int from 0 to {most}")
        self.num_classes, self.ratio, self.part = num_classes, ratio, share_of(ratio)
        self.glca_depth, self.pwca_depth, self.pair, self.readout = glca_depth, pwca_depth, pair, readout
        rates = drop_path_rates(drop_path_rate, (depth,))[0]
        self.backbone = ViT(img_size, patch_size, embed_dim, num_heads, mlp_ratio, rates, hybrid=hybrid)
        self.head = nn.Linear(embed_dim, num_classes)
        self.bnneck = _neck(embed_dim) if neck else nn.Identity()
        if glca_depth:
            self.glca = nn.ModuleList(
                DualCrossBlock(embed_dim, num_heads, mlp_ratio, rate) for rate in rates[depth - glca_depth :]
            )
            self.glca_norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.glca_head = nn.Linear(embed_dim, num_classes)
            self.glca_bnneck = _neck(embed_dim) if neck else nn.Identity()
        self.loss_w = nn.Parameter(torch.zeros(3))
        self.apply(init_linear)

    def forward(self, images: Tensor, partner: Tensor | None = None) -> Branches:
        """Features and logits of the branches.

        Args:
            images: (B, 3, H, W).
            partner: (B) int64, the number of each image's partner in the batch; None, or `pwca_depth=0`, leaves the
                pair-wise branch out.
        """
        streams = self.backbone.streams(images)
        features = {"sa": self.backbone.norm(self.backbone.last(streams[-1]))}
        if self.glca_depth:
            features["glca"] = self.read_out(self.local(streams))
        if partner is not None and self.pwca_depth:
            features["pwca"] = self.backbone.norm(self.paired(streams, partner))
        return Branches(features, {name: self.classify(name, feature) for name, feature in features.items()})

    def classify(self, branch: str, feature: Tensor) -> Tensor:
        """(B, D) -> logits (B, num_classes) of the head of a branch; SA and PWCA share one."""
        if branch == "glca":
            return self.glca_head(self.glca_bnneck(feature))
        return self.head(self.bnneck(feature))

    def local(self, streams: Sequence[Tensor], index: Tensor | None = None) -> Tensor:
        """The global-local branch: selected tokens attend to all tokens of the stream beside them.

            Z_0 = X_(L-M)[selected],   Z_m = block_m(Z_(m-1), keys and values of X_(L-M+m-1))

        Every token takes its own way, so that the class token does not depend on what else is selected.

        Args:
            streams: X_0 to X_(L-1), (B, 1 + N, D) each.
            index: (B, 1 + R), the selected tokens; None takes what the read-out needs.

        Returns:
            (B, 1 + R, D), the class token first; (B, 1, D) where the read-out needs no other.
        """
        start = len(streams) - self.glca_depth
        if index is None and self.readout == "cls":
            tokens = streams[start][:, :1]
        else:
            index = self.selected(streams) if index is None else index
            tokens = streams[start].gather(1, index.unsqueeze(-1).expand(-1, -1, streams[start].shape[-1]))
        for block, stream in zip(self.glca, streams[start:]):
            tokens = block(tokens, context=stream)
        return tokens

    def read_out(self, tokens: Tensor) -> Tensor:
        """(B, 1 + R, D) of the global-local branch -> its feature (B, D)."""
        normed = self.glca_norm(tokens)
        return normed[:, 0] if self.readout == "cls" else normed.mean(1)

    def paired(self, streams: Sequence[Tensor], partner: Tensor) -> Tensor:
        """The pair-wise branch: the last T blocks once more, each image attending to itself and to its partner.

            stream:  P <- block(P; keys and values of [P, X_t of the partner]),    P_0 = X_(L-T)
            figure:  P <- block(X_t; keys and values of [X_t, P]),                 P_0 = X_(L-T) of the partner

        Args:
            streams: X_0 to X_(L-1), (B, 1 + N, D) each.
            partner: (B) int64, the number of each image's partner in the batch.

        Returns:
            (B, D), the class token after the last block.
        """
        start = len(streams) - self.pwca_depth
        blocks: list[Any] = list(self.backbone.blocks)[start:]
        tokens = streams[start] if self.pair == "stream" else streams[start][partner]
        for number, (block, stream) in enumerate(zip(blocks, streams[start:]), start=1):
            own, other = (tokens, stream[partner]) if self.pair == "stream" else (stream, tokens)
            # Only the class token leaves the last block.
            tokens = block(own[:, :1] if number == len(blocks) else own, context=own, partner=other)
        return tokens[:, 0]

    def attentions(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Attention (B, 1, 1 + N, 1 + N), averaged over heads, of the blocks below the global-local branch."""
        below: list[Any] = list(self.backbone.blocks)[: len(streams) - self.glca_depth]
        return [block.attention(x).mean(1, keepdim=True) for block, x in zip(below, streams)]

    @torch.no_grad()
    def selected(self, streams: Sequence[Tensor]) -> Tensor:
        """Indices (B, 1 + R) of the class token and of the patches to which the rollout gives most of it."""
        return select_tokens(streams[0], self.attentions(streams), self.ratio)[1]

    @torch.no_grad()
    def selection(self, images: Tensor) -> Selection:
        """What the global-local branch looks at in images (B, 3, H, W)."""
        streams = self.backbone.streams(images)
        attentions = self.attentions(streams)
        response = rollout_row(attentions)[:, 1:].unflatten(1, self.backbone.grid_of(images))
        index = select_tokens(streams[0], attentions, self.ratio)[1]
        return Selection(response, index, self.local(streams, index) if self.glca_depth else None)

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (B, num_classes): the mean of softmax over SA and GLCA."""
        logits = self(images).logits
        return torch.stack([y.float().softmax(-1) for y in logits.values()]).mean(0)

    def embedding(self, images: Tensor) -> Tensor:
        """The vector by which images are compared, (B, 2 D) or (B, D) without GLCA: features joined, of length 1."""
        return F.normalize(torch.cat([f.float() for f in self(images).features.values()], dim=-1), dim=-1)

    def start_local(self) -> None:
        """Copies the last blocks and the norm of self-attention into the global-local branch, as after pre-training."""
        if self.glca_depth:
            for local, block in zip(self.glca, list(self.backbone.blocks)[-self.glca_depth :]):
                local.load_state_dict(block.state_dict())
            self.glca_norm.load_state_dict(self.backbone.norm.state_dict())

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone besides biases and norms."""
        return {"backbone.cls_token", "backbone.pos_embed"}

    def macs(self, size: Sequence[int]) -> dict[str, int]:
        """Multiply-accumulates of one image of a size (height, width): `sa` (patches and L blocks) and `glca`.

        Both count R + 1 local queries and all tokens of every block; the stem of a hybrid is not counted. The class
        token alone, which is what `forward` computes of the last block and, by default, of the branch, costs less.
        """
        n, dim = prod(self.backbone.grid_for(size)), self.backbone.embed_dim
        hidden = self.backbone.hidden
        tokens, rows = n + 1, count_of(n, self.part) + 1
        block = tokens * (4 * dim**2 + 2 * dim * hidden) + 2 * tokens**2 * dim
        local = (2 * tokens + 2 * rows) * dim**2 + 2 * rows * tokens * dim + 2 * rows * dim * hidden
        patches = n * dim * self.backbone.patch_embed.proj.weight[0].numel()
        depth = len(self.backbone.blocks)
        return {"sa": patches + depth * block, "glca": self.glca_depth * local}


def _neck(dim: int) -> nn.BatchNorm1d:
    neck = nn.BatchNorm1d(dim)
    neck.bias.requires_grad_(False)
    return neck


_BASE: dict[str, Any] = {"embed_dim": 768, "num_heads": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    "micro": {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0},
    "deit_tiny": {"embed_dim": 192, "num_heads": 3},
    "deit_small": {"embed_dim": 384, "num_heads": 6},
    "deit_base": _BASE,
    "vit_base": _BASE,
    "r50_vit_base": _BASE | {"hybrid": True},
}
"""Name -> keywords of `DCAL`; `micro` is ours."""


def build_dcal(model: str = "deit_tiny", **options: Any) -> DCAL:
    """The network of a variant.

    Args:
        model: one of `VARIANTS`.
        options: keywords of `DCAL`, laid over those of the variant.

    Raises:
        ValueError: an unknown variant or keyword, or a setting outside its range.

    Example:
        >>> build_dcal("micro", num_classes=16, img_size=32).backbone.embed_dim
        48
    """
    check_choice("model", model, tuple(VARIANTS))
    try:
        return DCAL(**{**VARIANTS[model], **options})
    except TypeError as error:
        raise ValueError(f"model {model!r} cannot be built: {error}") from None
