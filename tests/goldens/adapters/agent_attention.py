"""Agent attention: with a class token, on dense maps, in crossing stripes; backbones; token merging and its block."""

from math import isqrt
from typing import Any

import torch
from case import GoldenCase, Result
from torch import Tensor

from gridattn.layers.agent import AgentAttention, ClassTokenAgentAttention, convert_official_agent
from gridattn.layers.agent_diffusion import AgentDiffusionBlock, AgentMerging, convert_official_block
from gridattn.layers.agent_window import CrossWindowAttention, convert_official_cross_window
from gridattn.models import AgentDeiT, AgentPVT, AgentSwin, Backbone, create_model
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


def deit(case: GoldenCase) -> Result:
    c = case.config
    options = _shared(case, "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    leading = c.get("agent_layer", -1)
    model = AgentDeiT(
        agent_sizes=[isqrt(n) for n in c["agent_num"]],
        agent_depth=None if leading < 0 else min(leading, c.get("depth", 12)),
        **options,
    )
    return _classify(case, model)


def pvt(case: GoldenCase) -> Result:
    return _classify(case, AgentPVT(**_pvt_options(case)))


def dense_pvt(case: GoldenCase) -> Result:
    return _dense_maps(case, "agent_pvt_t", _pvt_options(case))


def swin(case: GoldenCase) -> Result:
    return _classify(case, AgentSwin(**_swin_options(case)))


def dense_swin(case: GoldenCase) -> Result:
    return _dense_maps(case, "agent_swin_t", _swin_options(case))


def _classify(case: GoldenCase, model: Backbone) -> Result:
    model.load_official(case.state)
    x = case.leaf("x")
    return _finish(case, model.eval()(x), x=x)


def _dense_maps(case: GoldenCase, name: str, options: dict[str, Any]) -> Result:
    chosen = sorted(int(key.removeprefix("f")) for key in case.outputs)
    sizes = case.config["downstream_agent_shapes"]
    model = create_model(name, features_only=True, out_indices=chosen, dense_agent_sizes=sizes, **options)
    model.load_official(case.state)
    x = case.leaf("x")
    maps = model.eval()(x)
    (grad,) = torch.autograd.grad(maps, x, [case.inputs[f"cotangent_f{i}"] for i in chosen])
    return {"grad.x": grad} | {f"out.f{i}": y for i, y in zip(chosen, maps)}


def _pvt_options(case: GoldenCase) -> dict[str, Any]:
    c = case.config
    options = _shared(case, "patch_size", "embed_dims", "num_heads", "mlp_ratios", "depths")
    options["reductions"] = c.get("sr_ratios", [8, 4, 2, 1])
    options["agent_reductions"] = [int(r) for r in c.get("agent_sr_ratios", "1" * len(options["reductions"]))]
    return options | _agents(case)


def _swin_options(case: GoldenCase) -> dict[str, Any]:
    names = ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")
    return _shared(case, *names) | _agents(case)


def _shared(case: GoldenCase, *names: str) -> dict[str, Any]:
    """Settings that have the same name here; classes and channels where the file's weights tell them."""
    names = ("img_size", "in_chans", "num_classes", "qkv_bias", *names)
    options = {name: case.config[name] for name in names if name in case.config}
    if "num_classes" not in options and "head.weight" in case.state:
        options["num_classes"] = case.state["head.weight"].shape[0]
    return options


def _agents(case: GoldenCase) -> dict[str, Any]:
    """Agents per level, and how many blocks have them: letters A and B per level, or M with a number of blocks."""
    depths, kinds = case.config["depths"], case.config["attn_type"]
    letters, mixed = kinds[: len(depths)], kinds[len(depths) :]
    return {
        "agent_sizes": [isqrt(n) for n in case.config["agent_num"]],
        "agent_depths": [
            {"A": depth, "B": 0, "M": min(int(mixed or 0), depth)}[kind] for kind, depth in zip(letters, depths)
        ],
    }


ADAPTERS = {
    "deit.AgentAttention": class_token,
    "downstream.swin.AgentAttention": dense,
    "cswin.CSWinBlock": cross_window,
    "deit.VisionTransformer": deit,
    "pvt.PyramidVisionTransformer": pvt,
    "swin.AgentSwinTransformer": swin,
    "downstream.AgentPVT": dense_pvt,
    "downstream.AgentSwinTransformer": dense_swin,
    "agentsd.merge": merge,
    "agentsd.BasicTransformerBlock": diffusion_block,
}
