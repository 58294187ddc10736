"""The documentation is right: its links and anchors exist, its Python runs, and the README's tree names every file."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from tiny import ROOT, error, tiny_student, unet_inputs

from minidistill import guided_noise
from minidistill.lora import lora_layers, lora_parameters

PAGES = ["README.md", "CONTRIBUTING.md", "docs/*.md", "results/README.md", "weights/*/README.md"]
MARKDOWN = [file for pattern in PAGES for file in sorted(ROOT.glob(pattern))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
NAMED = re.compile(r"`([\w.]+)` in\s+`([\w./]+\.py)`")


def prose(file: Path) -> str:
    """Markdown without code blocks; for a notebook, its Markdown cells."""
    if file.suffix != ".ipynb":
        return FENCED.sub("", file.read_text(encoding="utf-8"))
    cells = nbformat.read(file, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub makes of headings: lower case, hyphens for spaces, no other punctuation."""
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in HEADING.findall(prose(file))]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def broken_links(file: Path) -> list[str]:
    """Relative links without a target. Links to other sites are not followed."""
    broken = []
    for link in LINK.findall(prose(file)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_names(file: Path) -> list[str]:
    """Each "`name` in `file.py`" for which the file does not define the name."""
    missing = []
    for name, path in NAMED.findall(prose(file)):
        scope = ast.parse((ROOT / path).read_text(encoding="utf-8")).body if (ROOT / path).exists() else []
        for part in name.split("."):
            scope = next((n.body for n in scope if getattr(n, "name", None) == part), None)
            if scope is None:
                missing.append(f"{name} in {path}")
                break
    return missing


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", [*MARKDOWN, *NOTEBOOKS], ids=name)
def test_links_have_targets(file: Path):
    assert not broken_links(file)


@pytest.mark.parametrize("file", [*MARKDOWN, *NOTEBOOKS], ids=name)
def test_code_is_where_the_text_says(file: Path):
    assert not missing_names(file)


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch):
    """The Python in CONTRIBUTING.md, one block after another."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) == 5 and "LoRAEmbedding" in namespace


def test_the_tree_names_every_file_and_folder():
    """In README.md: the flat files of the package, every folder of the repository, and nothing that is not there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## What is where\n")[2]
    lines = re.search(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1].splitlines()
    listed = set()
    for line in lines:
        entries = re.findall(r"\w+(?:\.py|/)(?=\s|$)", line)
        listed |= {f"minidistill/{entry}" if line.startswith(" ") else entry for entry in entries}
    files = {name(file) for file in [*ROOT.glob("*.py"), *ROOT.glob("minidistill/[!_]*.py")]}
    folders = {f"{name(file.parent)}/" for file in ROOT.glob("minidistill/*/__init__.py")}
    folders |= {"minidistill/", "docs/", "notebooks/", "results/", "weights/", "tests/"}
    assert listed == files | folders


def test_the_readme_stays_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1300


def test_the_ten_lines_of_the_method():
    """The code in README.md computes what teacher, student and a LoRA layer do, and moves only the low-rank pairs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## The method in ten lines\n")[2]
    lines = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    assert len(re.findall(r"^ *\w", lines, re.MULTILINE)) == 10

    unet, (z_t, t, cond), x = tiny_student(rank=2, alpha=6), unet_inputs(), torch.randn(3, 128)
    layer, uncond = lora_layers(unet)["mid_block.resnets.0.time_emb_proj"], torch.zeros_like(cond)
    with torch.no_grad(), unet.switch.set(True):
        eps = unet(z_t, t, cond, lora_enabled=True)
        expected = dict(eps_hat=guided_noise(unet, z_t, t, cond, uncond, 2.5), eps=eps, y=layer(x))
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    scope = dict(torch=torch, F=F, unet=unet, z_t=z_t, t=t, cond=cond, uncond=uncond, guidance=2.5, alpha=6, rank=2)
    scope |= dict(x=x, W=layer.weight, bias=layer.bias, lora_down=layer.lora_down, lora_up=layer.lora_up)
    scope["optimizer"] = torch.optim.SGD(lora_parameters(unet), lr=1.0)
    exec(lines, scope)
    assert all(error(scope[name].detach(), tensor) < 1e-5 for name, tensor in expected.items())
    moved = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_broken_link_is_noticed(tmp_path: Path):
    file = tmp_path / "page.md"
    file.write_text(
        "# A heading, and `code`\n[a](page.md#a-heading-and-code) [b](https://nowhere.invalid) [c](#a-heading)\n"
        "![d](no.png) [e](page.md)\n```\n[in code](nowhere)\n```\n"
        "`guided_noise` in `minidistill/guidance.py`, `LoRALinear.forward` in\n`minidistill/lora.py`, "
        "`LoRALinear.backward` in `minidistill/lora.py`, `x` in `minidistill/nowhere.py`"
    )
    assert broken_links(file) == ["#a-heading", "no.png"]
    assert missing_names(file) == ["LoRALinear.backward in minidistill/lora.py", "x in minidistill/nowhere.py"]
