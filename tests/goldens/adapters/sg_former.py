"""SG-Former: the three attentions, the pair of blocks and the whole network."""

from collections.abc import Mapping

import torch
from case import GoldenCase, Result
from torch import Tensor, nn

from gridattn.layers.hybrid_scale import GuidedAttention, HybridScaleAttention, LepeAttention
from gridattn.layers.self_guided import SelfGuidedPair, convert_official_attention, convert_official_block
from gridattn.models import create_model


def _grid(case: GoldenCase, tokens: Tensor) -> Tensor:
    return tokens.unflatten(1, (case.config["H"], case.config["W"]))


def _options(case: GoldenCase) -> dict:
    return {"qkv_bias": case.config.get("qkv_bias", True)}


def _finish(case: GoldenCase, module: nn.Module, x: Tensor, y: Tensor, **outputs: Tensor) -> Result:
    y = y.flatten(1, 2)
    y.backward(case.inputs["cotangent"])
    assert x.grad is not None
    return {"out.y": y, "grad.x": x.grad} | {f"out.{name}": tensor for name, tensor in outputs.items()}


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, strict=True)
    return module.eval()


def hybrid(case: GoldenCase) -> Result:
    c = case.config
    layer = HybridScaleAttention(c["dim"], c["num_heads"], reduction=c["sr_ratio"], border="crop", **_options(case))
    x = case.leaf("x")
    y, significance = _load(layer, convert_official_attention(case.state))(_grid(case, x), return_significance=True)
    flattened = {"rowmajor": significance.flatten(1), "colmajor": significance.mT.flatten(1)}
    return _finish(case, layer, x, y, **{f"significance_{order}": tensor for order, tensor in flattened.items()})


def guided(case: GoldenCase) -> Result:
    c = case.config
    layer = GuidedAttention(c["dim"], c["num_heads"], reduction=c["sr_ratio"], **_options(case))
    x = case.leaf("x")
    y = _load(layer, convert_official_attention(case.state))(
        _grid(case, x), significance=_grid(case, case.inputs["significance"])
    )
    return _finish(case, layer, x, y)


def plain(case: GoldenCase) -> Result:
    layer = LepeAttention(case.config["dim"], case.config["num_heads"], **_options(case))
    x = case.leaf("x")
    return _finish(case, layer, x, _load(layer, convert_official_attention(case.state))(_grid(case, x)))


def pair(case: GoldenCase) -> Result:
    c = case.config
    blocks = SelfGuidedPair(
        c["dim"],
        c["num_heads"],
        reduction=c["sr_ratio"],
        mlp_ratio=c.get("mlp_ratio", 4.0),
        border="crop",
        **_options(case),
    )
    state = {}
    for index, name in enumerate(("hybrid", "guided")):
        prefix = f"block.{index}."
        block = {key.removeprefix(prefix): t for key, t in case.state.items() if key.startswith(prefix)}
        state |= {f"{name}.{key}": t for key, t in convert_official_block(block).items()}
    x = case.leaf("x")
    y, significance = _load(blocks, state)(_grid(case, x), return_significance=True)
    flattened = {"rowmajor": significance.flatten(1), "colmajor": significance.mT.flatten(1)}
    return _finish(case, blocks, x, y, **{f"significance_{order}": tensor for order, tensor in flattened.items()})


def classifier(case: GoldenCase) -> Result:
    model = create_model("sgformer_s", sizes="official", **case.config)
    # The file names gradients by official parameters, and ours are some of them joined: theirs are the leaves here.
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.state.items()}
    x = case.leaf("x")
    y = torch.func.functional_call(model.eval(), model.from_official(leaves), (x,), strict=True)
    wanted = {f"grad.param.{name}": leaf for name, leaf in leaves.items()} | {"grad.x": x}
    wanted = {name: leaf for name, leaf in wanted.items() if name.removeprefix("grad.") in case.grads}
    grads = torch.autograd.grad(y, list(wanted.values()), case.inputs["cotangent"])
    model.load_official(case.state)
    assert torch.equal(model(x), y)
    return {"out.y": y} | dict(zip(wanted, grads))


ADAPTERS = {
    "Attention(mask=False)": hybrid,
    "Attention(mask=True)": guided,
    "Attention(sr_ratio=1)": plain,
    "ModuleList[Block,Block]": pair,
    "SGFormer": classifier,
}
