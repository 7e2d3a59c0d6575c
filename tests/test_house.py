"""The structure of the package: imports, names, and that everything the documentation mentions exists."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT, environment

from qwen_tune.recipe.errors import known_sections
from qwen_tune.recipe.rules import NOT_YET
from qwen_tune.runs.drift import ALLOWED

PACKAGE = ROOT / "qwen_tune"
MODULES = sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
# Each folder may import from those before it.
FOLDERS = (
    "recipe",
    "families",
    "chatml",
    "distributed",
    "runs",
    "model",
    "artifacts",
    "fused",
    "data",
    "preview",
    "planner",
    "evaluation",
    "merging",
    "export",
    "publishing",
    "tracking",
    "training",
)
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "pandas", "pyarrow")


def loaded_modules(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after some code."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_quick_commands_load_nothing_heavy():
    code = (
        "from qwen_tune.cli import run_command\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    assert run_command(['--help']) == 0\n"
        "    assert run_command(['train', '--help']) == 0\n"
        "    assert run_command(['validate', 'recipes/quickstart.yaml']) == 0\n"
        "    assert run_command(['estimate', 'recipes/quickstart.yaml']) == 0\n"
    )
    assert not loaded_modules(code) & set(HEAVY)


def test_no_module_has_the_name_of_another_package():
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert not {name for name in MODULES if not name.startswith("__")} & taken


def test_imports_between_folders_run_one_way():
    assert set(FOLDERS) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for path in PACKAGE.rglob("*.py"):
        # The modules outside the folders are either below all of them, or the commands above.
        is_command = path.parent == PACKAGE and path.stem in ("__main__", "cli", "train")
        here = -1 if path.parent == PACKAGE else FOLDERS.index(path.parent.name)
        imported = re.findall(r"^ *(?:from|import) qwen_tune\.(\w+)", path.read_text(), re.M)
        above = {name for name in imported if name in FOLDERS and FOLDERS.index(name) > here}
        assert is_command or not above, path


def test_no_module_imports_itself_on_a_way_round():
    """Imports inside functions and those for types count as well."""
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in known.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imported = {node.module for node in nodes}
        imported |= {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        graph[name] = imported & known.keys()
    assert sum(map(len, graph.values())) > len(known)
    TopologicalSorter(graph).prepare()


def test_private_names_of_libraries_are_in_compat_alone():
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "compat.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            private = [part for name in modules for part in name.split(".") if re.match(r"_(?!typeshed)[a-z]", part)]
            assert not private, f"{path}: {private}"


def test_train_defines_no_class_and_names_its_stages_in_order():
    tree = ast.parse((PACKAGE / "train.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    [main] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    called = [
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in sorted(
            (n for n in ast.walk(main) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset)
        )
        if isinstance(node.func, (ast.Name, ast.Attribute))
    ]
    stages = [
        "load_recipe",
        "start_processes",
        "open_run",
        "prepare_job",
        "show_job",
        "fit",
        "finish",
    ]
    last = {name: len(called) - called[::-1].index(name) for name in stages}  # a run that had finished ends early
    assert list(last.values()) == sorted(last.values())
    body = main.body[1:]  # without the docstring
    assert body[-1].end_lineno - body[0].lineno < 40


DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for folder in ("", "docs", "recipes", "data") for path in (ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_paths_in_the_documentation_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = (ROOT / name).parent.joinpath(target) if target else ROOT / name
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), f"{target}#{anchor}"
    for path in re.findall(r"`((?:qwen_tune|scripts|recipes|tests|docs|data)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def _anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


OF_OTHERS = {"peft_helper.py"}
"""Modules of other packages that our texts mention."""


def test_mentioned_modules_exist():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if name.endswith((".py", ".md"))]
    for name in names:
        for spoken in set(re.findall(r"`([\w/]+\.py)`", (ROOT / name).read_text(encoding="utf-8"))) - OF_OTHERS:
            assert any(f"/{path}".endswith(f"/{spoken}") for path in names), f"{name}: {spoken}"


def test_the_tree_of_errors_is_complete():
    from qwen_tune import errors

    named = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    drawn = set(re.findall(r"\b[A-Z]\w+(?:Error|Interrupted)\b|^Interrupted\b", errors.__doc__, re.M))
    assert named == drawn


def test_no_file_contains_a_path_of_a_developers_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 50
    home = re.compile(r"(?<![\w.])/(home|Users|root|work)/(?!someone)\w+")
    for path in files:
        if path.suffix not in (".safetensors", ".png") and path != Path(__file__):
            found = home.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found}"


Sections = frozenset[str]
"""Classes of the schema that an expression may be, or contain as items."""


class KeyReads(ast.NodeVisitor):
    """The recipe's keys that a module reads, as `section class.key`.

    What an expression is follows from annotations, from assignments and loops over known expressions, and from the
    fields of the sections: in `lora = recipe.lora; lora.r`, the last is `LoraSpec.r`.
    """

    def __init__(self, tree: ast.AST, known: dict[str, str]) -> None:
        self.known = {name: frozenset({section}) for name, section in known.items()}
        self.reads: set[str] = set()
        for _ in range(3):  # a name may be used above the line that explains it
            self.visit(tree)

    def sections_of(self, node: ast.expr | None) -> Sections:
        if isinstance(node, ast.Name):
            return self.known.get(node.id, frozenset())
        if isinstance(node, ast.Attribute):
            fields = [SECTION_FIELDS.get(f"{one}.{node.attr}") for one in self.sections_of(node.value)]
            return frozenset().union(*filter(None, fields)) or self.known.get(node.attr, frozenset())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("enumerate", "sorted"):
            return frozenset().union(*(self.sections_of(argument) for argument in node.args))
        inner = [node.value] if isinstance(node, (ast.Subscript, ast.Starred)) else getattr(node, "elts", [])
        return frozenset().union(*(self.sections_of(one) for one in inner))

    def bind(self, target: ast.expr, sections: Sections, value: ast.expr | None = None) -> None:
        if isinstance(target, ast.Tuple):
            parts = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
            for one, part in zip(target.elts, parts, strict=False):
                self.bind(one, self.sections_of(part), part)
        elif sections and isinstance(target, (ast.Name, ast.Attribute)):
            self.known[target.id if isinstance(target, ast.Name) else target.attr] = sections

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.arg):
            self.bind(ast.Name(node.arg), annotated(node.annotation))
        elif isinstance(node, ast.AnnAssign):
            self.bind(node.target, annotated(node.annotation))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self.bind(target, self.sections_of(node.value), node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self.bind(node.target, self.sections_of(node.iter), node.iter)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            self.reads |= {f"{section}.{node.attr}" for section in self.sections_of(node.value)}
        self.generic_visit(node)


def annotated(annotation: ast.expr | None) -> Sections:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()
    return frozenset(names & {section.__name__ for section in known_sections().values()})


SECTION_FIELDS = {
    f"{section.__name__}.{key}": frozenset(
        known_sections()[path].__name__
        for path in (f"{parent}.{key}".lstrip("."), f"{parent}.{key}[]")
        if path in known_sections()
    )
    for parent, section in known_sections().items()
    for key in section.model_fields
}
"""What a key holds: a section, a list of sections, or neither."""


def test_every_recipe_key_is_used_or_refused():
    """An accepted key without effect is a typo that the user cannot see."""
    reads = {f"TrainSpec.{ALLOWED.removeprefix('train.')}"}  # `runs/drift.py` reads it in the resolved YAML
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "recipe":
            reads |= KeyReads(ast.parse(path.read_text()), {"recipe": "Recipe"}).reads
    schema = ast.parse((PACKAGE / "recipe" / "schema.py").read_text())
    [recipe] = [node for node in schema.body if isinstance(node, ast.ClassDef) and node.name == "Recipe"]
    reads |= KeyReads(recipe, {"self": "Recipe"}).reads  # its properties
    refused = {entry.key for entry in NOT_YET if entry.is_refused is bool}  # whatever their value
    keys = {
        f"{parent}.{key}".lstrip("."): f"{section.__name__}.{key}"
        for parent, section in known_sections().items()
        for key in section.model_fields
    }
    assert len(keys) > 80
    assert [key for key, read in keys.items() if read not in reads and key not in refused] == []


def test_constraints_pin_every_dependency():
    try:
        import tomllib
    except ModuleNotFoundError:
        pytest.skip("tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in _lines(ROOT / "constraints.txt")}
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-") for requirement in asked}
    assert names <= pinned


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
