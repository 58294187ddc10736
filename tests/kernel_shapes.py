"""The shapes of layers that have a LoRA, for the kernel's tests on a GPU; tests/parity checks that none is missing."""

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
