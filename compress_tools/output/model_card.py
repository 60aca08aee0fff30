"""The README.md of a compressed checkpoint, and the command that repeats its run."""

import shlex

from compress_tools.architectures.registry import find_architecture
from compress_tools.config import CompressionConfig
from compress_tools.output.outline import Outline
from compress_tools.output.trusted_code import TRUST_OPTION
from compress_tools.report import PLAN_NAME, CompressionReport


def command_line(outline: Outline, dst_name: str) -> str:
    """The ``resmoe compress`` command that repeats a run, every option that matters, or the plan that it followed.

    It is quoted for a shell.
    """
    words = ["resmoe", "compress", path_word(outline.source), path_word(dst_name)]
    if outline.origin:
        words += ["--revision", outline.origin["commit"]]
    if outline.plan_text is not None:
        # The plan's text need not say it: it may have been given beside a plan.
        rest = [] if outline.other_bytes_after is None else ["--rest-bits", "8"]
        return shlex.join([*words, "--plan", PLAN_NAME, *rest])
    idle = CompressionConfig(**outline.recipe).without_effect()
    for name, value in outline.recipe.items():
        if name not in idle:
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)


def path_word(path: str) -> str:
    """A path as an argument: one that begins with ``-`` would be read as an option."""
    return f"./{path}" if path.startswith("-") else path


def serve_words(dst: str, *, trust: bool) -> list[str]:
    """The command that serves a checkpoint.

    Args:
        dst: the checkpoint.
        trust: it loads only with code of its own, see ``must_be_trusted``.
    """
    return ["vllm", "serve", path_word(dst), *([TRUST_OPTION] if trust else [])]


def model_card(outline: Outline, dst_name: str, report: CompressionReport, *, trust: bool = False) -> str:
    """README.md of the compressed checkpoint; ``trust``: see ``serve_words``."""
    content = report.content()
    before, after, other = report.expert_bytes_before, report.expert_bytes_after, report.other_bytes
    rows = "\n".join(
        f"| {layer.layer} | {layer.approximation_error:.6g} | {layer.relative_error:.6g} "
        f"| {layer.bytes_before} | {layer.bytes_after} |"
        for layer in report.layers
    )
    family = find_architecture(outline.config)
    serve = (
        shlex.join(serve_words(dst_name, trust=trust))
        if family.vllm
        else f"# {family.title} runs in {family.runs_in}{' (trust_remote_code=True)' if trust else ''}"
    )
    decoded = "".join(f"{number} tensors were decoded from {form}.\n" for form, number in report.decoded.items())
    if decoded:
        decoded += "Bytes before and errors are those of the decoded source, in bf16.\n\n"
    base = f"base_model: {outline.source}\n" if outline.origin else ""
    named = f"{outline.source}` at commit `{outline.origin['commit']}" if outline.origin else outline.source_name
    return f"""---
{base}library_name: {"vllm" if family.vllm else "transformers"}
tags: [resmoe, moe, compressed]
---

# {dst_name}

`{named}` ({outline.title}), experts compressed by ResMoE (arXiv:2503.06881): one center
expert for each MoE layer, and for each expert a compressed residual. One-shot, no data, no retraining.

```
{command_line(outline, dst_name)}
{serve}
```

| | bytes before | bytes after | ratio |
|---|---|---|---|
| routed experts | {before} | {after} | {content["expert_bytes_ratio"]:.4f} |
| everything else | {other} | {report.other_after} | {_ratio(report.other_after, other)} |
| whole checkpoint | {before + other} | {after + report.other_after} | {content["total_bytes_ratio"]:.4f} |

{decoded}{_rest_line(report)}{len(report.layers)} of {outline.moe_layers} MoE layers are compressed.
Error: `||T_k W_k - restored_k||_F^2 / I`, mean over experts, and relative to `||W_k||_F^2`.

| layer | error | relative | bytes before | bytes after |
|---|---|---|---|---|
{rows}
"""


def _ratio(after: int, before: int) -> str:
    return "1" if after == before else f"{after / before:.4f}"


def _rest_line(report: CompressionReport) -> str:
    if report.other_bytes_after is None:
        return ""
    return "Attention, dense layers, shared experts, embedding and output layer are stored in 8-bit codes by row.\n\n"
