"""The kernels of grouped spectral normalization; :mod:`fastgan.kernels.spectral_norm.launch` launches them.

Columns are walked in memory order as two nested levels, so that transposed convolutions and channels-last weights are
read in place. Long matrices are split over programs; the last program of a layer to finish adds the partial sums in a
fixed order, so results do not depend on the order in which programs run. In comments: R rows and C columns of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.kernels.spectral_norm.plan import FIELDS

ROWS, COLUMNS, INNER, STRIDE_ROW, STRIDE_A, STRIDE_B, VECTOR_A, VECTOR_B, U_OFFSET, V_OFFSET = map(
    tl.constexpr, range(10)
)
S_TILES, S_CHUNKS, S_PARTIALS, T_TILES, T_CHUNKS, T_PARTIALS, TILE_BEGIN, TILE_COUNT = map(tl.constexpr, range(10, 18))
N_FIELDS = tl.constexpr(len(FIELDS))


@triton.jit
def _pointer(pointers, which, layer, n_layers, DTYPE: tl.constexpr):
    """The address of tensor ``layer`` of list ``which``."""
    return tl.load(pointers + which * n_layers + layer).to(tl.pointer_type(DTYPE))


@triton.jit
def _tile(tiles):
    """Layer, start and chunk (or second start) that this program has."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    return tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)


@triton.jit
def _columns(g, c):
    """Offsets of columns c in the weight and in v."""
    inner = tl.load(g + INNER)
    a, b = c % inner, c // inner
    in_weight = a * tl.load(g + STRIDE_A) + b * tl.load(g + STRIDE_B)
    return in_weight, a * tl.load(g + VECTOR_A) + b * tl.load(g + VECTOR_B)


@triton.jit
def _is_last(tickets, layer, n_tiles):
    """Return True in the last of a layer's ``n_tiles`` programs to finish, which sees the stores of all others."""
    tl.debug_barrier()
    last = tl.atomic_add(tickets + layer, 1, sem="acq_rel") == n_tiles - 1
    if last:
        tl.store(tickets + layer, n_tiles * 0)
    return last


@triton.jit
def spectral_norm_matvec_kernel(
    pointers, geometry, tiles, partials, u_flat, v_flat, sigma, eps, n_layers,
    FROM_LIST: tl.constexpr, W_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
    REDUCE_PARTS: tl.constexpr, REDUCE_BLOCK: tl.constexpr,
):  # fmt: skip
    """s = W v, u = s / |s|, sigma = s . u for every weight, v being that of the list (FROM_LIST) or of ``v_flat``."""
    layer, row0, chunk = _tile(tiles)
    g = geometry + layer * N_FIELDS
    rows, columns = tl.load(g + ROWS), tl.load(g + COLUMNS)
    weight = _pointer(pointers, 0, layer, n_layers, W_DTYPE)
    v_list = _pointer(pointers, 2, layer, n_layers, W_DTYPE)
    v_base = v_flat + tl.load(g + V_OFFSET)

    r = row0 + tl.arange(0, BLOCK_R)
    row_offset = r * tl.load(g + STRIDE_ROW)
    c0 = chunk * CHUNK
    end = tl.minimum(c0 + CHUNK, columns)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)  # [R, C]
    while c0 < end:
        c = c0 + tl.arange(0, BLOCK_C)
        in_weight, in_v = _columns(g, c)
        v = tl.load(v_list + in_v if FROM_LIST else v_base + in_v, c < end, 0.0).to(tl.float32)
        mask = (r[:, None] < rows) & (c[None, :] < end)
        w = tl.load(weight + row_offset[:, None] + in_weight[None, :], mask, 0.0).to(tl.float32)
        acc += w * v[None, :]
        c0 += BLOCK_C
    part = partials + tl.load(g + S_PARTIALS)
    tl.store(part + chunk * rows + r, tl.sum(acc, 1), r < rows)

    if _is_last(pointers + 3 * n_layers, layer, tl.load(g + S_TILES)):
        u_list = _pointer(pointers, 1, layer, n_layers, W_DTYPE)
        u_base = u_flat + tl.load(g + U_OFFSET)
        value = _renew(part, tl.load(g + S_CHUNKS), rows, u_base, u_list, eps, REDUCE_PARTS, REDUCE_BLOCK)
        _store_sigma(sigma + layer, value)


@triton.jit
def spectral_norm_matvec_t_kernel(
    pointers, geometry, tiles, partials, u_flat, v_flat, sigma, eps, n_layers,
    UPDATE: tl.constexpr, FROM_LIST: tl.constexpr, W_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, REDUCE_PARTS: tl.constexpr, REDUCE_BLOCK: tl.constexpr,
):  # fmt: skip
    """t = W^T u, v = t / |t| and sigma = u^T W v = t . v for every weight; without UPDATE only sigma, v as it is."""
    layer, column0, chunk = _tile(tiles)
    g = geometry + layer * N_FIELDS
    rows, columns = tl.load(g + ROWS), tl.load(g + COLUMNS)
    weight = _pointer(pointers, 0, layer, n_layers, W_DTYPE)
    u_list = _pointer(pointers, 1, layer, n_layers, W_DTYPE)
    u_base = u_flat + tl.load(g + U_OFFSET)

    c = column0 + tl.arange(0, BLOCK_C)
    in_weight, in_v = _columns(g, c)
    r0 = chunk * CHUNK
    end = tl.minimum(r0 + CHUNK, rows)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)  # [R, C]
    while r0 < end:
        r = r0 + tl.arange(0, BLOCK_R)
        u = tl.load(u_list + r if FROM_LIST else u_base + r, r < end, 0.0).to(tl.float32)
        mask = (r[:, None] < end) & (c[None, :] < columns)
        offsets = (r * tl.load(g + STRIDE_ROW))[:, None] + in_weight[None, :]
        acc += tl.load(weight + offsets, mask, 0.0).to(tl.float32) * u[:, None]
        r0 += BLOCK_R
    part = partials + tl.load(g + T_PARTIALS)
    tl.store(part + chunk * columns + in_v, tl.sum(acc, 0), c < columns)

    if _is_last(pointers + 3 * n_layers, layer, tl.load(g + T_TILES)):
        v_list = _pointer(pointers, 2, layer, n_layers, W_DTYPE)
        v_base = v_flat + tl.load(g + V_OFFSET)
        chunks = tl.load(g + T_CHUNKS)
        if UPDATE:
            value = _renew(part, chunks, columns, v_base, v_list, eps, REDUCE_PARTS, REDUCE_BLOCK)
        else:
            _, value = _add_parts(part, chunks, columns, v_base, v_list, REDUCE_PARTS, REDUCE_BLOCK)
            _copy(v_base, v_list, columns, REDUCE_BLOCK)
            _copy(u_base, u_list, rows, REDUCE_BLOCK)
        _store_sigma(sigma + layer, value)


@triton.jit
def _store_sigma(sigma, value):
    """1 in place of 0, so that a weight of zeros stays zero."""
    tl.store(sigma, tl.where(value == 0, 1.0, value))


@triton.jit
def _renew(part, parts, n, out, old, eps, REDUCE_PARTS: tl.constexpr, REDUCE_BLOCK: tl.constexpr):
    """Add the partial vectors to x, store x / |x| in ``out`` and ``old``, and return <x, out>.

    If |x| is zero or not finite, ``out`` is the ``old`` vector.
    """
    squares, dot = _add_parts(part, parts, n, out, old, REDUCE_PARTS, REDUCE_BLOCK)
    norm = tl.sqrt_rn(squares)
    if (norm > 0) & (norm < float("inf")):
        divisor = tl.maximum(norm, eps)
        dot = norm * tl.div_rn(norm, divisor)
        _divide(out, old, n, divisor, REDUCE_BLOCK)
    else:
        _copy(out, old, n, REDUCE_BLOCK)
    return dot


@triton.jit
def _add_parts(part, parts, n, out, old, REDUCE_PARTS: tl.constexpr, REDUCE_BLOCK: tl.constexpr):
    """x = sum of the ``parts`` partial vectors of n entries, into ``out``; returns <x, x> and <x, old>."""
    squares = n.to(tl.float32) * 0
    dot = n.to(tl.float32) * 0
    i0 = n * 0
    while i0 < n:
        i = i0 + tl.arange(0, REDUCE_BLOCK)
        x = tl.zeros([REDUCE_BLOCK], tl.float32)
        p0 = n * 0
        while p0 < parts:
            p = p0 + tl.arange(0, REDUCE_PARTS)
            mask = (p[:, None] < parts) & (i[None, :] < n)
            x += tl.sum(tl.load(part + p[:, None] * n + i[None, :], mask, 0.0, cache_modifier=".cg"), 0)
            p0 += REDUCE_PARTS
        tl.store(out + i, x, i < n)
        squares += tl.sum(x * x)
        dot += tl.sum(x * tl.load(old + i, i < n, 0.0).to(tl.float32))
        i0 += REDUCE_BLOCK
    tl.debug_barrier()
    return squares, dot


@triton.jit
def _divide(out, old, n, divisor, REDUCE_BLOCK: tl.constexpr):
    """``out`` /= divisor, and ``old`` likewise."""
    i0 = n * 0
    while i0 < n:
        i = i0 + tl.arange(0, REDUCE_BLOCK)
        x = tl.load(out + i, i < n, 0.0)
        x = tl.div_rn(x, tl.zeros_like(x) + divisor)
        tl.store(out + i, x, i < n)
        tl.store(old + i, x.to(old.dtype.element_ty), i < n)
        i0 += REDUCE_BLOCK


@triton.jit
def _copy(out, old, n, REDUCE_BLOCK: tl.constexpr):
    """``out`` = ``old``."""
    i0 = n * 0
    while i0 < n:
        i = i0 + tl.arange(0, REDUCE_BLOCK)
        tl.store(out + i, tl.load(old + i, i < n, 0.0).to(tl.float32), i < n)
        i0 += REDUCE_BLOCK


@triton.jit
def spectral_norm_scale_kernel(
    pointers, geometry, tiles, sigma, n_layers,
    W_DTYPE: tl.constexpr, O_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W / sigma, entries in memory order: weight and result are laid out alike and without gaps."""
    layer, block, _ = _tile(tiles)
    g = geometry + layer * N_FIELDS
    weight = tl.multiple_of(_pointer(pointers, 0, layer, n_layers, W_DTYPE), ALIGNMENT)
    out = tl.multiple_of(_pointer(pointers, 1, layer, n_layers, O_DTYPE), ALIGNMENT)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < tl.load(g + ROWS) * tl.load(g + COLUMNS)
    w = tl.load(weight + i, mask, 0.0).to(tl.float32)
    tl.store(out + i, tl.div_rn(w, tl.zeros_like(w) + tl.load(sigma + layer)).to(O_DTYPE), mask)


@triton.jit
def spectral_norm_dots_kernel(
    pointers, geometry, tiles, partials, dots, u_flat, v_flat, n_layers, n_tiles,
    DOUBLE: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, REDUCE_BLOCK: tl.constexpr,
):  # fmt: skip
    """dots[0] = <G, W>; if DOUBLE also dots[1] = <H, G> and dots[2] = <H, u v^T>, for every weight."""
    program = tl.program_id(0).to(tl.int64)
    layer, row0, column0 = _tile(tiles)
    g = geometry + layer * N_FIELDS
    rows, columns = tl.load(g + ROWS), tl.load(g + COLUMNS)
    weight = _pointer(pointers, 0, layer, n_layers, W_DTYPE)
    grad = _pointer(pointers, 1, layer, n_layers, G_DTYPE)
    r = row0 + tl.arange(0, BLOCK_R)
    row_offset = r * tl.load(g + STRIDE_ROW)
    gw = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)  # [R, C]
    hg = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    huv = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    c0 = column0
    end = tl.minimum(column0 + CHUNK, columns)
    while c0 < end:
        c = c0 + tl.arange(0, BLOCK_C)
        in_weight, in_v = _columns(g, c)
        mask = (r[:, None] < rows) & (c[None, :] < end)
        offsets = row_offset[:, None] + in_weight[None, :]
        g_tile = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
        gw += g_tile * tl.load(weight + offsets, mask, 0.0).to(tl.float32)
        if DOUBLE:
            h_tile = tl.load(_pointer(pointers, 2, layer, n_layers, W_DTYPE) + offsets, mask, 0.0).to(tl.float32)
            u = tl.load(u_flat + tl.load(g + U_OFFSET) + r, r < rows, 0.0)
            v = tl.load(v_flat + tl.load(g + V_OFFSET) + in_v, c < end, 0.0)
            hg += h_tile * g_tile
            huv += h_tile * (u[:, None] * v[None, :])
        c0 += BLOCK_C
    tl.store(partials + program, tl.sum(gw))
    if DOUBLE:
        tl.store(partials + n_tiles + program, tl.sum(hg))
        tl.store(partials + 2 * n_tiles + program, tl.sum(huv))

    count = tl.load(g + TILE_COUNT)
    tickets = pointers + (5 if DOUBLE else 3) * n_layers
    if _is_last(tickets, layer, count):
        for k in tl.static_range(3 if DOUBLE else 1):
            part = partials + k * n_tiles + tl.load(g + TILE_BEGIN)
            tl.store(dots + k * n_layers + layer, _sum(part, count, REDUCE_BLOCK))


@triton.jit
def _sum(x, n, REDUCE_BLOCK: tl.constexpr):
    acc = tl.zeros([REDUCE_BLOCK], tl.float32)
    i0 = n * 0
    while i0 < n:
        i = i0 + tl.arange(0, REDUCE_BLOCK)
        acc += tl.load(x + i, i < n, 0.0, cache_modifier=".cg")
        i0 += REDUCE_BLOCK
    return tl.sum(acc)


@triton.jit
def spectral_norm_combine_kernel(
    pointers, geometry, tiles, dots, u_flat, v_flat, sigma, n_layers,
    DOUBLE: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """dW of the backward pass, from G; if DOUBLE dG and dW of the double backward pass, from H, G and W."""
    layer, row0, column0 = _tile(tiles)
    g = geometry + layer * N_FIELDS
    rows, columns = tl.load(g + ROWS), tl.load(g + COLUMNS)
    grad = _pointer(pointers, 1, layer, n_layers, G_DTYPE)
    d_weight = _pointer(pointers, 3 if DOUBLE else 2, layer, n_layers, W_DTYPE)
    s = tl.load(sigma + layer)
    gw = tl.load(dots + layer)
    r = row0 + tl.arange(0, BLOCK_R)
    row_offset = r * tl.load(g + STRIDE_ROW)
    u = tl.load(u_flat + tl.load(g + U_OFFSET) + r, r < rows, 0.0)
    c0 = column0
    end = tl.minimum(column0 + CHUNK, columns)
    while c0 < end:
        c = c0 + tl.arange(0, BLOCK_C)
        in_weight, in_v = _columns(g, c)
        mask = (r[:, None] < rows) & (c[None, :] < end)
        offsets = row_offset[:, None] + in_weight[None, :]
        v = tl.load(v_flat + tl.load(g + V_OFFSET) + in_v, c < end, 0.0)
        uv = u[:, None] * v[None, :]  # [R, C]
        g_tile = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
        if DOUBLE:
            h_tile = tl.load(_pointer(pointers, 2, layer, n_layers, W_DTYPE) + offsets, mask, 0.0).to(tl.float32)
            w_tile = tl.load(_pointer(pointers, 0, layer, n_layers, W_DTYPE) + offsets, mask, 0.0).to(tl.float32)
            hg, huv = tl.load(dots + n_layers + layer), tl.load(dots + 2 * n_layers + layer)
            d_grad = _pointer(pointers, 4, layer, n_layers, G_DTYPE)
            tl.store(d_grad + offsets, (h_tile / s - (huv / s / s) * w_tile).to(G_DTYPE), mask)
            d_tile = ((2 * (gw / s) * huv - hg) / s / s) * uv - (huv / s / s) * g_tile
        else:
            d_tile = g_tile / s - (gw / s / s) * uv
        tl.store(d_weight + offsets, d_tile.to(W_DTYPE), mask)
        c0 += BLOCK_C
