"""Who may know whom: the rules of the design, read off the import statements."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from tiny import ROOT

PEERS = {"diffusers", "peft", "accelerate"}
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
PACKAGE = sorted((ROOT / "minidistill").rglob("*.py"))
OUTSIDE_POCKET = [*SCRIPTS, *(file for file in PACKAGE if "pocket" not in file.parts)]


def imports(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it: ``from a import b`` counts as ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or "parity" in file.parts, f"{file} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in PACKAGE}


def known(module: str) -> set[str]:
    """What a module of the package imports from the package."""
    return imports(MODULES[f"minidistill.{module}"]) & set(MODULES) - {"minidistill"}


def own(*names: str) -> set[str]:
    return {f"minidistill.{name}" for name in names}


def names(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("module, besides", [("unet", ["recompute"]), ("vae", []), ("recompute", [])])
def test_networks_know_shapes_and_blocks_only(module: str, besides: list[str]):
    assert known(module) <= own("config", "blocks", *besides)


def test_text_knows_files_besides():
    """The tokenizer comes in some."""
    assert known("text") <= own("config", "files")


@pytest.mark.parametrize(
    "module", ["config", "blocks", "figures", "guidance", "files", "parallel", "settings", "prompts", "stored"]
)
def test_the_lowest_know_nobody(module: str):
    assert not known(module)


@pytest.mark.parametrize("module, allowed", [("schedule", {"config"}), ("lora", {"kernels"})])
def test_schedule_and_lora_know_no_network(module: str, allowed: set[str]):
    assert known(module) <= own(*allowed)


def test_attention_maps_know_the_unet():
    assert known("attention_maps") == own("unet")


def test_lora_files_know_no_network():
    assert known("lora_formats") <= own("files", "lora", "stored", "tensor_files")
    assert known("lora_files") <= own("files", "lora", "lora_formats", "tensor_files")


def test_checkpoint_knows_the_networks_and_not_their_use():
    reading = own("folder", "hub", "layout", "ldm_names", "pickles", "single_file", "stored", "tensor_files")
    assert known("checkpoint") <= reading | own("config", "files", "text", "unet", "vae")
    for module in reading:  # which describe files, and build nothing
        assert known(module.removeprefix("minidistill.")) <= reading | own("config", "files")


def test_kernels_are_for_lora_and_the_benchmark():
    """Nobody else knows them, and they know nobody."""
    inside = {name for name in MODULES if name.startswith("minidistill.kernels")}
    for name, file in MODULES.items():
        if name in inside:
            assert imports(file) & set(MODULES) - {"minidistill"} <= inside
        elif name not in own("lora", "bench_kernel"):
            assert not imports(file) & inside, name
    assert not any(imports(script) & inside for script in SCRIPTS)


def test_guidance_is_torch_alone():
    assert {name.split(".")[0] for name in imports(MODULES["minidistill.guidance"])} <= {"torch", "collections"}


def test_nobody_imports_in_a_circle():
    graph = {name: imports(file) & set(MODULES) - {"minidistill", name} for name, file in MODULES.items()}
    list(TopologicalSorter(graph).static_order())


def test_the_package_does_not_import_itself_from_above():
    """Its modules name each other, not the public surface in minidistill/__init__.py."""
    surface = {f"minidistill.{alias}" for alias in public()}
    for name, file in MODULES.items():
        if name != "minidistill" and not name.startswith("minidistill.pocket"):
            assert not imports(file) & surface - set(MODULES), name


def public() -> list[str]:
    tree = ast.parse(MODULES["minidistill"].read_text())
    assign = next(n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    return ast.literal_eval(assign.value)


@pytest.mark.parametrize("file", OUTSIDE_POCKET, ids=names)
def test_nobody_imports_pocket(file: Path):
    assert not [name for name in imports(file) if name.startswith("minidistill.pocket")]


@pytest.mark.parametrize("file", OUTSIDE_POCKET, ids=names)
def test_no_branch_on_pocket(file: Path):
    branches = (ast.If, ast.IfExp, ast.While, ast.comprehension, ast.Match)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, branches):
            tests = node.ifs if isinstance(node, ast.comprehension) else [getattr(node, "test", None) or node.subject]
            assert not any("pocket" in ast.unparse(test).lower() for test in tests), f"line {node.lineno}"


def test_peers_are_for_comparison_only():
    """Only tests/parity and the functions of peers.py know them, and only the benchmark knows those."""
    for file in [*SCRIPTS, *PACKAGE, *(ROOT / "tests").glob("*.py")]:
        if file.name != "peers.py":
            assert not {name.split(".")[0] for name in imports(file)} & PEERS, file
    knowing = [name for name in MODULES if "minidistill.bench.peers" in imports(MODULES[name])]
    assert knowing == ["minidistill.bench.workloads"]


def test_the_benchmark_imports_without_the_peers():
    missing = f"import sys; sys.modules.update(dict.fromkeys({sorted(PEERS)}))"  # importing one is an error
    subprocess.run([sys.executable, "-c", f"{missing}; import minidistill.bench.speed"], cwd=ROOT, check=True)


def test_the_public_surface():
    import minidistill

    wanted = "load inject_lora load_lora save_lora merge_lora unmerge_lora guided_noise ddim_sample ddim_invert"
    assert set(wanted.split()) <= set(public()) and all(hasattr(minidistill, name) for name in public())
