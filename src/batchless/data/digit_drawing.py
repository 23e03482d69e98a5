"""Digits drawn into small images: placed, turned and slanted; printed digits; soft and coloured grounds."""

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample

_GLYPH_SIZE = 32  # pixels of a printed digit's square


def placed(
    digits: Tensor,
    size: int,
    *,
    height: Tensor,
    width: Tensor,
    x: Tensor,
    y: Tensor,
    turn: Tensor | float = 0.0,
    slant: Tensor | float = 0.0,
) -> Tensor:
    """Digits `[N, h, w]` stretched to a box and placed on black: `[N, 1, size, size]`, about 0 to 1.

    Args:
        digits: intensities from 0 to 1.
        size: of the images, in pixels.
        height: of the box, in pixels; this and all that follow for each digit.
        width: of the box.
        x: the box's centre, in pixels to the right of the image's centre.
        y: the same, downwards.
        turn: radians.
        slant: pixels to the side per pixel of height, as in italics.

    """
    count = len(digits)
    turns, slants = (torch.as_tensor(value, dtype=torch.float32).expand(count) for value in (turn, slant))
    cos, sin, one, zero = turns.cos(), turns.sin(), torch.ones(count), torch.zeros(count)
    # affine_grid asks where in the digit each pixel comes from, in units in which both reach from -1 to 1.
    turned = torch.stack([cos, sin, -sin, cos], dim=1).view(count, 2, 2)
    slanted = torch.stack([one, slants, zero, one], dim=1).view(count, 2, 2)
    zoom = torch.stack([size / width, size / height], dim=1)[:, :, None]
    matrix = zoom * (slanted @ turned)
    offset = -matrix @ (torch.stack([x, y], dim=1)[:, :, None] * 2 / size)
    grid = affine_grid(torch.cat([matrix, offset], dim=2), [count, 1, size, size], align_corners=False)
    return grid_sample(digits[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)


def printed_digits() -> Tensor:
    """The ten digits in the font that PIL brings with it, thin, bold and hollow: float32 `[3, 10, 32, 32]`, 0 to 1."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=_GLYPH_SIZE)

    def drawn(digit: int, stroke: int) -> Tensor:
        image = Image.new("L", (_GLYPH_SIZE, _GLYPH_SIZE))
        centre = (_GLYPH_SIZE / 2, _GLYPH_SIZE / 2)
        ImageDraw.Draw(image).text(centre, str(digit), fill=255, font=font, anchor="mm", stroke_width=stroke)
        return torch.from_numpy(np.array(image)).float() / 255

    thin, bold, bolder = (torch.stack([drawn(digit, stroke) for digit in range(10)]) for stroke in (0, 1, 2))
    return torch.stack([thin, bold, (bolder - thin).clamp(0, 1)])


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Images `[N, C, H, W]` under a Gaussian of each image's own sigma, in pixels, up to about 2; edges are repeated."""
    span = torch.arange(-4, 5, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (span / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel /= kernel.sum(dim=1, keepdim=True)
    count, channels, height, width = images.shape
    weight = kernel.repeat_interleave(channels, dim=0)[:, None]
    padded = torch.nn.functional.pad(images, [4] * 4, mode="replicate").reshape(1, count * channels, height + 8, -1)
    rows = conv2d(padded, weight[:, :, None, :], groups=count * channels)
    return conv2d(rows, weight[:, :, :, None], groups=count * channels).view(count, channels, height, width)


def slope(size: int, *, direction: Tensor, strength: Tensor) -> Tensor:
    """A plane of brightness through 0 at the centre, as of light from one side: `[N, 1, size, size]`.

    It rises by `strength` from the centre to the edge that lies in `direction` (radians).
    """
    span = torch.linspace(-1, 1, size)
    across = direction.cos()[:, None, None] * span + direction.sin()[:, None, None] * span[:, None]
    return (strength[:, None, None] * across)[:, None]


def column(values: Tensor) -> Tensor:
    """One number for each image, shaped to meet images: `[N, 1, 1, 1]`."""
    return values[:, None, None, None]
