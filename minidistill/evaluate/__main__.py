"""Measure students beside their teacher. Each command has its own --help.

python -m minidistill.evaluate [quality] runs/NAME [runs/OTHER ...]   images, predictions and cost, in one table
python -m minidistill.evaluate dial runs/NAME                         the LoRA's strength as a guidance dial
python -m minidistill.evaluate spectrum runs/FULL runs/NAME           how many ranks the change of each layer has
python -m minidistill.evaluate few-steps --one-pass LORA              ways to teach a student few steps
python -m minidistill.evaluate steering --one-pass LORA               few steps at other guidance scales
python -m minidistill.evaluate sweeps [rank ...]                      what matters when training a student
python -m minidistill.evaluate summary                                results/summary.json from the other results
"""

import sys
from collections.abc import Sequence

from minidistill.evaluate import dial, few_steps, quality, spectrum, steering, summary, sweeps
from minidistill.training.command_line import one_line_errors, run_command

COMMANDS = {"quality": quality, "dial": dial, "few-steps": few_steps, "spectrum": spectrum}
COMMANDS |= {"steering": steering, "sweeps": sweeps, "summary": summary}


def main(argv: Sequence[str]) -> None:
    run_command("minidistill.evaluate", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    with one_line_errors("minidistill.evaluate", "stopped. The same command reuses what it has kept."):
        main(sys.argv[1:])
