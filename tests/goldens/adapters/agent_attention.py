"""Agent attention: with a class token, on dense maps, in crossing stripes; token merging and the diffusion block."""

from math import isqrt

import torch
from case import GoldenCase, Result
from torch import Tensor

from gridattn.layers.agent import AgentAttention, ClassTokenAgentAttention, convert_official_agent
from gridattn.layers.agent_diffusion import AgentDiffusionBlock, AgentMerging, convert_official_block
from gridattn.layers.agent_window import CrossWindowAttention, convert_official_cross_window
from gridattn.models.common import Block
from gridattn.ops.token_merging import choose_destinations, match_tokens


def _finish(case: GoldenCase, y: Tensor, **inputs: Tensor) -> Result:
    grads = torch.autograd.grad(y, list(inputs.values()), case.inputs["cotangent"])
    return {"out.y": y} | {f"grad.{name}": grad for name, grad in zip(inputs, grads)}


def _qkv_bias(case: GoldenCase) -> bool:
    return case.config.get("qkv_bias", True)


def class_token(case: GoldenCase) -> Result:
    c = case.config
    grid, agents = (c["window"],) * 2, isqrt(c["agent_num"])
    layer = ClassTokenAgentAttention(
        c["dim"], c["num_heads"], grid=grid, agent_size=agents, qkv_bias=_qkv_bias(case)
    ).eval()
    layer.load_state_dict(convert_official_agent(case.state), strict=True)
    x = case.leaf("x")
    patches, token = layer(x[:, 1:].unflatten(1, grid), x[:, :1])
    return _finish(case, torch.cat((token, patches.flatten(1, 2)), 1), x=x)


def dense(case: GoldenCase) -> Result:
    c = case.config
    layer = AgentAttention(
        c["dim"],
        c["num_heads"],
        grid=c["input_resolution"],
        agent_size=isqrt(c["agent_num"]),
        dense_agent_size=c["downstream_agent_shape"],
        qkv_bias=_qkv_bias(case),
    ).eval()
    layer.load_state_dict(convert_official_agent(case.state), strict=True)
    x = case.leaf("x")
    return _finish(case, layer(x.unflatten(1, c["hw_shape"])).flatten(1, 2), x=x)


def cross_window(case: GoldenCase) -> Result:
    c = case.config
    grid = (c["reso"],) * 2
    layer = CrossWindowAttention(
        c["dim"],
        c["num_heads"],
        grid=grid,
        window_size=None if c.get("last_stage", False) else c["split_size"],
        agent_size=isqrt(c["agent_num"]) if c.get("attn_type", "A") == "A" else None,
        qkv_bias=_qkv_bias(case),
    )
    block = Block(layer, mlp_ratio=c.get("mlp_ratio", 4.0)).eval()
    outer = {name: t for name, t in case.state.items() if name.startswith(("norm", "mlp"))}
    inner = convert_official_cross_window({name: t for name, t in case.state.items() if name not in outer})
    block.load_state_dict(outer | {f"attn.{name}": t for name, t in inner.items()}, strict=True)
    x = case.leaf("x")
    return _finish(case, block(x.unflatten(1, grid)).flatten(1, 2), x=x)


def merge(case: GoldenCase) -> Result:
    c = case.config
    destinations = choose_destinations((c["h"], c["w"]), (c["sy"], c["sx"]))
    x, metric = case.leaf("x"), case.inputs["metric"]
    # The official code sorts destinations with an unstable sort, whose order is that of one machine: it is read off.
    ours = match_tokens(metric, destinations).merge(x, c["r"])[0, -len(destinations) :]
    order = torch.cdist(case.outputs["merged"][0, -len(destinations) :], ours).argmin(1)
    assert torch.equal(order.sort().values, torch.arange(len(destinations)))
    matching = match_tokens(metric, destinations[order])
    merged = matching.merge(x, c["r"])
    results = {"merged": merged, "agent": matching.merge(x, c["agent_r"]), "unmerged": matching.unmerge(merged, c["r"])}
    cotangents = [case.inputs[f"cotangent_{name}"] for name in results]
    (grad,) = torch.autograd.grad(list(results.values()), x, cotangents)
    return {f"out.{name}": tensor for name, tensor in results.items()} | {"grad.x": grad}


def diffusion_block(case: GoldenCase) -> Result:
    c, patch = case.config, case.config["patch"]
    merging = AgentMerging(
        cell=(patch["sy"], patch["sx"]),
        ratio=patch["ratio"],
        agent_ratio=patch["agent_ratio"],
        broadcast_exponent=patch.get("k_scale2", 0.3),
        shortcut=patch.get("k_shortcut", 0.075),
        random=patch.get("use_rand", False),
    )
    block = AgentDiffusionBlock(c["dim"], c["heads"], c["dim_head"], c["context_dim"], merging).eval()
    block.load_state_dict(convert_official_block(case.state), strict=True)
    x, context = case.leaf("x"), case.leaf("context")
    return _finish(case, block(x.movedim(1, -1), context).movedim(-1, 1), x=x, context=context)


ADAPTERS = {
    "deit.AgentAttention": class_token,
    "downstream.swin.AgentAttention": dense,
    "cswin.CSWinBlock": cross_window,
    "agentsd.merge": merge,
    "agentsd.BasicTransformerBlock": diffusion_block,
}
_MODELS = (
    "swin.AgentSwinTransformer",
    "deit.VisionTransformer",
    "pvt.PyramidVisionTransformer",
    "downstream.AgentPVT",
    "downstream.AgentSwinTransformer",
)
PENDING = dict.fromkeys(_MODELS, "the whole model is not built yet")
