"""Compiles the CUDA kernel on first use. PyTorch caches the result in TORCH_EXTENSIONS_DIR or its own cache folder."""

import sys
from functools import cache
from pathlib import Path

import torch

CSRC = Path(__file__).with_name("csrc")
SOURCES = ("autograd.cpp", "binding.cpp", "lora_gemm.cu")
MIN_CAPABILITY = (8, 0)  # the first with mma.sync for bfloat16, and with cp.async


def obstacle(device: torch.device) -> str | None:
    """Return None if the kernel can run on ``device``, compiling it if necessary; otherwise a short reason."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "the fused kernel needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "the fused kernel needs compute capability {}.{} or newer, not {}.{}".format(
            *MIN_CAPABILITY, *capability
        )
    return build(capability)


def nvcc_flags(capability: tuple[int, int]) -> list[str]:
    """Target flags for nvcc. TMA and wgmma need sm_90a, which runs on compute capability 9.0 only."""
    if capability == (9, 0):
        return ["-gencode=arch=compute_90a,code=sm_90a", "-DSM90"]
    return ["-gencode=arch=compute_{0}{1},code=sm_{0}{1}".format(*capability)]


@cache
def build(capability: tuple[int, int]) -> str | None:
    """Compile and load the kernel, once per process. Return None, or the reason for a failure."""
    name = "minidistill_kernels_{}{}".format(*capability)  # machines with other GPUs may share the cache folder
    try:
        from torch.utils import cpp_extension  # searches for compilers when imported; needs setuptools

        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
        if cpp_extension.CUDA_HOME and ((folder / "lock").exists() or not (folder / f"{name}.so").exists()):
            print(
                f"Compiling the fused kernel, once; this takes minutes. If it never ends, a process that was compiling "
                f"it has been killed: delete {folder / 'lock'}.",
                file=sys.stderr,
            )
        cpp_extension.load(
            name,
            [str(CSRC / source) for source in SOURCES],
            extra_cflags=["-O3"],
            extra_cuda_cflags=["-O3", *nvcc_flags(capability)],
            is_python_module=False,
        )
    except (OSError, RuntimeError, ImportError) as error:  # nvcc or ninja is missing, or fails
        return f"the fused kernel could not be built ({first_error(error)})"
    return None


def first_error(error: Exception) -> str:
    """Return the line of a compiler's output that reports the error; for other exceptions, the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line or "not found" in line), lines[0])
