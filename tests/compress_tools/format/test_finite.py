"""NaN and Inf in weights, and what makes some: found wherever they stand, in every dtype that has them."""

import random

import pytest
import torch

from compress_tools.format.finite import ALLOW_VARIABLE, all_finite, plain_fault
from compress_tools.format.parts.base import LARGEST, Role, TensorSpec

NAN, INF = float("nan"), float("inf")
WITH_BOTH = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
WITH_NAN = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
CASES = [(dtype, value) for dtype in WITH_BOTH for value in (NAN, INF, -INF)] + [(dtype, NAN) for dtype in WITH_NAN]


@pytest.mark.parametrize("dtype, value", CASES)
@pytest.mark.parametrize("size", [1, 7, 33, 1000, 70001])
def test_one_anywhere(dtype: torch.dtype, value: float, size: int) -> None:
    pick, good = random.Random(size), torch.full((size,), 0.5)
    assert all_finite(good.to(dtype))
    for place in {0, size - 1, pick.randrange(size)}:
        bad = good.clone()
        bad[place] = value
        assert not all_finite(bad.to(dtype)), place


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([3, 2**31 - 1], dtype=torch.int32),
        torch.tensor([True]),
        torch.empty(0, 4),
        torch.empty(2, device="meta"),
        torch.zeros(3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        torch.full((2, 2), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_what_has_none(tensor: torch.Tensor) -> None:
    assert all_finite(tensor)


def test_of_a_view() -> None:
    """Only what is in it counts, whatever lies between."""
    matrix = torch.ones(6, 6)
    matrix[:, 1] = NAN
    assert all_finite(matrix[:, ::2])
    assert not all_finite(matrix.T)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = torch.tensor([1.0, NAN])
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    assert str(plain_fault(bad)).startswith("holds NaN or Inf, expected finite numbers; download it again, or set")
    assert plain_fault(torch.ones(3)) is None
    for value, refused in (("0", True), ("", True), ("1", False)):
        monkeypatch.setenv(ALLOW_VARIABLE, value)
        assert (plain_fault(bad) is not None) is refused


@pytest.mark.parametrize("role", ["values", "scales"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_that_are_too_large_to_be_multiplied_with(role: Role, dtype: torch.dtype) -> None:
    """A factor of 1e38 may restore to small weights, while a token's product with it is Inf."""
    spec = TensorSpec(0, "up_proj", "resmoe_v", (2, 3), "bfloat16", role, level=2.0 if role == "scales" else 1.0)
    numbers = torch.tensor([[0.0, -1.0, 0.5], [2.0, 0.25, 1.0]]).to(dtype)
    if role == "scales":
        numbers = numbers.abs() / 2
    assert spec.number_fault(LARGEST / 2 * numbers, dtype) is None
    assert str(spec.number_fault(LARGEST * numbers, dtype)) == (
        f"holds {'a value of' if role == 'values' else 'a scale of which codes make'} 1.58e+29, expected at most "
        "7.92e+28: sums of its products overflow"
    )
    assert spec.number_fault(torch.zeros(0, 3, dtype=dtype), dtype) is None


def test_a_masks_bytes_have_no_size() -> None:
    spec = TensorSpec(0, "up_proj", "resmoe_mask", (1, 8), "uint8", "mask")
    assert spec.number_fault(torch.full((1, 8), 255, dtype=torch.uint8), torch.bfloat16) is None
