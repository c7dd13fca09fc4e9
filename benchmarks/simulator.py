"""Does the simulator rank strides as the CPU does? Times of one window at several strides against the tiles it counts.

    python benchmarks/simulator.py [--quick] [--json PATH]

The simulator is given the tiles of our own CPU kernels (`gridattn.lab.simulate_tiles.simulate_cpu`). `predicted` and
`measured` are times in multiples of that of the smallest stride computed by the tile kernel; one stride may go to the
row kernel, whose keys cost another time each, so that the rank correlation is given with and without it.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import machine, print_table, time_in_turns, write_json
from scipy.stats import rankdata

from gridattn.lab.simulate_tiles import cpu_cost, simulate_cpu
from gridattn.ops import neighborhood_attention
from gridattn.ops.neighborhood.plan import make_plan

HEADS, DEPTH = 4, 32


class Problem(NamedTuple):
    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.grid))}, window {'x'.join(map(str, self.kernel_size))}"


PROBLEMS = (
    Problem((64, 64), (8, 8), tuple(product((1, 2, 3, 4, 8), repeat=2))),
    Problem((16, 24, 24), (4, 4, 4), tuple(product((1, 2, 4), repeat=3))),
    Problem((16384,), (32,), tuple((s,) for s in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32))),
)


def measure(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """One row a stride, fastest first."""
    q, k, v = torch.randn(3, 1, *problem.grid, HEADS, DEPTH)
    attend = partial(neighborhood_attention, q, k, v, problem.kernel_size, backend="cpu")
    times = time_in_turns({str(stride): partial(attend, stride) for stride in problem.strides}, rounds=rounds)
    rows = []
    for stride in problem.strides:
        plan = make_plan(problem.grid, problem.kernel_size, stride)
        kernel, found = simulate_cpu(plan)
        rows.append(
            {
                "stride": stride,
                "kernel": kernel,
                "worst_keys": found.max_visited,
                "ms": 1e3 * times[str(stride)],
                "cost": cpu_cost(plan),
            }
        )
    first = min((row for row in rows if row["kernel"] == "tiles"), key=lambda row: prod(row["stride"]))
    for row in rows:
        row |= {"measured": row["ms"] / first["ms"], "predicted": row["cost"] / first["cost"]}
    return sorted(rows, key=lambda row: row["ms"])


def rank_correlation(rows: Sequence[dict[str, Any]]) -> float:
    """Spearman's, of measured and predicted times."""
    measured, predicted = (rankdata([row[name] for row in rows]) for name in ("ms", "cost"))
    return float(np.corrcoef(measured, predicted)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "simulator.json")
    arguments = parser.parse_args()

    results = []
    columns = ("stride", "kernel", "worst_keys", "ms", "measured", "predicted")
    for problem in PROBLEMS:
        rows = measure(problem, 3 if arguments.quick else 15)
        tiles = [row for row in rows if row["kernel"] == "tiles"]
        correlation = {"all": rank_correlation(rows), "tile kernel": rank_correlation(tiles)}
        cells = [["x".join(map(str, row["stride"])), *(row[name] for name in columns[1:])] for row in rows]
        print_table(str(problem), columns, cells)
        for name, value in correlation.items():
            print(f"rank correlation of measured and predicted, {name}: {value:.3f}")
        results.append({"problem": str(problem), "rows": rows, "rank_correlation": correlation})
    write_json(arguments.json, {"machine": machine("cpu"), "results": results})
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
