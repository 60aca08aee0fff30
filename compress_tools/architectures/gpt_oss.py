"""GPT-OSS: fused, interleaved expert tensors with biases, clamped SwiGLU; published in mxfp4."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import Stacked

GPT_OSS = MoEArchitecture(
    model_type="gpt_oss",
    title="GPT-OSS",
    models=("gpt-oss-20b (mxfp4)", "gpt-oss-120b (mxfp4)"),
    num_experts_keys=("num_local_experts",),
    intermediate_size_keys=("intermediate_size",),
    layouts=(Stacked(transposed=True, interleaved=True, bias="_bias"),),
    own_output=True,
)
