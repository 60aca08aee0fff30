"""The dtypes of stored tensors: the format's name of each, torch's and safetensors'."""

from typing import Literal, get_args

import torch

# A model's weights may be stored in these, and so is what the format keeps in the model's dtype.
WeightDtype = Literal["float32", "float16", "bfloat16"]

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "int8": torch.int8,
}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}
WEIGHT_DTYPES: dict[str, WeightDtype] = {SAFETENSORS_NAMES[name]: name for name in get_args(WeightDtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as the format and its users call it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
