"""The commands that README.md gives for a Stable Diffusion of one's own, as they stand there, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import ROOT, write_tiny

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Your own Stable Diffusion\n")[2]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
LEFT_BEHIND = ("lora.safetensors", "report.md", "teacher_vs_student.png", "checkpoints/step-000300.pt")


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
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    where = dict(cwd=tmp_path, env=os.environ | own)

    for command in COMMANDS:
        if not command.startswith("pip "):
            done = subprocess.run(command, shell=True, capture_output=True, text=True, **where)
            assert done.returncode == 0, f"{command}\n{done.stderr}"

    for run in ("sd15", "sd15-4", "mine"):
        assert all((tmp_path / "runs" / run / name).exists() for name in LEFT_BEHIND)
    assert (tmp_path / "runs/sd15/lora-kohya.safetensors").exists() and list((tmp_path / "samples").glob("*.png"))
