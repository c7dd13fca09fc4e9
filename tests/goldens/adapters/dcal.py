"""DCAL: the three branches of a tiny network, and the metrics of re-identification."""

import torch
from case import GoldenCase, Result
from torch import nn

from gridattn.ops.rollout import attention_rollout
from gridattn.systems.dcal.losses import batch_hard_triplet, dynamic_total
from gridattn.systems.dcal.metrics import euclidean, retrieval_report
from gridattn.systems.dcal.model import DCAL


def _adapt(case: GoldenCase) -> Result:
    return _branches(case) if "embed_dim" in case.config else _retrieval(case)


def _branches(case: GoldenCase) -> Result:
    c = case.config
    model = DCAL(
        c["num_classes"],
        c["img_size"],
        c["patch_size"],
        c["embed_dim"],
        c["depth"],
        c["num_heads"],
        c["mlp_ratio"],
        hybrid=c.get("hybrid_r50", False),
        ratio=c["R"],
        glca_depth=c["M"],
        pwca_depth=c["T"],
        pair=c["pwca_mode"],
        readout=c.get("readout", "cls"),
    ).eval()
    model.load_state_dict(case.state)
    image = case.leaf("image")
    features, logits = model(image, case.inputs["perm"])
    losses = {name: nn.functional.cross_entropy(y, case.inputs["label"]) for name, y in logits.items()}
    loss = dynamic_total(losses, model.loss_w)
    selection = model.selection(image)
    assert selection.tokens is not None

    wanted = dict(model.named_parameters()) | {"image": image}
    leaves = {key: wanted[key.removeprefix("state.")] for key in case.grads}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {
        **{f"out.{name}_feature": feature for name, feature in features.items()},
        **{f"out.{name}_logits": y for name, y in logits.items()},
        "out.branch_losses": torch.stack(list(losses.values())),
        "out.loss": loss,
        "out.rollout": attention_rollout(model.attentions(model.backbone.streams(image))),
        "out.glca_index": selection.index,
        "out.glca_tokens": selection.tokens,
        **{f"grad.{key}": grad for key, grad in zip(leaves, grads)},
    }


def _retrieval(case: GoldenCase) -> Result:
    x = case.inputs
    labels = [x[name] for name in ("query_pid", "gallery_pid", "query_cam", "gallery_cam")]
    report = retrieval_report(x["query_feat"], x["gallery_feat"], *labels, max_rank=case.config["max_rank"])
    features, identities = x["triplet_feat"].double(), x["triplet_label"]
    return {
        "out.dist": euclidean(x["query_feat"], x["gallery_feat"]),
        "out.mAP": torch.tensor(report["mAP"]),
        "out.mINP": torch.tensor(report["mINP"]),
        "out.cmc": torch.tensor(report["cmc"]),
        "out.valid_queries": torch.tensor(report["valid_queries"]),
        "out.triplet_soft": batch_hard_triplet(features, identities),
        "out.triplet_margin03": batch_hard_triplet(features, identities, margin=0.3),
    }


ADAPTERS = {"hand": _adapt}
