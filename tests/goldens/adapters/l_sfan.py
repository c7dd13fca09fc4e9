"""L-SFAN: whole networks, with the linear and with the hidden classifier."""

import torch
from case import Adapter, GoldenCase, Result

from gridattn.models.state import load_strict
from gridattn.systems.l_sfan.convert import convert_state
from gridattn.systems.l_sfan.model import LSFAN


def _network(case: GoldenCase) -> Result:
    c, x = case.config, case.leaf("x")
    network = LSFAN(
        c["sensors"],
        c["frames"],
        c["classes"],
        channels=c["channels"],
        num_heads=c["heads"],
        hidden=c.get("hidden"),
        batch_norm=c.get("batch_norm", False),
        residual=c.get("residual", False),
    ).eval()
    load_strict(network, convert_state(case.state))
    steps = network.steps(x)
    result = {"out.logits": steps.logits, "out.pooled": steps.pooled, "out.attended": steps.attended}
    if steps.attention is not None:
        result["out.attention"] = steps.attention
    if "cotangent" in case.inputs:
        (result["grad.x"],) = torch.autograd.grad(network(x), x, case.inputs["cotangent"])
    return result


ADAPTERS: dict[str, Adapter] = {"hand": _network, "LSFAN": _network}
