"""Float matrix products on the tiles of Intel AMX: on emulated tiles (tests/amx), and on a CPU that has them."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import pytest
import torch
from parity import assert_law
from tiles import build_kernels
from torch import Tensor

from fused_rnn import _C

# K, M, N: below, at and above a vector, a tile's 32 rows, columns and k, the 128 k and 1024 columns of a block.
SHAPES = [
    (1, 1, 1),
    (5, 7, 33),
    (31, 16, 15),
    (32, 17, 32),
    (33, 32, 31),
    (65, 33, 16),
    (128, 40, 65),
    (129, 65, 48),
    (161, 5, 97),
    (257, 31, 40),
    (300, 100, 17),
    (50, 3, 1057),
    (600, 70, 64),
]


@pytest.fixture(scope="module", params=["emulated", "hardware"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    emulated = request.param == "emulated"
    if not emulated and "amx" not in _C.isas():
        pytest.skip("this CPU has no AMX")
    kernels = ["kernels_amx_matrix", "kept_panels", "scratch", "team"]
    return build_kernels(tmp_path_factory.mktemp("amx"), "products", kernels, emulated)


Product = Callable[..., Tensor]


def call(function: Callable, sizes: list[int], a: Tensor, b: Tensor, c: Tensor, *numbers: int) -> None:
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, c))
    left = function((ctypes.c_int64 * len(sizes))(*sizes), *pointers, *numbers)
    assert left == 0, "a thread has not given its tiles back"


class SumOverRows:
    """a: [K, M], b: [K, N]"""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.function = library.frnn_sum_over_rows

    def __call__(self, a: Tensor, b: Tensor, c: Tensor | None = None, threads: int = 1, parts: int = 3):
        (K, M), N = a.shape, b.size(1)
        result = torch.full((M, N), float("nan")) if c is None else c.clone()
        call(
            self.function,
            [K, M, N, a.stride(0), b.stride(0)],
            *(a, b, result),
            *(c is not None, threads, parts),
        )
        return result

    @staticmethod
    def operands(K: int, M: int, N: int) -> tuple[Tensor, Tensor]:
        return torch.randn(K, M), torch.randn(K, N)

    @staticmethod
    def by_torch(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        """As the gradients of torch.nn's weights: a sum of one product a step, here of 16 rows."""
        result = torch.zeros(a.size(1), b.size(1), dtype=a.dtype)
        for step, rows in zip(a.split(16), b.split(16), strict=True):
            result += step.t() @ rows
        return result if c is None else c + result


class Multiply:
    """a: [M, K], b: [K, N]"""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.function = library.frnn_multiply

    def __call__(self, a: Tensor, b: Tensor, c: Tensor | None = None, threads: int = 1, parts: int = 3):
        (M, K), N = a.shape, b.size(1)
        result = torch.full((M, N), float("nan")) if c is None else c.clone()
        call(self.function, [M, K, N, a.stride(0)], a, b, result, c is not None, threads, parts)
        return result

    @staticmethod
    def operands(K: int, M: int, N: int) -> tuple[Tensor, Tensor]:
        return torch.randn(M, K), torch.randn(K, N)

    @staticmethod
    def by_torch(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        return a @ b if c is None else c + a @ b


@pytest.fixture(params=[SumOverRows, Multiply])
def product(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Product:
    return request.param(library)


def law(product: Product, *calls: tuple[Tensor, ...]) -> None:
    assert_law(
        *(
            (
                {"c": product(*operands)},
                {"c": product.by_torch(*operands)},
                {"c": product.by_torch(*(x.double() for x in operands))},
            )
            for operands in calls
        )
    )


@pytest.mark.parametrize("K, M, N", SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_keeps_the_law(K: int, M: int, N: int, add: bool, product: Product) -> None:
    draws = max(2, 2000 // (M * N))  # few numbers say nothing of torch's accuracy
    law(product, *((*product.operands(K, M, N), *[torch.randn(M, N)][:add]) for _ in range(draws)))


@pytest.mark.parametrize("K, M, N", SHAPES)
@pytest.mark.parametrize("parts", [2, 3])
def test_whole_numbers_are_exact(K: int, M: int, N: int, parts: int, product: Product) -> None:
    """No order of additions rounds, so that any other number is a mistake. Of more bits than a part has."""
    a, b = ((x * 1000).round() for x in product.operands(K, M, N))
    b = (b / 64).round()
    c = torch.randint(-99, 99, (M, N)).float()
    expected = product.by_torch(a.double(), b.double(), c.double())
    for threads in (1, 3):
        assert torch.equal(product(a, b, c, threads, parts).double(), expected)


def test_operands_may_be_columns_of_wider_ones(product: Product) -> None:
    K, M, N = 70, 35, 37
    a, b = product.operands(K, M, N)
    wide = torch.cat([torch.full_like(a, float("nan")), a, torch.full_like(a, float("nan"))], 1)
    between = wide[:, a.size(1) : 2 * a.size(1)]
    expected = product(a, b)
    assert torch.equal(product(between, b), expected)
    if isinstance(product, SumOverRows):
        wide = torch.cat([torch.full_like(b, float("nan")), b], 1)
        assert torch.equal(product(between, wide[:, N:]), expected)


@pytest.mark.parametrize("K, M, N", [(300, 70, 1100), (40, 200, 40), (64, 8, 200)])
def test_any_number_of_threads_has_the_same_bits(K: int, M: int, N: int, product: Product) -> None:
    torch.set_num_threads(5)
    operands = product.operands(K, M, N)
    alone = product(*operands)
    for threads in (2, 3, 4, 5):
        assert torch.equal(product(*operands, None, threads), alone)


def test_two_parts_are_less_accurate(product: Product) -> None:
    a, b = product.operands(256, 64, 64)
    exact = product.by_torch(a.double(), b.double())
    two, three = ((product(a, b, None, 1, parts) - exact).abs().max() for parts in (2, 3))
    assert 4 * three < two < 2**-13 * exact.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operand", [0, 1])
def test_what_is_not_finite_stays_in_its_row_and_column(value: float, operand: int, product: Product) -> None:
    K, M, N = 300, 70, 100
    a, b = product.operands(K, M, N)
    (a, b)[operand][41, 37] = value
    ours, exact = product(a, b), product.by_torch(a.double(), b.double())
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours.isinf(), exact.isinf())
    finite = exact.isfinite()
    assert 0 < (~finite).sum() <= max(M, N)
    torch.testing.assert_close(ours[finite].double(), exact[finite], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "of_a, of_b",
    [(1e-30, 1.0), (1.0, 1e-30), (1e-14, 1e-14), (1e30, 1.0), (1e30, 1e-30), (1e-30, 1e36), (1e19, 1e19)],
)
def test_any_magnitude_keeps_the_law(of_a: float, of_b: float, product: Product) -> None:
    calls = []
    for _ in range(2):
        a, b = product.operands(300, 40, 65)
        calls.append((a * of_a, b * of_b / 64))
    law(product, *calls)


def test_a_vanishing_gradient_keeps_the_law(product: Product) -> None:
    """Rows that are smaller and smaller, as over many steps: blocks of k that differ by their powers of two."""
    calls = []
    for _ in range(2):
        a, b = product.operands(600, 40, 65)
        decay = 0.9 ** torch.arange(600.0)
        calls.append((a * (decay[:, None] if isinstance(product, SumOverRows) else decay), b))
    law(product, *calls)
    # Of the last rows alone, too.
    law(
        product,
        *((a[-100:] if isinstance(product, SumOverRows) else a[:, -100:], b[-100:]) for a, b in calls),
    )


def test_zeros_are_zero(product: Product) -> None:
    a, b = product.operands(40, 40, 40)
    for left, right in itertools.product((a, a * 0), (b, b * 0)):
        if left is not a or right is not b:
            assert torch.equal(product(left, right), torch.zeros(40, 40))
