"""Runs a checkpoint in vLLM in this process, greedily, and keeps what tests ask about."""

import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.families import engine_in_this_process

PROMPTS = [list(range(5 + index, 15 + 3 * index)) for index in range(6)]
MAX_TOKENS = 16

# before vLLM in this process binds threads and leaves its own variables (VLLM_DIST_IDENT) to children
CLEAN_ENV = dict(os.environ)
CORES = os.sched_getaffinity(0)


@dataclass(frozen=True)
class Served:
    """What one run gave.

    Attributes:
        tokens: generated ids per prompt.
        logprobs: per prompt and step, log-probability by token id (the five best).
        methods: quant method's class name by MoE layer index, on the first rank.
        resident_bytes: live parameters and buffers of the experts by MoE layer index, on the first rank.
    """

    tokens: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    methods: dict[int, str]
    resident_bytes: dict[int, int]


def inspect_layers(model: torch.nn.Module) -> tuple[dict[int, str], dict[int, int]]:
    """(method names, resident bytes) by MoE layer index."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.models.utils import extract_layer_index

    methods, sizes = {}, {}
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            index = extract_layer_index(module.layer_name)
            methods[index] = type(module.quant_method).__name__
            tensors = [*module.parameters(), *module.buffers()]
            assert all(tensor.is_contiguous() for tensor in tensors)
            sizes[index] = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return methods, sizes


def start(folder: Path, **options: object):
    """``LLM(folder)`` with the tests' options: eager, no tokenizer, one process."""
    defaults = {"skip_tokenizer_init": True, "max_model_len": 128, "enforce_eager": True, "seed": 0}
    return engine_in_this_process(folder, **(defaults | options))


def serve(folder: Path, **options: object) -> Served:
    """Start, generate for ``PROMPTS``, stop.

    Args:
        folder: checkpoint.
        options: of ``LLM``.
    Returns:
        the run.
    """
    from vllm import SamplingParams

    llm = start(folder, **options)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, detokenize=False, logprobs=5, ignore_eos=True)
    outputs = [out.outputs[0] for out in llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params)]
    methods, sizes = llm.apply_model(inspect_layers)[0]
    del llm
    gc.collect()
    return Served(
        [list(out.token_ids) for out in outputs],
        [[{token: entry.logprob for token, entry in step.items()} for step in out.logprobs] for out in outputs],
        methods,
        sizes,
    )


def serve_in_subprocess(folder: Path, binding: str, **options: object) -> Served:
    """``serve`` in a process of its own, with vLLM's own worker processes.

    Args:
        folder: checkpoint.
        binding: VLLM_CPU_OMP_THREADS_BIND, cores of each worker.
        options: of ``LLM``.
    Returns:
        the run.
    """
    # functions cross to the workers pickled
    env = CLEAN_ENV | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": binding,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "served.pickle"
        arguments = [str(folder), str(out), json.dumps(options)]
        done = subprocess.run(
            [sys.executable, "-m", __name__, *arguments],
            env=env,
            preexec_fn=lambda: os.sched_setaffinity(0, CORES),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return pickle.loads(out.read_bytes())


def logprob_gaps(first: Served, second: Served) -> list[float]:
    """Differences at every step up to and with the first token that differs, of the tokens both list."""
    gaps = []
    for prompt in range(len(PROMPTS)):
        for step in range(MAX_TOKENS):
            one, two = first.logprobs[prompt][step], second.logprobs[prompt][step]
            gaps += [abs(one[token] - two[token]) for token in one.keys() & two.keys()]
            if first.tokens[prompt][step] != second.tokens[prompt][step]:
                break
    return gaps


if __name__ == "__main__":
    from tests.resmoe_vllm import serving

    served = serving.serve(Path(sys.argv[1]), **json.loads(sys.argv[3]))
    Path(sys.argv[2]).write_bytes(pickle.dumps(served))
