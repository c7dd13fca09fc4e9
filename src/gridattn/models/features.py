"""Feature maps of a backbone, for detection and segmentation."""

from collections.abc import Sequence

from torch import Tensor, nn

from gridattn.models.common import AttentionInput, Backbone, attention_inputs


class FeatureInfo:
    """Channels and strides of the maps that a feature extractor returns."""

    def __init__(self, info: Sequence[dict], out_indices: Sequence[int]) -> None:
        self.info = list(info)
        self.out_indices = tuple(out_indices)

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [self.info[i]["num_chs"] for i in self.out_indices]

    def reduction(self) -> list[int]:
        """Image positions per map position, along one axis."""
        return [self.info[i]["reduction"] for i in self.out_indices]


class FeatureMaps(nn.Module):
    """A backbone without its head: images in, a list of maps (B, C, *grid) out, finest first.

    Where the family does not normalise its maps, each gets a LayerNorm of its own, `norm{i}`.

    Args:
        body: the backbone; it loses its final norm (where the maps get their own) and its classifier.
        out_indices: which maps, counted from the finest; all when None.

    Raises:
        ValueError: an index that the backbone does not have.

    Example:
        >>> import torch
        >>> from gridattn.models import create_model
        >>> model = create_model("grid_vit_micro", features_only=True)
        >>> [tuple(m.shape) for m in model(torch.randn(1, 3, 64, 64))], model.feature_info.reduction()
        ([(1, 48, 16, 16)], [4])
    """

    def __init__(self, body: Backbone, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        count = len(body.feature_info)
        chosen = tuple(range(count)) if out_indices is None else tuple(out_indices)
        if not chosen or any(not -count <= i < count for i in chosen):
            raise ValueError(
                f"out_indices={out_indices} is not allowed; the backbone has {count} maps, 0 to {count - 1}"
            )
        body.reset_classifier(0)
        self.config = body.config
        self.default_cfg = body.default_cfg
        self.feature_info = FeatureInfo(body.feature_info, [i % count for i in chosen])
        if body.tap_norm:
            body.norm = nn.Identity()
            for i, channels in zip(self.feature_info.out_indices, self.feature_info.channels()):
                setattr(self, f"norm{i}", nn.LayerNorm(channels))
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, *size) -> maps (B, C, *grid)."""
        maps = self.body.forward_maps(images)
        chosen = [(i, maps[i]) for i in self.feature_info.out_indices]
        if self.body.tap_norm:
            chosen = [(i, getattr(self, f"norm{i}")(x)) for i, x in chosen]
        return [x.movedim(-1, 1) for _, x in chosen]

    def attention_inputs(self, images: Tensor) -> list[AttentionInput]:
        """What every attention layer is given for `images`."""
        return attention_inputs(self, images)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes blocks in the backward pass instead of storing their activations."""
        self.body.set_grad_checkpointing(enable)

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Loads the published state dict of the family: of a detector's backbone, or of a classifier.

        `norm.*` and `head.*` of a classifier are left out, as there is nothing here that they belong to; the `norm{i}`
        that a classifier lacks keep their initial values. A detector's `norm{i}` of a map not asked for is left out.
        """
        state = self.body.from_official(state)
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("body.")}
        taps = {name: state[name] for name in own if name in state}
        if taps and len(taps) < len(own):
            raise ValueError(f"state dict has {sorted(taps)} but lacks {sorted(set(own) - set(taps))}")
        left_out = ("norm.", "head.", *(f"norm{i}." for i in range(len(self.feature_info.info))))
        if not self.body.tap_norm:
            left_out = ("head.",)
        self.body.load_official({k: v for k, v in state.items() if not k.startswith(left_out)})
        self.load_state_dict(taps, strict=False)
