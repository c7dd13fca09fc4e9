"""Ultra-lightweight subspace attention, in eval mode and for one step in train mode, and MobileNets with it."""

import torch
from case import Adapter, GoldenCase, Result

from gridattn.layers.ulsam import UltraLightweightSubspaceAttention, convert_official
from gridattn.models import create_model


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


def variant_call(name: str, config: dict) -> tuple[str, dict]:
    return f"{config['backbone']}_100", _options(config)


def _options(config: dict) -> dict:
    names = {"num_splits": "num_subspaces"}
    return {names.get(key, key): value for key, value in config.items() if key != "backbone"}


def network(name: str) -> Adapter:
    def run(case: GoldenCase) -> Result:
        model = create_model(name, **_options(case.config))
        model.load_official(case.state)
        x = case.leaf("x")
        y = model.eval()(x)
        (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
        return {"out.y": y, "grad.x": grad}

    return run


ADAPTERS = {
    "ULSAM": layer,
    "mobilenet_v1+ULSAM": network("mobilenet_v1_100"),
    "mobilenet_v2+ULSAM": network("mobilenet_v2_100"),
}
