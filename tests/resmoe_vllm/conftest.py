"""Environment for vLLM in this process (before it is imported); twins, each served once per session."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    import resmoe_vllm

    resmoe_vllm.register()
    resmoe_vllm.register()  # repeatable


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """``pairs(family, dtype)`` -> (ResMoE folder, twin folder) with every grouping; written once."""
    from tests.resmoe_vllm import twins

    written: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(family: str, dtype: str) -> tuple[Path, Path]:
        if (family, dtype) not in written:
            root = tmp_path_factory.mktemp(f"{family}-{dtype}")
            written[family, dtype] = twins.write_twins(root, family, dtype, twins.ALL_KINDS, twins.NUM_LAYERS)
        return written[family, dtype]

    return get


@pytest.fixture(scope="session")
def served():
    """``served(folder, **LLM options)`` -> Served; each folder and options once."""
    from tests.resmoe_vllm import serving

    runs: dict[tuple, serving.Served] = {}

    def get(folder: Path, **options: object) -> serving.Served:
        key = (folder, *sorted(options.items()))
        if key not in runs:
            runs[key] = serving.serve(folder, **options)
        return runs[key]

    return get
