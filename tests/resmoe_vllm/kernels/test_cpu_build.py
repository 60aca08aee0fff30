"""Which paths a processor has, by what Linux says of it."""

import pytest

from compress_tools.errors import KernelUnsupportedError
from resmoe_vllm.kernels.cpu import build

# what /proc/cpuinfo says, shortened
PROCESSORS = {
    "Zen 2": ("x86_64", "sse2 avx2 bmi2 fma f16c", ["avx2"]),
    "Alder Lake": ("x86_64", "avx2 bmi2 fma f16c avx_vnni", ["avxvnni", "avx2"]),
    "Zen 4": ("x86_64", "avx2 bmi2 fma f16c avx512bw avx512vl avx512_vnni avx512vbmi", ["avx512", "avx2"]),
    "Cortex-A72": ("aarch64", "fp asimd evtstrm aes crc32", ["neon"]),
    "Neoverse N1": ("aarch64", "fp asimd asimdhp asimddp", ["dotprod", "neon"]),
    "Neoverse V1": ("aarch64", "fp asimd asimdhp asimddp sve bf16 i8mm", ["i8mm", "dotprod", "neon"]),
}


def become(monkeypatch: pytest.MonkeyPatch, machine: str, flags: str) -> None:
    """This process believes to run on another processor."""
    monkeypatch.delenv(build.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "cpu_flags", flags.split)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_has_the_paths_of_its_instructions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, flags, paths = PROCESSORS[name]
    become(monkeypatch, machine, flags)
    assert build.missing_cpu_flags() == []
    assert build.available_paths() == paths
    assert build.chosen_path() == paths[0]
    monkeypatch.setenv(build.PATH_VARIABLE, paths[-1])
    assert build.chosen_path() == paths[-1]


def test_a_path_of_another_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, *PROCESSORS["Neoverse N1"][:2])
    monkeypatch.setenv(build.PATH_VARIABLE, "avx2")
    with pytest.raises(KernelUnsupportedError, match="RESMOE_CPU_PATH is 'avx2'; this processor runs dotprod, neon:"):
        build.chosen_path()


@pytest.mark.parametrize(
    ("machine", "flags", "lacks"),
    [
        ("riscv64", "rv64imafdc", ["the instruction set x86-64 or ARM64"]),
        ("x86_64", "sse2 avx fma", ["avx2", "bmi2", "f16c"]),
        ("aarch64", "", ["/proc/cpuinfo"]),
    ],
)
def test_what_a_processor_lacks_is_named(
    machine: str, flags: str, lacks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    become(monkeypatch, machine, flags)
    assert build.missing_cpu_flags() == lacks
    with pytest.raises(KernelUnsupportedError, match=f"the processor lacks {', '.join(lacks)}"):
        build.chosen_path()
