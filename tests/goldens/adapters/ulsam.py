"""Ultra-lightweight subspace attention, in eval mode and for one step in train mode."""

import torch
from case import GoldenCase, Result

from gridattn.layers.ulsam import UltraLightweightSubspaceAttention, convert_official


def layer(case: GoldenCase) -> Result:
    module = UltraLightweightSubspaceAttention(case.config["nin"], num_subspaces=case.config["num_splits"])
    module.load_state_dict(convert_official(case.state), strict=True)
    x = case.leaf("x")
    statistics = [key for key in case.outputs if key.startswith("after.")]
    y = module.train(bool(statistics))(x.movedim(1, -1)).movedim(-1, 1)
    result = {"out.y": y}
    for key in statistics:
        _, _, number, norm, name = key.split(".")
        joined = getattr({"bn_dws": module.channel_norm, "bn_point": module.score_norm}[norm], name)
        result[f"out.{key}"] = joined.chunk(module.num_subspaces)[int(number)]
    if case.grads:
        (result["grad.x"],) = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), x)
    return result


ADAPTERS = {"ULSAM": layer}
PENDING = {
    "mobilenet_v1+ULSAM": "the classifier is a whole model",
    "mobilenet_v2+ULSAM": "the classifier is a whole model",
}
