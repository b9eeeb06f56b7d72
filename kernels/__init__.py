"""Operations with a contract, an eager definition and a fused Triton-language form."""

from .attention import attention
from .group_norm import add_group_norm, group_norm
from .impl import Impl
from .input_head import input_head
from .layer_norm import add_layer_norm, layer_norm
from .output_head import output_head
from .pointwise import pointwise
from .sampler_step import PlanTable, plan_table, sampler_step, step_counter
from .upsample_convolution import phase_weights, upsample_convolution

__all__ = [
    "Impl",
    "PlanTable",
    "add_group_norm",
    "add_layer_norm",
    "attention",
    "group_norm",
    "input_head",
    "layer_norm",
    "output_head",
    "phase_weights",
    "plan_table",
    "pointwise",
    "sampler_step",
    "step_counter",
    "upsample_convolution",
]
