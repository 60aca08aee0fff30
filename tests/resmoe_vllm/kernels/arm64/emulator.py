"""Compiles the kernels for ARM64, and calls them under ``qemu-aarch64``."""

import ctypes
import dataclasses
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from compress_tools.native_library import FLAGS
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu.build import PATHS, SOURCE
from resmoe_vllm.kernels.cpu.structs import DTYPES, BoundStruct, trellis_tables
from resmoe_vllm.weights.bound import ResMoEWeights

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
INSTALL = "apt-get install g++-aarch64-linux-gnu qemu-user"
LIBRARIES = "/usr/aarch64-linux-gnu"
# a processor that has what the path needs, and not what the next better path needs
PROCESSORS = {"neon": "cortex-a72", "dotprod": "neoverse-n1", "i8mm": "max"}
# what is for a library, or for the processor that compiles
NOT_HERE = ("-march=native", "-shared", "-fPIC")
ALIGNED = 64


def missing() -> list[str]:
    """Which of the two programs is not here."""
    return [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


def compile_for(path: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The program ``folder / path``, of the kernels and what calls them; a warning is an error."""
    flags = [flag for flag in (*FLAGS, *SOURCE.flags) if flag not in NOT_HERE]
    own = ["-Wall", "-Wextra", "-Werror", "-I", str(SOURCE.path.parent)]
    sources = [SOURCE.path, SOURCE.path.with_name("rows8_cpu.cpp"), Path(__file__).with_name("run_calls.cpp")]
    command = [COMPILER, *flags, *PATHS[path].flags, *own, *map(str, sources), "-o", str(folder / path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@dataclass
class Image:
    """Memory with pointers in it, as a program elsewhere can load it.

    Attributes:
        data: the memory.
        pointers: where in it offsets stand that are to become pointers.
    """

    data: bytearray = field(default_factory=bytearray)
    pointers: list[int] = field(default_factory=list)
    _placed: dict[int, tuple[int, int]] = field(default_factory=dict)  # address here -> its bytes, and where they went

    def place(self, address: int, size: int) -> int:
        """Copies memory of this process, once; returns where it went."""
        if address not in self._placed:
            self.data += bytes(-len(self.data) % ALIGNED)
            self._placed[address] = (size, len(self.data))
            self.data += ctypes.string_at(address, size)
        return self._placed[address][1]

    def place_tensor(self, tensor: Tensor) -> int:
        """The tensor's whole storage, which kernels may read; returns where its first element went."""
        storage = tensor.untyped_storage()
        return self.place(storage.data_ptr(), storage.nbytes()) + int(tensor.storage_offset()) * tensor.itemsize

    def place_struct(self, value: ctypes.Structure | ctypes.Array[ctypes.Structure]) -> int:
        """A struct, or several; returns where it went. What it points to has been placed."""
        begin = self.place(ctypes.addressof(value), ctypes.sizeof(value))
        for offset in _pointers_of(type(value)):
            at = begin + offset
            (address,) = struct.unpack_from("<Q", self.data, at)
            if address:
                struct.pack_into("<Q", self.data, at, self._offset_of(address))
                self.pointers.append(at)
        return begin

    def _offset_of(self, address: int) -> int:
        for begin, (size, to) in self._placed.items():
            if begin <= address < begin + size or begin == address:
                return to + address - begin
        raise ValueError("a struct points to memory that was not placed")


def _pointers_of(kind: type) -> Iterator[int]:
    """Where pointers stand in a struct, or in an array of what may hold some."""
    if kind is ctypes.c_void_p:
        yield 0
    elif issubclass(kind, ctypes.Structure):
        for name, own in kind._fields_:
            yield from (getattr(kind, name).offset + at for at in _pointers_of(own))
    elif issubclass(kind, ctypes.Array):
        size = ctypes.sizeof(kind._type_)
        yield from (size * i + at for i in range(kind._length_) for at in _pointers_of(kind._type_))


@dataclass(frozen=True)
class LayerCall:
    """A layer, and what goes into it."""

    layer: ResMoEWeights
    x: Tensor
    weights: Tensor
    ids: Tensor
    threads: int = 1

    def written(self) -> bytes:
        """As ``run_calls.cpp`` reads it."""
        image, bound = Image(), BoundStruct(self.layer, SILU)
        for tensor in _tensors_of(self.layer):
            image.place_tensor(tensor)
        for bits in (1, 2, 3, 4):
            image.place_tensor(trellis_tables(bits))
        arrays = [array for array in bound._arrays if len(array)]
        for array in arrays:
            image.place_struct(array)
        x, weights, ids = (image.place_tensor(tensor.contiguous()) for tensor in (self.x, self.weights, self.ids))
        # Arrays without elements have addresses too, of nothing.
        for name, array in zip(("low_rank", "bitmap", "quantized"), bound._arrays, strict=True):
            if not len(array):
                setattr(bound.struct, name, None)
        layer = image.place_struct(bound.struct)
        size = self.x.numel() * self.x.itemsize
        head = (layer, x, DTYPES[self.x.dtype], len(self.x), ids, weights, self.ids.shape[1], size, self.threads, 0)
        return _call(0, head, image)

    def result(self, data: bytearray) -> Tensor:
        """What the program gave."""
        return torch.frombuffer(data, dtype=self.x.dtype).view(self.x.shape)


@dataclass(frozen=True)
class Rows8Call:
    """Rows in 8-bit codes, and what they are multiplied with."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    threads: int = 1

    def written(self) -> bytes:
        """As ``run_calls.cpp`` reads it."""
        image = Image()
        codes, scales, x = (image.place_tensor(t) for t in (self.codes, self.scales, self.x))
        bias = -1 if self.bias is None else image.place_tensor(self.bias)
        tokens, rows, columns = len(self.x), *self.codes.shape
        size = self.x.itemsize * tokens * rows
        head = (codes, scales, bias, x, tokens, rows, columns, size, self.threads, DTYPES[self.x.dtype])
        return _call(1, head, image)

    def result(self, data: bytearray) -> Tensor:
        """What the program gave."""
        return torch.frombuffer(data, dtype=self.x.dtype).view(len(self.x), len(self.codes))


Call = LayerCall | Rows8Call


def _call(kind: int, head: Sequence[int], image: Image) -> bytes:
    words = (kind, len(image.pointers), *head, *image.pointers)
    return struct.pack(f"<{len(words)}q", *words) + image.data


def _tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in a tree of dataclasses, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for own in value.values():
            yield from _tensors_of(own)
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from _tensors_of(own)
    elif dataclasses.is_dataclass(value):
        for own in dataclasses.fields(value):
            yield from _tensors_of(getattr(value, own.name))


def run(program: Path, calls: Sequence[Call], folder: Path) -> list[Tensor]:
    """The calls' results, of one process.

    Raises:
        RuntimeError: the program ends otherwise than well.
    """
    names = []
    for i, call in enumerate(calls):
        (folder / f"{i}.call").write_bytes(call.written())
        names += [str(folder / f"{i}.call"), str(folder / f"{i}.result")]
    command = [EMULATOR, "-cpu", PROCESSORS[program.name], "-L", LIBRARIES, str(program), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program.name} under emulation ended with {done.returncode}: {done.stderr[-2000:]}")
    return [call.result(bytearray((folder / f"{i}.result").read_bytes())) for i, call in enumerate(calls)]
