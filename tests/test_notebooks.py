"""The notebooks run as committed, define nothing that the package defines, and their checks can fail."""

import ast
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from nbformat import NotebookNode
from tiny import ROOT, fork

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WITH_MARKS = [pytest.param(file, marks=pytest.mark.slow if "distillation" in file.name else ()) for file in NOTEBOOKS]
LARGEST = 1_200_000  # bytes of a notebook, images included


def read(file: Path) -> NotebookNode:
    return nbformat.read(file, as_version=4)


def code(file: Path) -> list[NotebookNode]:
    return [cell for cell in read(file).cells if cell.cell_type == "code"]


def run_cells(cells: list[NotebookNode]) -> None:
    """Run as a kernel would, but in this process, which it changes; raises the first error."""
    os.chdir(ROOT / "notebooks")
    shell = InteractiveShell()
    shell.enable_gui = lambda gui: None  # figures are drawn, and shown nowhere
    shell.enable_matplotlib("inline")
    for cell in cells:
        shell.run_cell(cell.source).raise_error()


def execute(cells: list[NotebookNode], log: Path) -> tuple[int, str]:
    """Run in a fork, whose imports are done. Returns its exit code, and what was printed."""
    (process := fork(partial(run_cells, cells), log)).join(600)
    return process.exitcode, log.read_text()


def stem(file: Path) -> str:
    return file.stem


by_name = pytest.mark.parametrize("file", NOTEBOOKS, ids=stem)


def test_all_six():
    assert [file.name[:2] for file in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("file", WITH_MARKS, ids=stem)
def test_it_runs(file: Path, tmp_path: Path):
    exit_code, printed = execute(code(file), tmp_path / "log.txt")
    assert exit_code == 0, printed


def test_the_first_cell_finds_the_repository():
    """From the folder of the notebooks, where the kernel starts, and then from the repository itself."""
    first = {cells[0].source for cells in map(code, NOTEBOOKS)}
    assert len(first) == 1  # the same in all six
    check = "import importlib.util\nassert os.path.exists('weights') and importlib.util.find_spec('minidistill')"
    cells = [nbformat.v4.new_code_cell(source) for source in (*first, check) * 2]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()


def test_a_check_can_fail(tmp_path: Path):
    """With a LoRA that cannot be switched off, the notebook about LoRA stops at an assert."""
    cells = code(ROOT / "notebooks/04_lora.ipynb")
    imports = next(i for i, cell in enumerate(cells) if "from minidistill" in cell.source)
    stuck = "import minidistill.lora\nminidistill.lora.LoRALayer.active = True"
    cells.insert(imports + 1, nbformat.v4.new_code_cell(stuck))
    exit_code, printed = execute(cells, tmp_path / "log.txt")
    assert exit_code != 0 and "AssertionError" in printed


@by_name
def test_cells_are_short(file: Path):
    assert max(len(cell.source.splitlines()) for cell in code(file)) <= 15


@by_name
def test_outputs_are_committed(file: Path):
    """One run from top to bottom, with figures, and without errors, warnings or paths of a machine."""
    cells = code(file)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not re.search(r'"(/|[A-Z]:\\\\)\w+/|/(home|root|tmp|Users)/', file.read_text(encoding="utf-8"))
    assert file.stat().st_size < LARGEST


def definitions(tree: ast.Module) -> Iterator[str]:
    """The names of a module's top-level functions and classes."""
    yield from (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))


@by_name
def test_no_name_of_the_package_is_redefined(file: Path):
    package = {
        name
        for module in (ROOT / "minidistill").rglob("*.py")
        for name in definitions(ast.parse(module.read_text(encoding="utf-8")))
    }
    tree = ast.parse("\n".join(cell.source for cell in code(file)))
    assert not package & set(definitions(tree))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("minidistill")
        for alias in node.names
    }
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert imported and not imported & assigned


@by_name
def test_claims_and_checks(file: Path):
    cells = read(file).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert sum("**Claim.**" in cell.source for cell in cells if cell.cell_type == "markdown") >= 5
    assert sum("assert" in cell.source for cell in code(file)) >= 4


@by_name
def test_formulas_cite_paper_and_code(file: Path):
    """By equation number or section, or with the remark that there is none; and by name and file."""
    for cell in read(file).cells:
        if cell.cell_type == "markdown" and "$$" in cell.source:
            assert re.search(r"eq\. \d|section \d|no number|no equation", cell.source), cell.source
            assert re.search(r"`[\w.]+` in\s+`[\w/]+\.py`", cell.source), cell.source


@by_name
def test_figures_have_labelled_axes(file: Path):
    for cell in code(file):
        assert "plt.subplots" not in cell.source or ("xlabel=" in cell.source and "ylabel=" in cell.source)
        for call in ast.walk(ast.parse(cell.source)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "picture_grid":
                assert len(call.args) > 2 or "xlabel" in [keyword.arg for keyword in call.keywords]
