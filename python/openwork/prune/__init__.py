"""Weight pruning: masks, the algorithms that choose them, and what they leave of a model."""

from __future__ import annotations

from openwork.prune.flap import InputFluctuation, flap
from openwork.prune.llm_pruner import llm_pruner
from openwork.prune.magnitude import global_magnitude, magnitude
from openwork.prune.masks import NM, Pattern, Unstructured
from openwork.prune.model import METHODS, STRUCTURED, prune_model
from openwork.prune.pruned import PrunedTensor
from openwork.prune.report import LinearReport, PruningReport
from openwork.prune.sparsegpt import sparsegpt
from openwork.prune.wanda import wanda

__all__ = [
    "METHODS",
    "NM",
    "STRUCTURED",
    "InputFluctuation",
    "LinearReport",
    "Pattern",
    "PrunedTensor",
    "PruningReport",
    "Unstructured",
    "flap",
    "global_magnitude",
    "llm_pruner",
    "magnitude",
    "prune_model",
    "sparsegpt",
    "wanda",
]
