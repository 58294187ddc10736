"""Benchmarks: how long things take, and how much memory.

  python -m minidistill.bench [speed]      a UNet call, an image, a training step; against diffusers and peft
  python -m minidistill.bench updates      a training step with each technique that speeds it up
  python -m minidistill.bench loading      loading Stable Diffusion 1.5 from a file
  python -m minidistill.bench kernel       LoRA layers on a GPU, with and without the fused kernel
  python -m minidistill.bench memory       where the memory goes, tensor by tensor; needs no GPU

Each prints a table and writes its measurements as JSON. Without a command, speed runs.
"""

import sys
from collections.abc import Sequence

from minidistill.bench import kernel, loading, memory, speed, updates
from minidistill.training.command_line import one_line_errors, run_command

COMMANDS = {"speed": speed, "updates": updates, "loading": loading, "kernel": kernel, "memory": memory}


def main(argv: Sequence[str]) -> None:
    run_command("minidistill.bench", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    with one_line_errors("minidistill.bench", "stopped."):
        main(sys.argv[1:])
