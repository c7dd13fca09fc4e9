"""Golden tile counts of the simulator."""

import torch
from case import GoldenCase, Result

from gridattn.lab.simulate import Simulation, simulate


def _run(case: GoldenCase) -> Result:
    found: list[Simulation] = [
        simulate(
            c["shape"],
            c["window"],
            c.get("stride", 1),
            c.get("dilation", 1),
            c.get("causal", False),
            query_tile=c["q_tile"],
            key_tile=c["kv_tile"],
            key_tiling="dynamic" if c.get("dynamic_kv") else "static",
        )
        for c in case.config["cases"]
    ]
    return {
        "out.dense_tiles": torch.tensor([s.dense_tiles for s in found]),
        "out.max_visited": torch.tensor([s.max_visited for s in found]),
        "out.total_visited": torch.tensor([s.total_visited for s in found]),
        "out.q_tiles": torch.tensor([s.query_tiles for s in found]),
        "out.sim_speedup": torch.tensor([float(s.speedup) for s in found]),
        "out.flop_speedup": torch.tensor([float(s.flop_speedup) for s in found]),
        "out.fully_block_sparse": torch.tensor([int(s.fully_block_sparse) for s in found]),
        "out.natten_predicate": torch.tensor([int(s.kernel_predicate) for s in found]),
        "out.per_axis_max": torch.tensor([(*s.per_axis_max, 0, 0)[:3] for s in found]),
    }


ADAPTERS = {"hand": _run, "hand conf. tables of the paper": _run}
