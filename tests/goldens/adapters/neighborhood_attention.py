"""Neighborhood attention: the operators through the NATTEN interface."""

from typing import Any

import torch
from case import Adapter, GoldenCase, Result

import gridattn.compat.natten as natten

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


ADAPTERS: dict[str, Adapter] = {
    "natten.na1d": _operator,
    "natten.na2d": _operator,
    "natten.na3d": _operator,
    "hand": _operator,
    "natten.NeighborhoodAttention1D": _module(natten.NeighborhoodAttention1D),
    "natten.NeighborhoodAttention2D": _module(natten.NeighborhoodAttention2D),
    "natten.NeighborhoodAttention3D": _module(natten.NeighborhoodAttention3D),
    "natten.token_permute.token_permute_operation": _token_permute,
}
