"""Builds the CUDA part on its first use. PyTorch keeps what was built, in TORCH_EXTENSIONS_DIR or its own cache."""

from functools import cache
from pathlib import Path

import torch

CSRC = Path(__file__).with_name("csrc")
SOURCES = ("autograd.cpp", "binding.cpp", "lora_gemm.cu")
LEAST = (8, 0)  # compute capability: mma.sync of bfloat16, cp.async


def obstacle(device: torch.device) -> str | None:
    """None where the kernel can be used on ``device``, after building it if need be; else the reason in a few words."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "the fused kernel needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        return "the fused kernel needs compute capability {}.{} or newer, not {}.{}".format(*LEAST, *capability)
    return built(capability)


def architecture(capability: tuple[int, int]) -> list[str]:
    """Flags for nvcc. Hopper's own instructions are in sm_90a alone, which is for compute capability 9.0 only."""
    number = "{}{}".format(*capability) + ("a" if capability == (9, 0) else "")
    return [f"-gencode=arch=compute_{number},code=sm_{number}", *(["-DSM90"] if capability == (9, 0) else [])]


@cache
def built(capability: tuple[int, int]) -> str | None:
    """Build and load it, once a process. Returns None, or the reason why that failed."""
    from torch.utils import cpp_extension  # looks for compilers as it is imported

    try:
        cpp_extension.load(
            "minidistill_kernels_{}{}".format(*capability),  # machines with other cards may share the folder
            [str(CSRC / name) for name in SOURCES],
            extra_cflags=["-O3"],
            extra_cuda_cflags=["-O3", *architecture(capability)],
            is_python_module=False,
        )
    except (OSError, RuntimeError, ImportError) as error:  # no nvcc, no ninja, or they fail
        return f"the fused kernel could not be built ({cause(error)})"
    return None


def cause(error: Exception) -> str:
    """The line of a compiler's output that says what was wrong; of other errors, the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = (line for line in lines if "error:" in line or "not found" in line)
    return next(telling, lines[0])
