"""Neighborhood attention: the operators through the NATTEN interface, and the backbones NAT and DiNAT."""

import inspect
from typing import Any

import torch
from case import Adapter, GoldenCase, Result

import gridattn.compat.natten as natten
from gridattn.models import NAT, DiNATs, IsotropicNAT

ADDITIONAL = ("additional_keys", "additional_values")


def _operator(case: GoldenCase) -> Result:
    leaves = {name: case.leaf(name) for name in ("q", "k", "v", *ADDITIONAL) if name in case.inputs}
    operator = natten.functional.neighborhood_attention_generic
    results: dict[str, Any] = {}
    loss = torch.zeros(())
    for i, call in enumerate(case.config["calls"]):
        options = dict(call)
        if options.pop("additional_kv", False):
            options |= {name: leaves[name] for name in ADDITIONAL}
        out, lse = operator(leaves["q"], leaves["k"], leaves["v"], **options, return_lse=True)
        loss = loss + (out * case.inputs["cotangent"]).sum()
        results |= {f"out.c{i}": out, f"out.lse{i}": lse}
    wanted = {name: leaves[name] for name in case.grads}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return results | {f"grad.{name}": grad for name, grad in zip(wanted, grads)}


def _module(layer: type[torch.nn.Module]) -> Adapter:
    def run(case: GoldenCase) -> Result:
        module = layer(**case.config).eval()
        module.load_state_dict(case.state, strict=True)
        x = case.leaf("x")
        y = module(x)
        y.backward(case.inputs["cotangent"])
        grads = {"x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}
        return {"out.y": y} | {f"grad.{name}": grad for name, grad in grads.items() if grad is not None}

    return run


def _token_permute(case: GoldenCase) -> Result:
    x, results = case.inputs["x"], {}
    for i, call in enumerate(case.config["calls"]):
        options = {name: call[name] for name in ("tile_shape", "dilation", "flip_tiled_dims")}
        permuted, grid, padded = natten.token_permute.token_permute_operation(x, **options)
        assert list(padded) == call["token_layout_post_dilation"]
        assert torch.equal(natten.token_permute.token_unpermute_operation(permuted, grid, **options), x)
        results[f"out.p{i}"] = permuted
    return results


def _backbone(family: type[NAT]) -> Adapter:
    def run(case: GoldenCase) -> Result:
        known = inspect.signature(family).parameters
        model = family(**{name: value for name, value in case.config.items() if name in known}).eval()
        model.load_official(case.state)
        levels: list[torch.Tensor] = []
        for level in model.levels:
            level.register_forward_hook(lambda _module, _args, out: levels.append(out[1]))
        x = case.leaf("x")
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        logits = model.head(features)
        logits.backward(case.inputs["cotangent"])
        results = {"out.patch_embed": model.patch_embed(x), "out.features": features, "out.logits": logits}
        return results | {f"out.level{i}": out for i, out in enumerate(levels)} | {"grad.x": x.grad}

    return run


ADAPTERS: dict[str, Adapter] = {
    "NAT": _backbone(NAT),
    "DiNAT_s": _backbone(DiNATs),
    "NATIsotropic": _backbone(IsotropicNAT),
    "natten.na1d": _operator,
    "natten.na2d": _operator,
    "natten.na3d": _operator,
    "hand": _operator,
    "natten.NeighborhoodAttention1D": _module(natten.NeighborhoodAttention1D),
    "natten.NeighborhoodAttention2D": _module(natten.NeighborhoodAttention2D),
    "natten.NeighborhoodAttention3D": _module(natten.NeighborhoodAttention3D),
    "natten.token_permute.token_permute_operation": _token_permute,
}
