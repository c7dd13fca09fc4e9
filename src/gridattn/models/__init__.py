"""Backbones: one file a family, with its variants and its checkpoint key map."""

from gridattn.models.agent_cswin import AgentCSWin
from gridattn.models.agent_deit import AgentDeiT
from gridattn.models.agent_pvt import AgentPVT
from gridattn.models.agent_swin import AgentSwin
from gridattn.models.attnet import AttNet
from gridattn.models.checkpoint import load_model, save_model
from gridattn.models.common import AttentionInput, Backbone, attention_inputs, attention_layers
from gridattn.models.convit import ConViT
from gridattn.models.davit import DaViT
from gridattn.models.features import FeatureMaps
from gridattn.models.grid_vit import GridViT
from gridattn.models.halonet import HaloNet
from gridattn.models.maxvit import MaxViT
from gridattn.models.nat import NAT, DiNATs, IsotropicNAT
from gridattn.models.polarized_hrnet import PolarizedHRNet, PoseHRNet
from gridattn.models.polarized_ocr import MultiScaleObjectContextNet, ObjectContextNet
from gridattn.models.polarized_resnet import PolarizedResNet, PoseResNet
from gridattn.models.ppma import PPMA
from gridattn.models.registry import ModelInfo, create_model, list_models, model_info, register_variants
from gridattn.models.sg_former import SGFormer
from gridattn.models.state import CheckpointError, load_checkpoint
from gridattn.models.tic import TiC
from gridattn.models.ulsam_mobilenet import SubspaceMobileNetV1, SubspaceMobileNetV2
from gridattn.models.van import VAN

__all__ = [
    "NAT",
    "PPMA",
    "VAN",
    "AgentCSWin",
    "AgentDeiT",
    "AgentPVT",
    "AgentSwin",
    "AttNet",
    "AttentionInput",
    "Backbone",
    "CheckpointError",
    "ConViT",
    "DaViT",
    "DiNATs",
    "FeatureMaps",
    "GridViT",
    "HaloNet",
    "IsotropicNAT",
    "MaxViT",
    "ModelInfo",
    "MultiScaleObjectContextNet",
    "ObjectContextNet",
    "PolarizedHRNet",
    "PolarizedResNet",
    "PoseHRNet",
    "PoseResNet",
    "SGFormer",
    "SubspaceMobileNetV1",
    "SubspaceMobileNetV2",
    "TiC",
    "attention_inputs",
    "attention_layers",
    "create_model",
    "list_models",
    "load_checkpoint",
    "load_model",
    "model_info",
    "register_variants",
    "save_model",
]
