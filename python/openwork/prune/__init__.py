"""Weight pruning: masks, the algorithms that choose them, and what they leave of a model."""

from __future__ import annotations

from openwork.prune.activation import (
    CatsLinear,
    TealLinear,
    set_thresholds,
    skip_columns,
    sparsify_activations,
)
from openwork.prune.delta import dare
from openwork.prune.evopress import Allocation, Stage, evopress
from openwork.prune.flap import InputFluctuation, flap
from openwork.prune.llm_pruner import llm_pruner
from openwork.prune.magnitude import global_magnitude, magnitude
from openwork.prune.masks import NM, Pattern, Unstructured, keep_layer, keep_nm, keep_rows
from openwork.prune.methods import METHODS, Method
from openwork.prune.model import STRUCTURED, prune_model
from openwork.prune.pruned import PrunedTensor
from openwork.prune.report import LinearReport, PruningReport
from openwork.prune.sparsegpt import sparsegpt
from openwork.prune.speed import ShapeReport, leave_out_zeros
from openwork.prune.sr_ste import FineTuneReport, SrSteLinear, sr_ste
from openwork.prune.wanda import wanda

__all__ = [
    "METHODS",
    "NM",
    "STRUCTURED",
    "Allocation",
    "CatsLinear",
    "FineTuneReport",
    "InputFluctuation",
    "LinearReport",
    "Method",
    "Pattern",
    "PrunedTensor",
    "PruningReport",
    "ShapeReport",
    "SrSteLinear",
    "Stage",
    "TealLinear",
    "Unstructured",
    "dare",
    "evopress",
    "flap",
    "global_magnitude",
    "keep_layer",
    "keep_nm",
    "keep_rows",
    "leave_out_zeros",
    "llm_pruner",
    "magnitude",
    "prune_model",
    "set_thresholds",
    "skip_columns",
    "sparsegpt",
    "sparsify_activations",
    "sr_ste",
    "wanda",
]
