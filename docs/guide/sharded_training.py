"""Trains neighborhood attention on one image that is cut into slabs of rows, one a process.

torchrun --standalone --nproc-per-node 2 sharded_training.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gridattn.layers import NeighborhoodAttention
from gridattn.parallel import count_exchange, gather_grid, parallelize, shard_grid


def make_model() -> nn.Module:
    attention = NeighborhoodAttention(32, num_heads=4, kernel_size=7)
    return nn.Sequential(nn.Linear(3, 32), nn.LayerNorm(32), attention, nn.GELU(), nn.Linear(32, 3))


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" for GPUs, after torch.cuda.set_device
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    image = torch.rand(1, 75, 64, 3)  # a real program reads only its slab
    clean, noisy = (shard_grid(x, mesh) for x in (image, image + 0.3 * torch.randn_like(image)))

    model = parallelize(make_model(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        with count_exchange() as count:
            # The processes' losses are added up: a mean over the image is a sum divided by the whole image's size.
            loss = (model(noisy) - clean).square().sum() / image.numel()
            loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step}, {count.forward + count.backward} bytes received, loss {total.item():.5f}", flush=True)

    with torch.no_grad():
        whole = gather_grid(model(noisy), mesh)
        alone = make_model()  # names and values of parameters are those of the model as it was
        alone.load_state_dict(model.state_dict())
        same = torch.allclose(whole, alone(gather_grid(noisy, mesh)), atol=1e-5)
    if dist.get_rank() == 0:
        print(f"as one process: {same}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
