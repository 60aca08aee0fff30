"""The compiler's call: what is cached, what is built anew, what is refused."""

import ctypes
from pathlib import Path

import pytest
import torch

from compress_tools.native_library import NativeSource, build


def passes(library: ctypes.CDLL) -> None:
    assert library.answer() == 42


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NativeSource:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "source" / "answer.cpp"
    path.parent.mkdir()
    path.write_text('extern "C" int answer() { return 42; }\n')
    return NativeSource(path, passes, ())


def test_it_is_built_once_and_anew_when_cut_off(source: NativeSource) -> None:
    said: list[str] = []
    library = build(source, say=said.append)
    written = library.stat().st_mtime_ns
    assert said[0].startswith("compiling answer.cpp for this processor with ")
    assert build(source, say=said.append) == library
    assert (library.stat().st_mtime_ns, len(said)) == (written, 1)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert build(source) == library
    assert ctypes.CDLL(str(library)).answer() == 42


def test_a_check_runs_in_fp32_whatever_the_model_that_is_loaded(source: NativeSource) -> None:
    """VLLM sets the model's dtype and device while it loads; a first start compiles then."""
    seen: list[tuple[torch.dtype, str]] = []

    def check(library: ctypes.CDLL) -> None:
        made = torch.zeros(1)
        seen.append((made.dtype, made.device.type))

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            build(NativeSource(source.path, check, ()))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    assert seen == [(torch.float32, "cpu")]


def test_a_header_is_part_of_it(source: NativeSource) -> None:
    first = build(source)
    (source.path.parent / "more.h").write_text("#pragma once\n")
    assert build(source) != first


def test_a_compiler_of_two_words(source: NativeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env g++")
    assert build(source).exists()


def test_a_cache_that_is_a_file_is_named(source: NativeSource, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*cache/resmoe, where built kernels are kept"):
        build(source)
