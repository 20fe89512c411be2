"""The kernel of `TritonPreparer`. Importing it needs Triton."""

import triton
import triton.language as tl

__all__ = ["normalise"]


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
