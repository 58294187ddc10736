"""The commands that README.md and docs/ give for a Stable Diffusion of your own run as they stand, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import ROOT, write_tiny

README = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Your own Stable Diffusion\n")[2]
DOCS = [ROOT / "docs/gpus-and-memory.md", ROOT / "docs/training-and-recovery.md"]
TEXT = "\n".join([README, *(file.read_text(encoding="utf-8") for file in DOCS)])
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
OUTPUTS = ("lora.safetensors", "report.md", "teacher_vs_student.png", "checkpoints/step-000300.pt")


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path):
    write_tiny(tmp_path / "path/to/stable-diffusion-v1-5")
    for name, caption in {"cat.jpg": "a cat", "more/dog.PNG": "a dog in the snow"}.items():
        file = tmp_path / "pictures" / name
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 16), "brown").save(file)
        file.with_suffix(".txt").write_text(caption)
    for script in ("train.py", "sample.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    for command in COMMANDS:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, f"{command}\n{done.stderr}"

    for run in ("sd15", "sd15-4", "mine"):
        assert all((tmp_path / "runs" / run / name).exists() for name in OUTPUTS)
    assert (tmp_path / "runs/sd15/lora-kohya.safetensors").exists() and list((tmp_path / "samples").glob("*.png"))
