"""The finished checkpoint in plain data: all that finishing needs to know of source and target. A slice carries it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress_tools.format.loading_guard import GUARD_KEY, GUARD_TEXT
from compress_tools.output.target import CompressionTarget
from compress_tools.source.files import CheckpointFiles


@dataclass(frozen=True)
class Outline:
    """A compression without its weights and errors; survives JSON.

    Attributes:
        source: the source as the user spelled it.
        source_name: its last part.
        title: the family's name for people.
        moe_layers: MoE layers of the model, compressed or not.
        recipe: what determines the output.
        plan_text: the plan file that it follows, if any.
        resolved_layers: layers to be compressed, ascending.
        config: content of config.json to be.
        shards: by output file, in order: the layer (None for copied tensors) and the tensor names.
        expert_bytes_before: bytes of all routed experts in the source.
        expert_bytes_after: bytes of the same in the output.
        other_bytes: bytes of all other tensors in the source.
        decoded: how many of the source's tensors were decoded, by the form that they were quantised in.
        left_out: tensors and files of the source that the output has no place for, and why.
        origin: repository, revision and commit of a source that was fetched.
        other_bytes_after: bytes of all other tensors in the output; None where they are as in the source.
    """

    source: str
    source_name: str
    title: str
    moe_layers: int
    recipe: dict[str, Any]
    plan_text: str | None
    resolved_layers: list[int]
    config: dict[str, Any]
    shards: dict[str, tuple[int | None, list[str]]]
    expert_bytes_before: int
    expert_bytes_after: int
    other_bytes: int
    decoded: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    other_bytes_after: int | None = None

    def content(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def make_outline(
    src: str | Path | CheckpointFiles, recipe: dict[str, Any], target: CompressionTarget, plan_text: str | None = None
) -> Outline:
    """The outline of what a recipe, or a plan file of this text, makes of the checkpoint in ``src``."""
    source = target.source
    return Outline(
        source=str(src),
        source_name=Path(str(src)).name,
        title=source.architecture.title,
        moe_layers=len(source.layers),
        recipe=recipe,
        plan_text=plan_text,
        resolved_layers=sorted(target.fmt.layers),
        config={
            **source.reader.config,
            GUARD_KEY: GUARD_TEXT,
            "quantization_config": target.fmt.model_dump(mode="json"),
        },
        shards={shard.filename: (shard.layer, list(shard.tensors)) for shard in target.shards},
        expert_bytes_before=target.expert_bytes_before,
        expert_bytes_after=target.expert_bytes_after,
        other_bytes=target.other_bytes,
        decoded=source.decoded(),
        left_out=source.left_out(),
        origin=dict(source.reader.store.origin),
        other_bytes_after=None if target.fmt.rest is None else target.other_bytes_after,
    )
