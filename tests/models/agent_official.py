"""The published Agent Attention classifiers, written down from their equations, on state dicts of the published layout.

All functions take tokens (B, N, C) in row-major order, the class token first where there is one.
"""

from collections.abc import Mapping, Sequence
from math import isqrt, prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Tensors = Mapping[str, Tensor]


def part(state: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def norm(p: Tensors, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def conv(p: Tensors, name: str, maps: Tensor, **options: int) -> Tensor:
    return F.conv2d(maps, p[f"{name}.weight"], p[f"{name}.bias"], **options)


def to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    return tokens.mT.unflatten(2, tuple(grid))


def feed_forward(p: Tensors, x: Tensor) -> Tensor:
    return linear(p, "mlp.fc2", F.gelu(linear(p, "mlp.fc1", x)))


def split(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def join(x: Tensor) -> Tensor:
    return rearrange(x, "b h n d -> b n (h d)")


def dense(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    q, k, v = (split(t, heads) for t in (q, k, v))
    return join((q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v)


def local(p: Tensors, name: str, v: Tensor, grid: Sequence[int]) -> Tensor:
    return conv(p, name, to_map(v, grid), padding=1, groups=v.shape[-1]).flatten(2).mT


def agents(p: Tensors, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], name: str = "dwc") -> Tensor:
    heads, count = p["an_bias"].shape[:2]
    token = q.shape[1] - prod(grid)
    pooled = F.adaptive_avg_pool2d(to_map(q[:, token:], grid), isqrt(count)).flatten(2).mT
    b1 = F.interpolate(p["an_bias"], tuple(grid), mode="bilinear") + p["ah_bias"][0] + p["aw_bias"][0]
    b2 = F.interpolate(p["na_bias"], tuple(grid), mode="bilinear").permute(0, 2, 3, 1)
    b1, b2 = b1.flatten(2), (b2 + p["ha_bias"][0] + p["wa_bias"][0]).flatten(1, 2)
    if token:
        b1, b2 = torch.cat((p["ac_bias"][0], b1), 2), torch.cat((p["ca_bias"][0], b2), 1)
    gathered = dense(pooled, k, v, heads, b1)
    mixed = dense(q, pooled, gathered, heads, b2)
    return torch.cat((mixed[:, :token], mixed[:, token:] + local(p, name, v[:, token:], grid)), 1)


def deit(state: Tensors, images: Tensor, heads: int) -> Tensor:
    x = conv(state, "patch_embed.proj", images, stride=state["patch_embed.proj.weight"].shape[-1])
    grid = x.shape[2:]
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT), 1) + state["pos_embed"]
    for i in range(len({name.split(".")[1] for name in state if name.startswith("blocks.")})):
        block = part(state, f"blocks.{i}.")
        p = part(block, "attn.")
        qkv = linear(p, "qkv", norm(block, "norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(p, "proj", agents(p, *qkv, grid) if "an_bias" in p else dense(*qkv, heads))
        x = x + feed_forward(block, norm(block, "norm2", x, 1e-6))
    return linear(state, "head", norm(state, "norm", x, 1e-6)[:, 0])


def pvt(state: Tensors, images: Tensor, heads: Sequence[int]) -> Tensor:
    maps = images
    for level, count in enumerate(heads, start=1):
        p = part(state, f"patch_embed{level}.")
        maps = conv(p, "proj", maps, stride=p["proj.weight"].shape[-1])
        grid = maps.shape[2:]
        x = norm(p, "norm", maps.flatten(2).mT) + state[f"pos_embed{level}"]
        for i in range(len({name.split(".")[1] for name in state if name.startswith(f"block{level}.")})):
            block = part(state, f"block{level}.{i}.")
            y = norm(block, "norm1", x, 1e-6)
            x = x + pyramid_attention(part(block, "attn."), y, grid, count)
            x = x + feed_forward(block, norm(block, "norm2", x, 1e-6))
        maps = to_map(x, grid)
    return linear(state, "head", maps.mean((2, 3)))


def pyramid_attention(p: Tensors, x: Tensor, grid: Sequence[int], heads: int) -> Tensor:
    source, step = x, 1
    if "sr.weight" in p:
        step = p["sr.weight"].shape[-1]
        source = norm(p, "norm", conv(p, "sr", to_map(x, grid), stride=step).flatten(2).mT)
    q, (k, v) = linear(p, "q", x), linear(p, "kv", source).chunk(2, -1)
    if "an_bias" not in p:
        return linear(p, "proj", dense(q, k, v, heads))
    assert step == 1
    return linear(p, "proj", agents(p, q, k, v, grid))


def windows(x: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
    sizes = {"h": grid[0] // sides[0], "a": sides[0], "b": sides[1]}
    return rearrange(x, "n (h a w b) c -> (n h w) (a b) c", **sizes)


def unwindows(x: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
    sizes = {"h": grid[0] // sides[0], "w": grid[1] // sides[1], "a": sides[0], "b": sides[1]}
    return rearrange(x, "(n h w) (a b) c -> n (h a w b) c", **sizes)


def cswin(state: Tensors, images: Tensor, heads: Sequence[int], stripes: Sequence[int]) -> Tensor:
    maps = conv(state, "stage1_conv_embed.0", images, stride=4, padding=2)
    x, grid = norm(state, "stage1_conv_embed.2", maps.flatten(2).mT), maps.shape[2:]
    for level, count in enumerate(heads, start=1):
        for i in range(len({name.split(".")[1] for name in state if name.startswith(f"stage{level}.")})):
            block = part(state, f"stage{level}.{i}.")
            qkv = linear(block, "qkv", norm(block, "norm1", x)).chunk(3, -1)
            branches = [part(block, f"attns.{b}.") for b in range(2 if "attns.1.get_v.bias" in block else 1)]
            mixed = []
            for b, p in enumerate(branches):
                sides = [*grid] if len(branches) == 1 else [stripes[level - 1]] * 2
                sides[b] = grid[b] if len(branches) == 2 else sides[b]
                q, k, v = (windows(t.chunk(len(branches), -1)[b], grid, sides) for t in qkv)
                if "an_bias" in p:
                    y = agents(p, q, k, v, sides, "get_v")
                else:
                    y = dense(q, k, v, count // len(branches)) + local(p, "get_v", v, sides)
                mixed.append(unwindows(y, grid, sides))
            x = x + linear(block, "proj", torch.cat(mixed, -1))
            x = x + feed_forward(block, norm(block, "norm2", x))
        if level < len(heads):
            maps = conv(state, f"merge{level}.conv", to_map(x, grid), stride=2, padding=1)
            x, grid = norm(state, f"merge{level}.norm", maps.flatten(2).mT), maps.shape[2:]
    return linear(state, "head", norm(state, "norm", x).mean(1))


def swin(state: Tensors, images: Tensor, heads: Sequence[int]) -> Tensor:
    maps = conv(state, "patch_embed.proj", images, stride=4)
    x, grid = norm(state, "patch_embed.norm", maps.flatten(2).mT), maps.shape[2:]
    for level, count in enumerate(heads):
        for i in range(len({name.split(".")[3] for name in state if name.startswith(f"layers.{level}.blocks.")})):
            block = part(state, f"layers.{level}.blocks.{i}.")
            p, y = part(block, "attn."), norm(block, "norm1", x)
            if "an_bias" in p:
                x = x + linear(p, "proj", agents(p, *linear(p, "qkv", y).chunk(3, -1), grid))
            else:
                x = x + window_attention(p, y, grid, count, odd=i % 2 == 1)
            x = x + feed_forward(block, norm(block, "norm2", x))
        if level < len(heads) - 1:
            p, y = part(state, f"layers.{level}.downsample."), to_map(x, grid).movedim(1, -1)
            y = torch.cat([y[:, a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
            x, grid = linear(p, "reduction", norm(p, "norm", y)).flatten(1, 2), [n // 2 for n in grid]
    return linear(state, "head", norm(state, "norm", x).mean(1))


def window_attention(p: Tensors, x: Tensor, grid: Sequence[int], heads: int, odd: bool) -> Tensor:
    side = (isqrt(len(p["relative_position_bias_table"])) + 1) // 2
    shift = side // 2 if odd and side < min(grid) else 0
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    offset = place[:, None] - place[None] + side - 1
    bias = p["relative_position_bias_table"][offset[..., 0] * (2 * side - 1) + offset[..., 1]].permute(2, 0, 1)
    # After the roll the last window of an axis holds positions of both ends, which do not see each other.
    ends = [(torch.arange(n) >= n - side).int() + (torch.arange(n) >= n - shift).int() * (shift > 0) for n in grid]
    region = windows((3 * ends[0][:, None] + ends[1]).view(1, -1, 1), grid, (side, side))
    mask = -100.0 * (region != region.mT)
    rolled = x.unflatten(1, tuple(grid)).roll((-shift, -shift), (1, 2)).flatten(1, 2)
    q, k, v = linear(p, "qkv", windows(rolled, grid, (side, side))).chunk(3, -1)
    y = dense(q, k, v, heads, bias + mask.repeat(len(x), 1, 1).unsqueeze(1))
    y = unwindows(linear(p, "proj", y), grid, (side, side))
    return y.unflatten(1, tuple(grid)).roll((shift, shift), (1, 2)).flatten(1, 2)


def agent_tensors(dim: int, heads: int, count: int, grid: Sequence[int], conv_name: str = "dwc") -> dict[str, Tensor]:
    """Random biases and convolution of one agent layer, of the published shapes."""
    h, w = grid
    shapes = {
        "an_bias": (heads, count, 7, 7),
        "na_bias": (heads, count, 7, 7),
        "ah_bias": (1, heads, count, h, 1),
        "aw_bias": (1, heads, count, 1, w),
        "ha_bias": (1, heads, h, 1, count),
        "wa_bias": (1, heads, 1, w, count),
        f"{conv_name}.weight": (dim, 1, 3, 3),
        f"{conv_name}.bias": (dim,),
    }
    return {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}


def weights(bias: bool = True, **shapes: Sequence[int]) -> dict[str, Tensor]:
    """Random weight and bias under every given name, in which two underscores stand for a dot."""
    found = {}
    for name, shape in shapes.items():
        name = name.replace("__", ".")
        found[f"{name}.weight"] = torch.randn(*shape, dtype=torch.float64) * 0.3 + (len(shape) == 1)
        if bias:
            found[f"{name}.bias"] = torch.randn(shape[0], dtype=torch.float64) * 0.3
    return found


def block(dim: int, mlp_ratio: int = 2) -> dict[str, Tensor]:
    """Random norms and feed-forward of one block."""
    hidden = mlp_ratio * dim
    return weights(norm1=(dim,), norm2=(dim,), mlp__fc1=(hidden, dim), mlp__fc2=(dim, hidden))


def under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {f"{prefix}{name}": t for name, t in tensors.items()}
