"""CROMA: 2D-ALiBi biases and the cross encoder."""

import torch
from case import GoldenCase, Result

from gridattn.layers.alibi import AlibiEncoder, load_official_encoder
from gridattn.ops.alibi import alibi_bias, alibi_slopes, grid_positions


def _biases(case: GoldenCase) -> Result:
    result = {}
    for heads, size in case.config["heads_grid"]:
        positions = grid_positions((size, size))
        result[f"out.bias_h{heads}_g{size}"] = alibi_bias(positions, positions, alibi_slopes(heads)).unsqueeze(0)
    heads, size = case.config["masked"]["heads"], case.config["masked"]["grid"]
    positions = grid_positions((size, size))
    kept = [positions[case.inputs[name]] for name in ("ids_q", "ids_k")]
    return {**result, "out.masked_cross_bias": alibi_bias(*kept, alibi_slopes(heads))}


def _cross_encoder(case: GoldenCase) -> Result:
    c = case.config
    encoder = AlibiEncoder(c["dim"], c["layers"], c["attention_heads"], cross=True, mlp_ratio=c["ff_mult"]).eval()
    encoder.load_state_dict(load_official_encoder(case.state, cross=True))
    x, context, bias = case.leaf("x"), case.leaf("context"), case.inputs["bias"]
    y = encoder(x, bias, context, bias)
    grads = torch.autograd.grad(y, (x, context), case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grads[0], "grad.context": grads[1]}


ADAPTERS = {
    "get_alibi / apply_mask_to_alibi": _biases,
    "BaseTransformerCrossAttn (pretrain_croma.py)": _cross_encoder,
}
PENDING = {
    "CROMA (pretrain_croma.py)": "the pre-training system is not built yet",
    "PretrainedCROMA (use_croma.py), run through torchgeo.models.CROMA 0.8.1 and asserted bit-equal to the official "
    "modules": "the whole model is not built yet",
}
