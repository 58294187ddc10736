"""Shapes and memory layouts for the kernel's tests; tests/parity checks that no layer of SD 1.5 or SDXL is missing."""

import torch

# Linear layers and 1x1 convolutions of SDXL: (M, K, N) for [M, K] -> [M, N]
SDXL = [  # at 1024 x 1024 pixels, batch size 1
    *((4096, K, N) for K, N in ((640, 640), (640, 5120), (2560, 640))),
    *((1024, K, N) for K, N in ((1280, 1280), (1280, 10240), (5120, 1280))),
    *((77, 2048, N) for N in (640, 1280)),
    *((1, 1280, N) for N in (320, 640, 1280)),
    *((1, K, 1280) for K in (320, 2816)),
    # 1x1 convolutions, which change the number of channels
    *((1024, K, 1280) for K in (640, 1920, 2560)),
    *((4096, K, 640) for K in (320, 960, 1280, 1920)),
    *((16384, K, 320) for K in (640, 960)),
]
# 3x3 convolutions of SD 1.5 and SDXL: channels in and out, side
CONVS = [
    *((C, 320, side) for C in (320, 640, 960) for side in (64, 128)),
    *((C, 640, side) for C in (320, 640, 960, 1280, 1920) for side in (32, 64)),
    *((C, 1280, side) for C in (640, 1280, 1920, 2560) for side in (16, 32)),
    *((C, 1280, 8) for C in (1280, 2560)),
]

VIEWS = {  # memory layouts of x
    "strided": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],  # a stride longer than the rows
    "odd stride": lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],  # a stride that is no multiple of 16 bytes
    "unaligned": lambda x: torch.cat([x[:, :8], x], dim=1)[:, 1 : x.shape[1] + 1],  # allowed stride, unaligned start
    "columns": lambda x: x.T.contiguous().T,
    "transposed dimensions": lambda x: x.view(3, len(x) // 3, -1).transpose(0, 1),
    "expanded": lambda x: x[:1].expand(len(x), -1),
    "one row": lambda x: x[0],
    "empty": lambda x: x[:0],
}
