"""Density models of text and of images in raster order, on one stack of blocks with local and routing heads."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from gridattn.ops.common import check_choice, per_axis
from gridattn.systems.routing_transformer.blocks import BlockCache, PackageBlock, PaperBlock

FLAVOURS = ("package", "paper")


class RoutingStack(nn.Module):
    """Blocks one after another, and the sum of their commitment losses.

    Args:
        blocks: all `PackageBlock` or all `PaperBlock`.
        reversible: runs two streams that start equal; the result is their mean.
    """

    def __init__(self, blocks: Sequence[nn.Module], reversible: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reversible = reversible

    def forward(
        self, x: Tensor, mask: Tensor | None = None, caches: Sequence[BlockCache] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, C), (B, T) bool -> (B, T, C) and a scalar; fills one empty cache a block."""
        x, auxiliary = self._streams(x), x.new_zeros((), dtype=torch.float32)
        for i, block in enumerate(self.blocks):
            x, loss = block(x, mask, None if caches is None else caches[i])
            auxiliary = auxiliary + loss
        return self._mean(x), auxiliary

    def step(self, x: Tensor, caches: Sequence[BlockCache]) -> Tensor:
        """(B, 1, C) -> (B, 1, C)."""
        x = self._streams(x)
        for block, cache in zip(self.blocks, caches):
            x = block.step(x, cache)  # pyright: ignore[reportCallIssue]
        return self._mean(x)

    def _streams(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1) if self.reversible else x

    def _mean(self, x: Tensor) -> Tensor:
        return sum(x.chunk(2, -1)) / 2 if self.reversible else x  # pyright: ignore[reportReturnType]


class SequenceModel(nn.Module):
    """A stack between an embedding of the symbols before each position and the logits of the symbol there.

    A subclass defines `embed` and `head`.
    """

    def __init__(self, stack: RoutingStack) -> None:
        super().__init__()
        self.stack = stack

    def embed(self, previous: Tensor, start: int) -> Tensor:
        """Vectors (B, n, C) of positions `start` on, from the symbols (B, n) that come before each."""
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        """(B, n, C) -> logits (B, n, symbols)."""
        raise NotImplementedError

    def forward(
        self, previous: Tensor, mask: Tensor | None = None, caches: Sequence[BlockCache] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of every position, all at once.

        Args:
            previous: (B, T) int64, the symbol before each position; see `shift_right`.
            mask: (B, T) bool, True for real positions.
            caches: from `new_caches`, to go on with `step`.

        Returns:
            (B, T, symbols) and the sum of the commitment losses, a scalar.
        """
        x, auxiliary = self.stack(self.embed(previous, 0), mask, caches)
        return self.head(x), auxiliary

    def step(self, previous: Tensor, start: int, caches: Sequence[BlockCache]) -> Tensor:
        """Logits of position `start` alone: (B, 1) -> (B, 1, symbols); see `RoutingAttention.step`."""
        return self.head(self.stack.step(self.embed(previous, start), caches))

    def new_caches(self) -> list[BlockCache]:
        """Empty caches, one a block."""
        return [BlockCache() for _ in self.stack.blocks]

    def update_centroids(self) -> None:
        """Moves the centroids of all layers by the batches since the last update; once an optimiser step."""
        for block in self.stack.blocks:
            block.update_centroids()  # pyright: ignore[reportCallIssue]


class TextModel(SequenceModel):
    """Model of token sequences.

    Args:
        stack: the blocks.
        symbols: size of the vocabulary V.
        dim: channels C of the stack.
        embedding: channels E of the token vectors; C when None.
        flavour: "package": maps between E and C where they differ, and a layer norm before the logits. "paper": always
            a map from E to C, one back where they differ, and no norm, which the blocks end in.
        tied: "package" only: the logits are products with the token vectors.
        dropout: of the token vectors.

    Example:
        >>> model = build_model("text", 50, dim=16, depth=1, num_heads=2, local_heads=1, window_size=4, num_clusters=2)
        >>> model(torch.randint(50, (2, 9)))[0].shape
        torch.Size([2, 9, 50])
    """

    def __init__(
        self,
        stack: RoutingStack,
        symbols: int,
        dim: int,
        *,
        embedding: int | None = None,
        flavour: str = "package",
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(stack)
        width = dim if embedding is None else embedding
        package, differ = flavour == "package", width != dim
        self.tokens = nn.Embedding(symbols, width)
        nn.init.normal_(self.tokens.weight, std=0.02 if package else width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.project_in = nn.Linear(width, dim) if differ or not package else nn.Identity()
        self.project_out = nn.Linear(dim, width) if differ else nn.Identity()
        self.norm = nn.LayerNorm(width) if package else nn.Identity()
        self.out = None if tied else nn.Linear(width, symbols)

    def embed(self, previous: Tensor, start: int) -> Tensor:
        return self.project_in(self.dropout(self.tokens(previous)))

    def head(self, x: Tensor) -> Tensor:
        x = self.norm(self.project_out(x))
        return x @ self.tokens.weight.T if self.out is None else self.out(x)


class ImageModel(SequenceModel):
    """Model of images as sequences of sub-pixels, rows first, channels last.

    A position is told the value before it through the rows of its own channel in the table, its row and its column:

        sqrt(D) table[v + levels c] + sqrt(channels D) (rows[h] + columns[w])_c

    Args:
        stack: the blocks, of D channels.
        levels: values of a sub-pixel.
        dim: channels D.
        image: height, width and channels.
        flavour: "package" has a layer norm before the logits; the blocks of "paper" end in one.
        dropout: of the embedding.
    """

    def __init__(
        self,
        stack: RoutingStack,
        levels: int,
        dim: int,
        image: Sequence[int],
        *,
        flavour: str = "package",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(stack)
        self.image = per_axis(tuple(image), 3, "image")
        self.levels, self.dim = levels, dim
        channels, side = self.image[2], max(self.image)
        self.table = nn.Embedding(levels * channels, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        deviation = (channels * dim) ** -0.5
        self.rows = nn.Parameter(deviation * torch.randn(side, channels, dim))
        self.columns = nn.Parameter(deviation * torch.randn(side, channels, dim))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim) if flavour == "package" else nn.Identity()
        self.out = nn.Linear(dim, levels)

    def embed(self, previous: Tensor, start: int) -> Tensor:
        height, width, channels = self.image
        place = start + torch.arange(previous.shape[1], device=previous.device)
        channel, column, row = place % channels, place // channels % width, place // (channels * width)
        if start + previous.shape[1] > height * width * channels:
            raise ValueError(
                f"previous has positions up to {start + previous.shape[1]}; an image of {self.image} has no more than "
                f"{height * width * channels}"
            )
        value = sqrt(self.dim) * self.table(previous + self.levels * channel)
        position = sqrt(channels * self.dim) * (self.rows[row, channel] + self.columns[column, channel])
        return self.dropout(value + position)

    def head(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def shift_right(sequence: Tensor) -> Tensor:
    """The symbol before every position, 0 before the first.

    Example:
        >>> shift_right(torch.tensor([[5, 6, 7]])).tolist()
        [[0, 5, 6]]
    """
    return torch.cat([torch.zeros_like(sequence[:, :1]), sequence[:, :-1]], 1)


def build_model(
    kind: str,
    symbols: int,
    *,
    dim: int,
    depth: int,
    num_heads: int,
    local_heads: int | Sequence[int],
    window_size: int,
    num_clusters: int,
    cluster_size: int | None = None,
    flavour: str = "package",
    image: Sequence[int] | None = None,
    hidden: int | None = None,
    dropout: float = 0.0,
    decay: float = 0.999,
    embedding: int | None = None,
    head_dim: int | None = None,
    gated: bool | None = None,
    tied: bool = False,
    norm: str = "layer",
    shift: bool = False,
    reversible: bool = False,
    num_memory: int = 0,
    is_causal: bool = True,
    shared_qk: bool | None = None,
    reach: int = 0,
) -> SequenceModel:
    """A model of text or of images.

    Args:
        kind: "text" or "image".
        symbols: size of the vocabulary, or values of a sub-pixel.
        dim: channels.
        depth: blocks.
        num_heads: heads of a block.
        local_heads: how many of them are local, for all blocks or one number each.
        window_size: positions per block of the local heads.
        num_clusters: centroids per routing head.
        cluster_size: positions that a centroid takes; "package" shares all positions out when None.
        flavour: "package": pre-norm blocks of `RoutingAttention`. "paper": post-norm blocks of `PaperAttention`.
        image: height, width and channels, for images.
        hidden: channels of the feed-forward; None takes 4 C ("package"), 3 C (text) or 2 C (images).
        dropout: probability, in all places.
        decay: of the centroids.
        embedding: channels of the token vectors, for text.
        head_dim: "package": channels per head.
        gated: gated feed-forward; None takes the flavour's own.
        tied: "package", text: the logits are products with the token vectors.
        norm: "package": "layer", "scale" or "rezero".
        shift: "package": gives channels to the next position, see `shift_channels`.
        reversible: "package": two streams.
        num_memory: "package": learned keys and values per cluster.
        is_causal: "package": a density model is; False is for encoders.
        shared_qk: "package": routing heads have no keys of their own; None shares them where causal.
        reach: "paper": largest distance with a learned relative position.

    Raises:
        ValueError: an unknown kind or flavour, or sizes that do not fit.
    """
    check_choice("kind", kind, ("text", "image"))
    check_choice("flavour", flavour, FLAVOURS)
    package, text = flavour == "package", kind == "text"
    local = _per_block(local_heads, depth)
    shared: dict[str, Any] = {"window_size": window_size, "num_clusters": num_clusters, "decay": decay}
    if package:
        if cluster_size is not None:
            shared["cluster_size"] = cluster_size
        shared |= {"head_dim": head_dim, "num_memory": num_memory, "is_causal": is_causal, "shared_qk": shared_qk}
        feed: dict[str, Any] = {"hidden": hidden or 4 * dim, "gated": bool(gated), "dropout": dropout}
        options = {"norm": norm, "shift": shift, "reversible": reversible, "dropout": dropout}
        attentions = [{"num_heads": num_heads, "local_heads": n, "grid": (1,), **shared} for n in local]
        blocks: list[nn.Module] = [PackageBlock(dim, attention, feed, **options) for attention in attentions]
    else:
        if cluster_size is None:
            raise ValueError("cluster_size=None is not allowed with flavour='paper'; name the positions per cluster")
        defaults = {"gated": True, "activation": "gelu_tanh", "bias": False} if text else {"activation": "relu"}
        feed = {"hidden": hidden or (3 if text else 2) * dim, "dropout": dropout, **defaults}
        feed |= {} if gated is None else {"gated": gated}
        shared |= {"num_heads": num_heads, "cluster_size": cluster_size, "reach": reach}
        blocks = [PaperBlock(dim, {"local_heads": n, **shared}, feed, dropout=dropout) for n in local]
    stack = RoutingStack(blocks, reversible and package)
    if text:
        model: SequenceModel = TextModel(
            stack, symbols, dim, embedding=embedding, flavour=flavour, tied=tied and package, dropout=dropout
        )
    elif image is None:
        raise ValueError("image=None is not allowed with kind='image'; height, width and channels are needed")
    else:
        model = ImageModel(stack, symbols, dim, image, flavour=flavour, dropout=dropout)
    return model if package else _initialized(model)


def _per_block(local_heads: int | Sequence[int], depth: int) -> tuple[int, ...]:
    depth = per_axis(depth, 1, "depth")[0]
    return per_axis(local_heads, depth, "local_heads", minimum=0)


def _initialized(model: SequenceModel, gain: float = 0.2) -> SequenceModel:
    """Weights of linear maps from a uniform distribution of variance gain / mean(channels in, channels out)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bound = sqrt(6 * gain / sum(module.weight.shape))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
