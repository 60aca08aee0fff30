"""One MoE layer on a GPU, the Triton kernels against dense; needs torch and triton, nothing else."""
