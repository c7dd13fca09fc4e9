"""Routing Transformer: k-means, attention inside clusters, the layer of local and routing heads, and whole models."""

import torch
import torch.nn.functional as F
from case import GoldenCase, Result
from torch import Tensor

from gridattn.layers.kmeans import AveragedKMeans, OnlineKMeans
from gridattn.layers.routing import RoutingAttention, convert_official
from gridattn.models.state import load_strict
from gridattn.ops.centroids import centroid_similarity, commitment_loss, nearest_centroid, normalize_vectors
from gridattn.ops.routing import cluster_members, routing_attention
from gridattn.systems.routing_transformer.convert import convert_package_state, package_network
from gridattn.systems.routing_transformer.model import (
    ImageModel,
    RoutingStack,
    SequenceModel,
    build_model,
    shift_right,
)


def _by_position(t: Tensor) -> Tensor:
    """(B, heads, T, d) -> (B, T, heads, d)."""
    return t.transpose(1, 2)


def _mask(case: GoldenCase, name: str) -> Tensor | None:
    mask = case.inputs.get(name)
    return None if mask is None else mask.bool().unsqueeze(-1)


def kmeans(case: GoldenCase) -> Result:
    c = case.config
    module = OnlineKMeans(c["num_heads"], c["num_clusters"], c["head_dim"], decay=c["ema_decay"])
    module.means.copy_(case.state["means"])
    result = {}
    for i in (1, 2):
        x = _by_position(case.inputs[f"x{i}"])
        unit = normalize_vectors(x)
        result[f"out.dists{i}"] = centroid_similarity(unit, module.means)
        result[f"out.loss{i}"] = c["commitment"] * commitment_loss(unit, module.means).view(1)
        module.accumulate(x)
        assert module.pending is not None
        result[f"out.new_means{i}"] = module.pending.clone()
    module.update()
    return {**result, "out.means_after": module.means}


def kmeans_attention(case: GoldenCase) -> Result:
    c, means = case.config, case.state["kmeans.means"]
    leaves = {name: case.leaf(name) for name in "qkv" if name in case.inputs}
    tokens = {name: _by_position(leaf) for name, leaf in leaves.items()}
    memory = (case.state["mem_key"], case.state["mem_value"])
    mask = _mask(case, "query_mask")
    key_mask = _mask(case, "key_mask")
    y = _by_position(
        routing_attention(
            tokens["q"],
            tokens.get("k"),
            tokens["v"],
            means,
            c["window_size"],
            is_causal=c["causal"],
            query_mask=mask,
            key_mask=mask if key_mask is None else key_mask,
            memory=memory,
        )
    )
    clustered = torch.cat([tokens[name] for name in "qk" if name in tokens], 1)
    loss = 1e-4 * commitment_loss(normalize_vectors(clustered), means).view(1)
    grads = torch.autograd.grad(y, list(leaves.values()), case.inputs["cotangent"])
    (grad_aux,) = torch.autograd.grad(loss, leaves["q"])
    return {
        "out.y": y,
        "out.aux_loss": loss,
        "grad.q_aux": grad_aux,
        **{f"grad.{name}": grad for name, grad in zip(leaves, grads)},
    }


def paper_attention(case: GoldenCase) -> Result:
    c, means = case.config, case.state["means"]
    leaves = {name: case.leaf(name) for name in "qkv" if name in case.inputs}
    tokens = {name: _by_position(leaf) for name, leaf in leaves.items()}
    relative = tuple(case.state.get(f"relative_positions_{kind}.embeddings") for kind in ("keys", "values"))
    value_mask = (tokens["v"] != 0).any(-1)
    y = _by_position(
        routing_attention(
            tokens["q"],
            tokens.get("k"),
            tokens["v"],
            means,
            c["attention_window"],
            norm="layer_norm",
            is_causal=c["masked"],
            key_mask=None if value_mask.all() else value_mask,
            relative=None if relative[0] is None or relative[1] is None else (relative[0], relative[1]),
        )
    )
    points = {name: normalize_vectors(tokens[name], "layer_norm") for name in "qk" if name in tokens}
    losses = [commitment_loss(points.get(name, points["q"]), means) for name in "qk"]
    module = AveragedKMeans(*means.shape, decay=c["decay"])
    module.load_state_dict({name: case.state[name] for name in module.state_dict()})
    result = {"out.y": y, "out.loss": c["beta"] * torch.stack(losses).sum().view(1)}
    for name, x in points.items():
        result[f"out.{name}_cluster"] = nearest_centroid(x, means)
        result[f"out.{name}_idx"] = cluster_members(centroid_similarity(x, means), c["attention_window"])
        module.accumulate(tokens[name])
        module.update()
    grads = torch.autograd.grad(y, list(leaves.values()), case.inputs["cotangent"])
    result |= {f"grad.{name}": grad for name, grad in zip(leaves, grads)}
    return result | {f"out.{name}_after": getattr(module, name) for name in ("means", "ema_count", "ema_means")}


def mixed_attention(case: GoldenCase) -> Result:
    c, state = case.config, convert_official(case.state)
    routed = "kmeans.means" in state
    layer = RoutingAttention(
        c["dim"],
        c["heads"],
        grid=(c["max_seq_len"],),
        local_heads=c["local_attn_heads"],
        window_size=c["local_attn_window_size"],
        num_clusters=state["kmeans.means"].shape[1] if routed else None,
        cluster_size=c["window_size"],
        is_causal=c["causal"],
        shared_qk=c["shared_qk"],
        head_dim=c["dim_head"],
        num_memory=state["mem_key"].shape[2] if "mem_key" in state else 0,
        rotary=True,
    )
    layer.load_state_dict(state)
    x, mask = case.leaf("x"), case.inputs.get("input_mask")
    y, auxiliary = layer.eval()(x, None if mask is None else mask.bool(), return_auxiliary=True)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "out.aux_loss": 1e-4 * auxiliary.view(1), "grad.x": grad}


def language_model(case: GoldenCase) -> Result:
    c = case.config
    local_window = c.get("local_attn_window_size") or c.get("window_size", 64)
    network = package_network(case.state, c.get("window_size", 64), local_window, is_causal=c.get("causal", False))
    model = build_model(**network)
    load_strict(model, convert_package_state(case.state))
    tokens = case.inputs["tokens"]
    mask = case.inputs.get("input_mask")
    logits, auxiliary = _padded(model.eval(), tokens, None if mask is None else mask.bool(), local_window)
    result = {"out.logits": logits, "out.aux_loss": 1e-4 * auxiliary.view(1)}
    names = {"token_emb.weight": "tokens.weight"}
    for name in case.grads:
        parameter = model.get_parameter(names.get(name, name))
        (grad,) = torch.autograd.grad(logits, parameter, case.inputs["cotangent"], retain_graph=True)
        result[f"grad.{name}"] = grad
    return result


def _padded(model: SequenceModel, tokens: Tensor, mask: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """With local heads the package pads sequences to whole windows; what it adds can be taken by a centroid."""
    missing = -tokens.shape[1] % window
    if not missing or not any(block.attention.local_heads for block in model.stack.blocks):
        return model(tokens, mask)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    logits, auxiliary = model(F.pad(tokens, (0, missing)), F.pad(mask, (0, missing), value=False))
    return logits[:, : tokens.shape[1]], auxiliary


def image_input(case: GoldenCase) -> Result:
    c = case.config
    height, width, channels, dim = (c[name] for name in ("height", "width", "channels", "hidden_size"))
    model = ImageModel(RoutingStack([]), c["vocab_size"], dim, (height, width, channels), flavour="paper")
    with torch.no_grad():
        model.table.weight.copy_(case.state["rgb_target_emb_channel"])
        for parameter, name in ((model.rows, "pos_emb_0"), (model.columns, "pos_emb_1")):
            parameter.copy_(case.state[name].view_as(parameter))
    return {"out.decoder_input": model.embed(shift_right(case.inputs["targets"].flatten(1)), 0)}


ADAPTERS = {
    "Kmeans": kmeans,
    "KmeansAttention": kmeans_attention,
    "SelfAttention": mixed_attention,
    "RoutingTransformerLM": language_model,
    "hand:tf_routing_attention": paper_attention,
    "hand:tf_image_input": image_input,
}
