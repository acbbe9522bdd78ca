"""Weight quantization: integer grids, RTN, GPTQ, and the calibration engine they run on."""

from __future__ import annotations

from openwork.quant.calibration import InputSecondMoment, calibrate
from openwork.quant.gptq import gptq
from openwork.quant.grid import Grid, QuantizedTensor
from openwork.quant.model import LinearReport, QuantizationReport, model_bytes, quantize_model
from openwork.quant.rtn import rtn

__all__ = [
    "Grid",
    "InputSecondMoment",
    "LinearReport",
    "QuantizationReport",
    "QuantizedTensor",
    "calibrate",
    "gptq",
    "model_bytes",
    "quantize_model",
    "rtn",
]
