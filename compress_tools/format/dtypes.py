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
}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
WEIGHT_DTYPES: dict[str, WeightDtype] = {SAFETENSORS_NAMES[name]: name for name in get_args(WeightDtype)}

# Bytes of an element of every dtype that safetensors has: a source's other tensors may be in any of them.
SAFETENSORS_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
