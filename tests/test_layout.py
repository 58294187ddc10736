"""The layout: what may import what, how large the method may be, and that nothing here needs diffusers or peft."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from tiny import ROOT

METHOD = dict.fromkeys(("config", "blocks", "conditioning", "lora"), "") | {  # what a file may import beside itself
    "schedule": "config",
    "vae": "config blocks",
    "unet": "config blocks conditioning",
    "text": "conditioning",
    "samplers": "schedule",
    "guidance": "schedule samplers conditioning",
    "distill": "guidance lora conditioning schedule",
    "pipeline": "config conditioning guidance lora samplers schedule text vae",
}
FOLDERS = dict.fromkeys(("formats", "kernels"), "") | {  # what a folder may import beside itself and the method
    "data": "formats",
    "training": "formats data",
    "evaluate": "formats data training",
    "export": "formats training",
    "bench": "formats data training evaluate kernels",
    "pocket": "formats data training evaluate",
}  # so nobody imports bench or pocket; train.py and sample.py may import everything else
PEERS = {"diffusers", "peft", "accelerate"}

FILES = [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "minidistill").rglob("*.py"))]
NAMES = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in FILES}
TESTS = [file for file in (ROOT / "tests").rglob("*.py") if "parity" not in file.parts]


def imports(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; ``from a import b`` is ``a.b`` if that is a module of ours."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= names & set(NAMES.values()) or {node.module}
    return modules


@pytest.mark.parametrize("file", FILES, ids=NAMES.get)
def test_imports_point_down(file: Path):
    parts = {module.split(".")[1] for module in imports(file) if module.startswith("minidistill.")}
    if file.parent == ROOT:
        assert not parts & {"bench", "pocket"}
    elif NAMES[file] == "minidistill":
        assert parts <= {*METHOD, "formats"}
    else:
        own = NAMES[file].split(".")[1]
        assert parts <= {own, *(METHOD[own].split() if own in METHOD else [*METHOD, *FOLDERS[own].split()])}
        assert own == "pocket" or "minidistill" not in imports(file)  # modules do not use the public surface


def test_no_import_cycles():
    graph = {NAMES[file]: imports(file) & set(NAMES.values()) - {"minidistill", NAMES[file]} for file in FILES}
    list(TopologicalSorter(graph).static_order())


def test_the_method_is_small():
    files = list((ROOT / "minidistill").glob("*.py"))
    assert {file.stem for file in files} == {*METHOD, "__init__"} and len(files) <= 13
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) <= 2200


def test_no_branch_on_pocket():
    trees = [ast.parse(file.read_text("utf-8")) for file in FILES if "pocket" not in file.parts]
    for node in (node for tree in trees for node in ast.walk(tree)):
        conditions = [getattr(node, "test", None), getattr(node, "subject", None), *getattr(node, "ifs", [])]
        assert not any("pocket" in ast.unparse(condition).lower() for condition in conditions if condition)


def test_peers_are_for_comparison_only():
    users = [file.name for file in FILES + TESTS if {name.split(".")[0] for name in imports(file)} & PEERS]
    assert users == ["peers.py"]
    without = f"import sys; sys.modules.update(dict.fromkeys({sorted(PEERS)}))"  # importing one is now an error
    subprocess.run([sys.executable, "-c", f"{without}; import minidistill.bench.speed"], cwd=ROOT, check=True)
