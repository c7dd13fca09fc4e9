"""LaMamba-Diff: the scan, its orders, the mixer and the conditioned block."""

import torch
from case import GoldenCase, Result

from gridattn.layers.scan import LaMambaBlock, SelectiveScan, convert_official_block, convert_official_scan
from gridattn.layers.window import WindowAttention
from gridattn.ops.scan_paths import inverse_paths, scan_paths
from gridattn.ops.selective_scan import selective_scan


def scan(case: GoldenCase) -> Result:
    leaves = {name: case.leaf(name) for name in case.inputs if name != "cotangent"}
    y = selective_scan(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), case.inputs["cotangent"])
    return {"out.y": y, **{f"grad.{name}": grad for name, grad in zip(leaves, grads)}}


def paths(case: GoldenCase) -> Result:
    result = {}
    for size in case.config["N"]:
        result[f"out.paths_{size}"] = scan_paths((size, size))
        result[f"out.inverse_{size}"] = inverse_paths(scan_paths((size, size)))
    return result


def mixer(case: GoldenCase) -> Result:
    c = case.config
    layer = SelectiveScan(
        c["d_model"],
        paths="continuous" if c["continuous_scan"] else "cross",
        state_dim=case.state["A_logs"].shape[1],
        expansion=c["ssm_ratio"],
        step_rank=case.state["dt_projs_weight"].shape[-1],
        kernel_size=case.state["conv2d.weight"].shape[-1],
        conv_bias="conv2d.bias" in case.state,
    )
    layer.load_state_dict(convert_official_scan(case.state))
    x = case.leaf("x")
    y = layer.eval()(x)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grad}


def block(case: GoldenCase) -> Result:
    c, dim = case.config, case.config["hidden_dim"]
    window = min(c["window_size"], c["input_resolution"])
    module = LaMambaBlock(
        SelectiveScan(
            dim,
            paths="continuous" if c["continuous_scan"] else "cross",
            state_dim=case.state["op.A_logs"].shape[1],
            expansion=c["ssm_ratio"],
            conv_bias="op.conv2d.bias" in case.state,
        ),
        WindowAttention(dim, c["num_heads"], window_size=window, shifted=c["shift_size"] > 0),
        c["condition_dim"],
        mlp_ratio=c["mlp_ratio"],
        project_condition="condition_projection.weight" in case.state,
    )
    module.load_state_dict(convert_official_block(case.state))
    x, condition = case.leaf("x"), case.leaf("c")
    y = module.eval()(x, condition)
    grads = torch.autograd.grad(y, (x, condition), case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grads[0], "grad.c": grads[1]}


ADAPTERS = {
    "selective_scan": scan,
    "get_continuous_paths": paths,
    "SS2D": mixer,
    "LaMambaBlock_conditioned": block,
}
PENDING = {"LaMambaDiff": "the whole model is not built yet", "diffusion": "the generation system is not built yet"}
