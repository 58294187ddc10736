"""What the documentation points to is there: relative links, their anchors, and the code that the notebooks name."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from tiny import ROOT, error, tiny_student, unet_inputs

from minidistill.distill import student, teacher
from minidistill.lora import lora_layers, lora_parameters

MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results/README.md", *ROOT.glob("weights/*/README.md")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
NAMED = re.compile(r"`([\w.]+)` in\s+`([\w./]+\.py)`")


def prose(file: Path) -> str:
    """Markdown without code blocks; of a notebook, its Markdown cells."""
    if file.suffix != ".ipynb":
        return FENCED.sub("", file.read_text(encoding="utf-8"))
    cells = nbformat.read(file, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, hyphens for spaces, and no other punctuation."""
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in HEADING.findall(prose(file))]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def broken(file: Path) -> list[str]:
    """The links that lead nowhere. Those to other sites are not followed."""
    found = []
    for link in LINK.findall(prose(file)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def missing_names(file: Path) -> list[str]:
    """What is said to be "`name` in `file.py`" and is not."""
    found = []
    for name, path in NAMED.findall(prose(file)):
        scope = ast.parse((ROOT / path).read_text(encoding="utf-8")).body if (ROOT / path).exists() else []
        for part in name.split("."):
            scope = next((n.body for n in scope if getattr(n, "name", None) == part), None)
            if scope is None:
                found.append(f"{name} in {path}")
                break
    return found


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", [*MARKDOWN, *NOTEBOOKS], ids=name)
def test_links_lead_somewhere(file: Path):
    assert not broken(file)


@pytest.mark.parametrize("file", [*MARKDOWN, *NOTEBOOKS], ids=name)
def test_code_is_where_it_is_said_to_be(file: Path):
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


def test_the_reading_order_has_every_file():
    listed = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Reading order\n")[2].partition("\n## ")[0]
    files = {f"minidistill/{file.name}" for file in (ROOT / "minidistill").glob("[!_]*.py")}
    assert not files - set(LINK.findall(listed))


def test_the_ten_lines_of_the_method():
    """The code in README.md computes what teacher, student and a LoRA layer do, and moves the pairs alone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## The method in ten lines\n")[2]
    lines = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    assert len(re.findall(r"^ *\w", lines, re.MULTILINE)) == 10

    unet, (z_t, t, cond), x = tiny_student(rank=2, alpha=6), unet_inputs(), torch.randn(3, 128)
    layer, uncond = lora_layers(unet)["mid_block.resnets.0.time_emb_proj"], torch.zeros_like(cond)
    with torch.no_grad(), unet.switch.set(True):
        expected = dict(eps_hat=teacher(unet, z_t, t, cond, uncond, 2.5), eps=student(unet, z_t, t, cond), y=layer(x))
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    found = dict(torch=torch, F=F, unet=unet, z_t=z_t, t=t, cond=cond, uncond=uncond, guidance=2.5, alpha=6, rank=2)
    found |= dict(x=x, W=layer.weight, bias=layer.bias, lora_down=layer.lora_down, lora_up=layer.lora_up)
    found["optimizer"] = torch.optim.SGD(lora_parameters(unet), lr=1.0)
    exec(lines, found)
    assert all(error(found[name].detach(), tensor) < 1e-5 for name, tensor in expected.items())
    moved = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_broken_link_is_found(tmp_path: Path):
    file = tmp_path / "page.md"
    file.write_text(
        "# A heading, and `code`\n[a](page.md#a-heading-and-code) [b](https://nowhere.invalid) [c](#a-heading)\n"
        "![d](no.png) [e](page.md)\n```\n[in code](nowhere)\n```\n"
        "`guided_noise` in `minidistill/guidance.py`, `LoRALinear.forward` in\n`minidistill/lora.py`, "
        "`LoRALinear.backward` in `minidistill/lora.py`, `x` in `minidistill/nowhere.py`"
    )
    assert broken(file) == ["#a-heading", "no.png"]
    assert missing_names(file) == ["LoRALinear.backward in minidistill/lora.py", "x in minidistill/nowhere.py"]
