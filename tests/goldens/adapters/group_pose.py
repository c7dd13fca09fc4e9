"""Group Pose: deformable attention, the decoder layer and the position codes."""

import torch
from case import GoldenCase, Result
from einops import rearrange

from gridattn.layers.deformable import MultiScaleDeformableAttention
from gridattn.layers.group import GroupDecoderLayer, group_decoder_state_from_official
from gridattn.ops.sine_position import image_code, point_code

PENDING = {
    "GroupPose": "a whole model",
    "SetCriterion + HungarianMatcher + PostProcess": "losses and matching of the pose system",
}


def _deformable(case: GoldenCase) -> Result:
    c = case.config
    layer = MultiScaleDeformableAttention(c["d_model"], c["n_heads"], c["n_levels"], c["n_points"]).eval()
    layer.load_state_dict(case.state)
    names = ("query", "reference_points", "input_flatten")
    leaves = [case.leaf(name) for name in names]
    y = layer(*leaves, case.inputs["spatial_shapes"].tolist(), case.inputs.get("padding_mask"))
    grads = torch.autograd.grad(y, leaves, case.inputs["cotangent"])
    return {"out.output": y} | {f"grad.{name}": grad for name, grad in zip(names, grads)}


def _decoder_layer(case: GoldenCase) -> Result:
    c = case.config
    layer = GroupDecoderLayer(c["d_model"], c["n_heads"], c["d_ffn"], c["n_levels"], c["n_points"]).eval()
    layer.load_state_dict(group_decoder_state_from_official(case.state))
    names = ("tgt_pose", "tgt_pose_query_pos", "tgt_pose_reference_points", "memory")
    leaves = [case.leaf(name) for name in names]
    tokens, code, reference, memory = leaves
    y = layer(
        rearrange(tokens, "n b k c -> b n k c"),
        rearrange(code, "n b k c -> b n k c"),
        rearrange(reference, "n b l (k xy) -> b n k l xy", xy=2),
        rearrange(memory, "s b c -> b s c"),
        case.inputs["memory_spatial_shapes"].tolist(),
        case.inputs.get("memory_key_padding_mask"),
    )
    y = rearrange(y, "b n k c -> n b k c")
    grads = torch.autograd.grad(y, leaves, case.inputs["cotangent"])
    return {"out.output": y} | {f"grad.{name}": grad for name, grad in zip(names, grads)}


def _codes(case: GoldenCase) -> Result:
    c = case.config
    code = image_code(case.inputs["mask"], 2 * c["num_pos_feats"], (c["temperatureH"], c["temperatureW"]))
    result = {"out.pos2d": code.movedim(-1, 1)}
    for name in case.outputs:
        if name.startswith("query_sine"):
            result[f"out.{name}"] = point_code(case.inputs["points"], int(name.removeprefix("query_sine")))
    return result


ADAPTERS = {
    "MSDeformAttn": _deformable,
    "DeformableTransformerDecoderLayer": _decoder_layer,
    "PositionEmbeddingSineHW + gen_sineembed_for_position": _codes,
}
