"""GPT-OSS in its bf16 form: fused, interleaved expert tensors with biases, clamped SwiGLU."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import Stacked

GPT_OSS = MoEArchitecture(
    model_type="gpt_oss",
    title="GPT-OSS (bf16)",
    models=("gpt-oss-20b (mxfp4)", "gpt-oss-120b (mxfp4)"),
    num_experts_keys=("num_local_experts",),
    intermediate_size_keys=("intermediate_size",),
    layouts=(Stacked(transposed=True, interleaved=True, bias="_bias"),),
    own_output=True,
    vllm=False,
    runs_in="transformers only: vLLM's GPT-OSS loader skips expert tensors that are not fused, and its experts "
    "have biases, which the fused layer does not implement",
)
