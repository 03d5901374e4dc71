"""House rules that no linter checks: sizes, links, public names, generated tables."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from examples.benchmarks import report
from fpcompiler.cli.formats import FORMAT_HEADERS, SCHEME_HEADERS, format_rows, scheme_rows
from fpcompiler.cli.output import markdown_table

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "codegen", "runtime")
MAX_LINES = 400


def sources(*folders: str) -> list[Path]:
    """Python files of the given folders, without what links lead to."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


ALL = sources("fpcompiler", *LINKED, "tests", "examples")
LIBRARY = sources("fpcompiler", *LINKED)


def module_name(path: Path) -> str:
    name = relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("fpcompiler") else f"fpcompiler.{name}"


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", LINKED)
def test_the_links_are_relative_and_lead_to_the_top_level_folders(name: str) -> None:
    link = ROOT / "fpcompiler" / name
    assert link.is_symlink(), f"fpcompiler/{name} must be a link to ../{name}"
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name
    assert (ROOT / name / "__init__.py").is_file()


@pytest.mark.parametrize("path", [p for p in LIBRARY if "templates" not in p.parts], ids=relative)
def test_all_names_exist_and_are_listed_once(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing, f"{relative(path)}: __all__ lists {missing}"


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.name == "__init__.py"], ids=relative)
def test_a_package_that_imports_from_its_modules_says_what_is_public(path: Path) -> None:
    package = module_name(path)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    own = [
        n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(package)
    ]
    assert not own or importlib.import_module(package).__all__


def test_nothing_imports_a_linked_folder_by_its_short_name() -> None:
    pattern = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(LINKED)})\b", re.MULTILINE)
    assert [relative(p) for p in ALL if pattern.search(p.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("marker", "headers", "rows"),
    [("formats", FORMAT_HEADERS, format_rows()), ("schemes", SCHEME_HEADERS, scheme_rows())],
)
def test_the_tables_of_the_readme_are_current(marker, headers, rows) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(rf"<!-- {marker}: .*? -->\n\n(.*?)\n\n<!-- end -->", readme, re.DOTALL)
    assert match, f"README.md has no table marked {marker}"
    assert match[1] == markdown_table(headers, rows), "paste `fpcompiler formats --markdown`"


def test_the_results_in_the_readme_are_those_on_record() -> None:
    for name, table in report.tables().items():
        text = report.document(name).read_text(encoding="utf-8")
        assert report.replaced(text, name, table) == text, (
            "python examples/benchmarks/report.py --write"
        )


def test_local_links_of_the_documents_exist() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{document.name} links to {target}"


def test_no_path_of_a_machine_is_tracked() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(?:home|root|work|Users)/\w")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    texts = {path: path.read_bytes().decode("utf-8", "replace") for path in files if path.is_file()}
    assert [relative(path) for path, text in texts.items() if pattern.search(text)] == []
