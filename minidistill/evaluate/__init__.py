"""How good a student is: its distance to the teacher, its agreement with the prompt, and images side by side."""

from minidistill.evaluate.image_grid import comparison_grid
from minidistill.evaluate.metrics import ClipScore, estimate, noise_error_share, pixels, psnr
from minidistill.evaluate.sampling import Drawn, draw

__all__ = ["ClipScore", "Drawn", "comparison_grid", "draw", "estimate", "noise_error_share", "pixels", "psnr"]
