"""The dynamic linear layer in Triton: the kernels. `gpu` launches them.

Tensors are contiguous: input [R, K], vector [R, H], weight [H, K, N], base [K, N], result and its
gradient [R, N]. No row's own matrix is ever written: a block of rows is multiplied by each of the H
matrices, and the products are weighed by each row's number. The base is one matrix more, of weight
1: number H.
"""

# mypy takes triton.jit's functions for plain Python, whose arguments would need types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

__all__ = ["rows_kernel", "vector_gradient_kernel", "weight_gradient_kernel"]


@triton.jit
def _tile(base, rows, columns, row_stride, column_stride, R, C):
    """A tile of a matrix [R, C], zero outside."""
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    place = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(base + place, mask=inside, other=0.0)


@triton.jit
def _weighed(vector, rows, h, R, H):
    """What the matrix `h` weighs in each row; the base weighs 1."""
    which = tl.zeros_like(rows) + h
    inside = (rows < R) & (which < H)
    found = tl.load(vector + rows.to(tl.int64) * H + h, mask=inside, other=0.0)
    return tl.where(which < H, found.to(tl.float32), 1.0)


@triton.jit
def rows_kernel(
    input, vector, weight, base, result, R, H, K, N, k_stride, n_stride,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The result; and, with the matrices' strides and K and N exchanged, the input's gradient.

    A program has BLOCK_R rows and BLOCK_N of their results.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    size = tl.cast(K, tl.int64) * N  # of a matrix
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        some = _tile(input, rows, place, K, 1, R, K)
        for h in range(0, H):
            matrix = _tile(weight + h * size, place, outs, k_stride, n_stride, K, N)
            product = tl.dot(some, matrix, input_precision="ieee")
            total += product * _weighed(vector, rows, h, R, H)[:, None]
        total = tl.dot(
            some, _tile(base, place, outs, k_stride, n_stride, K, N), total,
            input_precision="ieee",
        )  # fmt: skip
    inside = (rows < R)[:, None] & (outs < N)[None, :]
    where = result + rows.to(tl.int64)[:, None] * N + outs[None, :]
    tl.store(where, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def vector_gradient_kernel(
    gradient, input, weight, grad_vector, R, H, K, N,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_R rows and one matrix."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.program_id(1)
    size = tl.cast(K, tl.int64) * N  # of a matrix
    total = tl.zeros((BLOCK_R,), tl.float32)
    for begin in range(0, N, BLOCK_N):
        outs = begin + tl.arange(0, BLOCK_N)
        product = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for first in range(0, K, BLOCK_K):
            place = first + tl.arange(0, BLOCK_K)
            some = _tile(input, rows, place, K, 1, R, K)
            matrix = _tile(weight + h * size, place, outs, N, 1, K, N)
            product = tl.dot(some, matrix, product, input_precision="ieee")
        slope = _tile(gradient, rows, outs, N, 1, R, N).to(tl.float32)
        total += tl.sum(product * slope, 1)
    where = grad_vector + rows.to(tl.int64) * H + h
    tl.store(where, total.to(grad_vector.dtype.element_ty), mask=rows < R)


@triton.jit
def weight_gradient_kernel(
    gradient, input, vector, grad_weight, grad_base, R, H, K, N,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program has a tile of one matrix, and goes over all rows."""
    place = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(2)
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for first in range(0, R, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        some = _tile(input, rows, place, K, 1, R, K)
        slope = _tile(gradient, rows, outs, N, 1, R, N)
        weighed = slope.to(tl.float32) * _weighed(vector, rows, h, R, H)[:, None]
        total = tl.dot(tl.trans(some), weighed.to(some.dtype), total, input_precision="ieee")
    inside = (place < K)[:, None] & (outs < N)[None, :]
    own = place.to(tl.int64)[:, None] * N + outs[None, :]
    if h < H:
        where = grad_weight + h * (tl.cast(K, tl.int64) * N) + own
        tl.store(where, total.to(grad_weight.dtype.element_ty), mask=inside)
    else:
        tl.store(grad_base + own, total.to(grad_base.dtype.element_ty), mask=inside)
