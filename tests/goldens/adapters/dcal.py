"""DCAL: the three branches of a tiny vision transformer, built from the blocks of the library."""

import pytest
import torch
from case import GoldenCase, Result
from torch import Tensor, nn

from gridattn.layers.global_local import DualCrossBlock, select_tokens
from gridattn.ops.rollout import attention_rollout


class _Backbone(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        dim, patch = c["embed_dim"], c["patch_size"]
        positions = c["img_size"][0] // patch * (c["img_size"][1] // patch) + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.ModuleList(DualCrossBlock(dim, c["num_heads"], c["mlp_ratio"]) for _ in range(c["depth"]))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def embed(self, image: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1)
        return tokens + self.pos_embed


class _Tiny(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        dim, classes = c["embed_dim"], c["num_classes"]
        self.backbone = _Backbone(c)
        self.glca = nn.ModuleList(DualCrossBlock(dim, c["num_heads"], c["mlp_ratio"]) for _ in range(c["M"]))
        self.glca_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head, self.glca_head = nn.Linear(dim, classes), nn.Linear(dim, classes)
        self.loss_w = nn.Parameter(torch.zeros(3))


def _branches(case: GoldenCase) -> Result:
    c = case.config
    if "embed_dim" not in c:
        pytest.skip("the metrics of retrieval are not built yet")
    model = _Tiny(c).eval()
    model.load_state_dict(case.state)
    image, perm = case.leaf("image"), case.inputs["perm"]
    streams = [model.backbone.embed(image)]
    blocks = [block for block in model.backbone.blocks if isinstance(block, DualCrossBlock)]
    for block in blocks:
        streams.append(block(streams[-1]))

    start = len(blocks) - c["M"]
    attentions = [block.attention(tokens) for block, tokens in zip(blocks[:start], streams)]
    local, index = select_tokens(streams[start], attentions, c["R"])
    for block, tokens in zip(model.glca, streams[start:]):
        local = block(local, context=tokens)

    start = len(blocks) - c["T"]
    paired = streams[start] if c["pwca_mode"] == "stream" else streams[start][perm]
    for block, tokens in zip(blocks[start:], streams[start:]):
        if c["pwca_mode"] == "stream":
            paired = block(paired, partner=tokens[perm])
        else:
            paired = block(tokens, partner=paired)

    features = {
        "sa": model.backbone.norm(streams[-1])[:, 0],
        "glca": model.glca_norm(local)[:, 0],
        "pwca": model.backbone.norm(paired)[:, 0],
    }
    heads = {"sa": model.head, "glca": model.glca_head, "pwca": model.head}
    logits = {name: heads[name](feature) for name, feature in features.items()}
    losses = torch.stack([nn.functional.cross_entropy(y, case.inputs["label"]) for y in logits.values()])
    loss = 0.5 * ((-model.loss_w).exp() * losses + model.loss_w).sum()

    wanted = dict(model.named_parameters()) | {"image": image}
    leaves = {key: wanted[key.removeprefix("state.")] for key in case.grads}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {
        **{f"out.{name}_feature": feature for name, feature in features.items()},
        **{f"out.{name}_logits": y for name, y in logits.items()},
        "out.branch_losses": losses,
        "out.loss": loss,
        "out.rollout": attention_rollout(attentions),
        "out.glca_index": index,
        "out.glca_tokens": local,
        **{f"grad.{key}": grad for key, grad in zip(leaves, grads)},
    }


ADAPTERS = {"hand": _branches}
