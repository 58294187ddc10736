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
from minidistill.training.command_line import new_parser, one_line_errors

NAME = "python -m minidistill.bench"
COMMANDS = {"speed": speed, "updates": updates, "loading": loading, "kernel": kernel, "memory": memory}


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["speed", *argv]
    parser = new_parser(__doc__, "COMMAND ", NAME)
    commands = parser.add_subparsers(prog=NAME, dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            usage="%(prog)s [flags]",
            description=module.__doc__,
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        module.add_flags(subparser)
    args = parser.parse_args(argv)
    args.argv = argv[1:]
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    with one_line_errors("minidistill.bench", "stopped."):
        main(sys.argv[1:])
