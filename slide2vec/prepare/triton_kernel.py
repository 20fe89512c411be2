"""Kernels of `TritonPreparer` and `gather_tiles`. Importing them needs Triton."""

import triton
import triton.language as tl

__all__ = ["gather", "normalise"]

#: Added to a float32 from 0 to 2^22 it leaves a whole number, halves rounded to even: 1.5 * 2^23.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def normalise(  # type: ignore[no-untyped-def]
    tiles,
    out,
    side,
    crop,
    corner,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    packed: tl.constexpr,
    block: tl.constexpr,
):
    """Programs are (pixels / block, tile, channel): tiles (B, side, side, 3) uint8 -> out, cropped.

    packed: out is (B, crop, crop, 3) uint8; else (B, 3, crop, crop) float32, pixel * scale + shift.
    """
    pixel = tl.program_id(0) * block + tl.arange(0, block)
    tile = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2)
    inside = pixel < crop * crop
    row, column = pixel // crop + corner, pixel % crop + corner
    value = tl.load(tiles + tile * side * side * 3 + (row * side + column) * 3 + channel, mask=inside)
    if packed:
        tl.store(out + tile * crop * crop * 3 + pixel * 3 + channel, value, mask=inside)
    else:
        scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
        shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
        normalised = value.to(tl.float32) * scale + shift
        tl.store(out + (tile * 3 + channel) * crop * crop + pixel, normalised, mask=inside)


# Numbers that differ from supertile to supertile, for which Triton would compile anew: 1, or divisible by 16.
@triton.jit(do_not_specialize=["slots", "columns", "left", "top", "right", "bottom"])  # type: ignore[untyped-decorator]
def gather(  # type: ignore[no-untyped-def]
    pixels,
    plan,
    first,
    weights,
    slots,
    columns,
    left,
    top,
    right,
    bottom,
    tile_width: tl.constexpr,
    tile_height: tl.constexpr,
    size: tl.constexpr,
    taps: tl.constexpr,
    whole: tl.constexpr,
    block: tl.constexpr,
):
    """Programs are (bytes of a tile / block, tile): compressed tiles that are decoded -> tiles, averaged.

    Compile and launch it with enable_fp_fusion=False: a product that is not rounded before it is added gives
    other pixels than OpenCV.

    pixels: (n, tile_height, tile_width, 3) uint8. plan, int64: rows of `columns` numbers in pixels, -1 where
    the file has none, `slots` in all; then x, y (level px) and the address of the pixels of each tile, which
    are (size, size, 3) uint8. first, weights: see `area_taps`; not looked at where the ratio is `whole`.
    left, top, right, bottom: of the rows, or of the level where it ends before, level px: all else is white.
    """
    byte = tl.program_id(0) * block + tl.arange(0, block)
    wanted = byte < size * size * 3
    row, column, channel = byte // (size * 3), byte // 3 % size, byte % 3
    own = plan + slots + tl.program_id(1) * 3
    if whole:
        from_x, from_y = column * taps, row * taps
    else:
        from_x = tl.load(first + column, mask=wanted, other=0)
        from_y = tl.load(first + row, mask=wanted, other=0)
    x, y = tl.load(own).to(tl.int32) + from_x, tl.load(own + 1).to(tl.int32) + from_y
    total = tl.full((block,), 0, tl.int32 if whole else tl.float32)
    for dy in range(taps):
        in_rows = wanted & (y + dy >= top) & (y + dy < bottom)
        at_y = tl.where(in_rows, y + dy, top)
        of_row = tl.full((block,), 0, tl.int32 if whole else tl.float32)
        for dx in range(taps):
            inside = in_rows & (x + dx >= left) & (x + dx < right)
            at_x = tl.where(inside, x + dx, left)
            place = (at_y - top) // tile_height * columns + (at_x - left) // tile_width
            slot = tl.load(plan + place, mask=inside, other=-1)
            line = slot * tile_height + at_y % tile_height
            value = tl.load(
                pixels + (line * tile_width + at_x % tile_width) * 3 + channel,
                mask=inside & (slot >= 0),
                other=255,
            )
            if whole:
                of_row += value.to(tl.int32)
            else:
                share = tl.load(weights + column * taps + dx, mask=wanted, other=0.0)
                of_row += value.to(tl.float32) * share
        if whole:
            total += of_row
        else:
            total += of_row * tl.load(weights + row * taps + dy, mask=wanted, other=0.0)
    if whole and taps == 1:
        result = total
    elif whole and taps == 2:
        result = (total + 2) >> 2
    else:
        average = total.to(tl.float32) * (1.0 / (taps * taps)) if whole else total
        rounded = (average + ROUNDING) - ROUNDING
        result = tl.minimum(tl.maximum(rounded, 0.0), 255.0).to(tl.int32)
    out = tl.load(own + 2).to(tl.pointer_type(tl.uint8))
    tl.store(out + byte, result.to(tl.uint8), mask=wanted)
