"""Expert shapes of published models, for benchmarks and tests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoEShape:
    """H ``hidden``, I ``intermediate``, E ``experts``, K ``top_k`` of one model's MoE layer; ``layers`` of them."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int


SHAPES: dict[str, MoEShape] = {
    shape.name: shape
    for shape in (
        MoEShape("OLMoE-1B-7B", 2048, 1024, 64, 8, 16),
        MoEShape("Qwen3-30B-A3B", 2048, 768, 128, 8, 48),
        MoEShape("DeepSeekMoE-16B", 2048, 1408, 64, 6, 27),
        MoEShape("Mixtral-8x7B", 4096, 14336, 8, 2, 32),
    )
}
