"""The shape of the source tree: imports point downwards, rooms stay small, nothing belongs to one machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_spectral_dp"

# A module may import only modules of a smaller number. `privacy.*` knows nothing but itself.
ORDER = [
    "bundled",
    "private_marks",
    "safe_loading",
    "wavelets",
    "layout",
    "configuration_spectral",
    "codec",
    "sampling",
    "modeling_spectral",
    "image_processing_spectral",
    "views",
    "image_decoding",
    "image_sources",
    "real_images",
    "whole_files",
    "text_encoder",
    "privacy",
    "privacy_report",
    "released_files",
    "remote_code",
    "report_rules",
    "verification",
    "captions",
    "checkpoint_files",
    "saving_trainer",
    "image_rows",
    "row_file",
    "token_store",
    "training_args",
    "quiet_trainer",
    "batches",
    "trainer",
    "super_resolution",
    "metrics",
    "critic",
    "mean_critic",
    "super_resolution_training",
    "feature_rows",
    "self_audit",
    "card",
    "publication",
    "pipeline_spectral",
    "generation",
    "registry",
    "dataset_export",
    "assessment",
    "plots",
    "report",
    "cli",
    "",  # hf_spectral_dp/__init__.py
]
MAY_READ = {  # stricter than the order
    "card": {"released_files", "report_rules", "verification", "whole_files"},
    "privacy": set(),
}
PRIVACY_LIBRARIES = {"torch", "numpy", "scipy", "dp_accounting", "randomgen"}


def part_of(path: Path) -> str:
    """The first name below the package: a module's stem, or the folder it lies in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0].replace("__init__", "")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, at its head or inside a function."""
    package = ("hf_spectral_dp", *path.relative_to(PACKAGE).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def tracked() -> list[Path]:
    """Files that belong to the repository: git's list, or the tree where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0") if listed.returncode == 0 and listed.stdout else []
    found = [ROOT / name for name in names if name]
    return [path for path in found if path.is_file()] or sources()


def test_every_module_has_a_place_in_the_order():
    assert {part_of(path) for path in sources()} <= set(ORDER)


def test_imports_point_downwards():
    wrong = []
    for path in sources():
        importer = part_of(path)
        for name in imported(path):
            if name.split(".")[0] != "hf_spectral_dp":
                continue
            imports = name.split(".")[1] if "." in name else ""
            if imports == importer != "":
                continue  # inside one folder
            known = imports in ORDER[: ORDER.index(importer)]
            if not known or imports not in MAY_READ.get(importer, {imports}):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_privacy_stands_alone():
    allowed = PRIVACY_LIBRARIES | {"hf_spectral_dp"}
    wrong = []
    for path in (PACKAGE / "privacy").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - allowed
        wrong += [f"{path.name} imports {name}" for name in outside if name not in sys.stdlib_module_names]
    assert not wrong, wrong


def test_nothing_needs_torchvision():
    for path in tracked():
        if path.suffix == ".py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            assert not any(name.split(".")[0] == "torchvision" for name in names), path


def test_no_file_is_a_drawer_or_a_hall():
    for path in tracked():
        if path.suffix == ".py":
            assert path.stem not in ("utils", "helpers", "misc", "common"), path
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_no_test_file_takes_anything_from_another():
    for path in (ROOT / "tests").glob("*.py"):
        assert not re.search(r"^(from|import) test_", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_contributing_fits_one_page():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 50


def test_no_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:work|tmp|root|home|farm)/\w")
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", "") and path.name != "LICENSE":
            found = pattern.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_every_module_says_what_it_is():
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_what_modules_take_from_one_another_is_public():
    """Each lists its names in `__all__`, and none reaches for what another does not list."""
    listed: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                listed[name.removesuffix(".__init__")] = ast.literal_eval(node.value)
    hidden = []
    for path in sources():
        for name in imported(path):
            module, _, wanted = name.rpartition(".")
            if module in listed and name not in listed and wanted not in listed[module]:
                hidden.append(f"{path.relative_to(ROOT)} imports {name}")
    assert len(listed) > 60 and not hidden, hidden


def test_every_test_that_the_documents_name_exists():
    missing = []
    for document in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        file = ""
        text = document.read_text(encoding="utf-8")
        for name, test in re.findall(r"`(?=test_|::)(test_\w+\.py)?(?:::(test_\w+))?`", text):
            file = name or file  # "::test" after a file's name means the same file
            path = ROOT / "tests" / file
            if not path.is_file() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
                missing.append(f"{document.name}: {file}::{test}")
    assert not missing
