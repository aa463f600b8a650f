"""The house rules that nobody should have to remember: import order, weight of imports, documents.

Each rule is a function from a source tree or a text to a list of violations; it must find none in
qlx, and it must find the violation in a small tree or text that has one.
"""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qlx.cli.commands import MODULES, program

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlx"

# A package imports, when it is imported, only from packages before it.
ORDER = (
    "errors", "weights", "checkpoint", "recipe", "inputs", "runtime", "quant", "adapters", "models",
    "training", "verification", "merging", "packing", "exporting", "serving", "planning", "testing",
    "pytest_plugin", "cli", "__main__",
)  # fmt: skip
TORCH_AT_IMPORT = {
    "quant", "adapters", "models", "training", "merging", "packing", "exporting", "testing",
}  # fmt: skip
NEVER_TORCH = ("inputs", "runtime", "serving")
TORCH_ENGINES = ("qlx.serving.torch_engine",)
HEAVY = {
    "accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "sklearn", "transformers", "trl",
}  # fmt: skip
LIGHT = ("errors", "checkpoint", "recipe", "planning")  # no numeric library when imported
NUMERIC = {"ml_dtypes", "numpy", "onnx", "onnxruntime", "safetensors", "torch", *HEAVY}
CLI_SHELL = ("qlx.cli", "qlx.cli.commands", "qlx.cli.options", "qlx.cli.session", *MODULES.values())


class Tree:
    """Modules of a package, parsed, with what each imports."""

    def __init__(self, package: Path) -> None:
        self.name = package.name
        self.files = {
            self._module(package, path): path
            for path in sorted(package.rglob("*.py"))
            if "__pycache__" not in path.parts
        }
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.files.items()}

    def _module(self, package: Path, path: Path) -> str:
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def room(self, module: str) -> str:
        """The package of DESIGN that a module belongs to; "" for the top one."""
        return module.split(".")[1] if "." in module else ""

    def imports(self, module: str, *, everywhere: bool = False) -> Iterator[str]:
        """Names of modules that `module` imports: at its top level, or anywhere in it."""
        body = self.trees[module].body
        for node in ast.walk(self.trees[module]) if everywhere else _top_level(body):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{self._absolute(module, node)}.{alias.name}"
                    yield full if full in self.trees else full.rpartition(".")[0]

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        inside = parts if self.files[module].name == "__init__.py" else parts[:-1]
        inside = inside[: len(inside) - node.level + 1]
        return ".".join([*inside, *([node.module] if node.module else [])])

    def closure(self, module: str) -> set[str]:
        """Every module that importing `module` imports, first and third party."""
        seen: set[str] = set()
        queue = [module]
        while queue:
            name = queue.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.trees:
                queue.extend(self.imports(name))
                queue.append(name.rpartition(".")[0] or name)
        return seen


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.dump(node.test):
                yield from _top_level(node.body)
            yield from _top_level(node.orelse)
        elif isinstance(node, (ast.Try, ast.With)):
            yield from _top_level(node.body)
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)


@pytest.fixture(scope="module")
def qlx():
    return Tree(PACKAGE)


@pytest.fixture
def small_tree(tmp_path):
    """Build a package called qlx from {relative file: source}."""

    def build(files):
        for name, source in files.items():
            path = tmp_path / "qlx" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
            for parent in Path(name).parents:
                (tmp_path / "qlx" / parent / "__init__.py").touch()
        return Tree(tmp_path / "qlx")

    return build


# --- Imports


def out_of_order(tree: Tree) -> list[str]:
    """Imports of a later package, or of one that the order does not know."""
    found = []
    for module in tree.trees:
        room = tree.room(module)
        if room and room not in ORDER:
            found.append(f"{module}: package {room!r} has no place in the order")
            continue
        for target in tree.imports(module):
            other = tree.room(target) if target.split(".")[0] == tree.name else ""
            if room and other and ORDER.index(other) > ORDER.index(room):
                found.append(f"{module} imports {target}")
    return found


def cycles(tree: Tree) -> list[str]:
    """Modules that import themselves by way of others."""
    edges = {
        name: {target for target in tree.imports(name) if target in tree.trees and target != name}
        for name in tree.trees
    }

    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        queue = list(edges[start])
        while queue:
            name = queue.pop()
            if name not in seen:
                seen.add(name)
                queue.extend(edges[name])
        return seen

    return [name for name in tree.trees if name in reaches(name)]


def heavy_at_import(tree: Tree) -> list[str]:
    """Torch at the top of a module where it is not allowed, and what importing a package drags in.

    A module that a package loads on demand may import libraries that cost seconds; the package
    itself must not reach one when it is imported.
    """
    found = []
    for module in tree.trees:
        libraries = {target.split(".")[0] for target in tree.imports(module)}
        allowed = tree.room(module) in TORCH_AT_IMPORT or module in TORCH_ENGINES
        if "torch" in libraries and not allowed:
            found.append(f"{module} imports torch")
        if module.count(".") <= 1:
            reached = {name.split(".")[0] for name in tree.closure(module)} & HEAVY
            found += [f"importing {module} loads {library}" for library in sorted(reached)]
    return found


def torch_anywhere(tree: Tree) -> list[str]:
    """Modules of torch-free packages that import torch, even inside a function.

    In serving one module may: the engine for checkpoints that are not ONNX, loaded for them only.
    """
    return [
        f"{module} imports {target}"
        for module in tree.trees
        if tree.room(module) in NEVER_TORCH and module not in TORCH_ENGINES
        for target in tree.imports(module, everywhere=True)
        if target.split(".")[0] in {"torch", "transformers", "peft", "bitsandbytes"}
    ]


def test_packages_import_only_from_those_before_them(qlx):
    assert out_of_order(qlx) == []


def test_an_import_against_the_order_is_found(small_tree):
    tree = small_tree({
        "recipe/a.py": "from qlx.training import train",
        "training/b.py": "def f():\n    from qlx.cli import main\nfrom qlx.recipe import a",
        "attic/c.py": "",
    })  # fmt: skip
    assert out_of_order(tree) == [
        "qlx.attic: package 'attic' has no place in the order",
        "qlx.attic.c: package 'attic' has no place in the order",
        "qlx.recipe.a imports qlx.training",
    ]


def test_nothing_imports_itself_by_way_of_others(qlx):
    assert cycles(qlx) == []


def test_a_cycle_is_found(small_tree):
    tree = small_tree({
        "quant/a.py": "from qlx.quant import b", "quant/b.py": "from .c import x",
        "quant/c.py": "import qlx.quant.a", "quant/d.py": "from qlx.quant import a",
    })  # fmt: skip
    assert cycles(tree) == ["qlx.quant.a", "qlx.quant.b", "qlx.quant.c"]


def test_libraries_that_cost_seconds_are_imported_when_needed(qlx):
    assert heavy_at_import(qlx) == []


def test_a_heavy_import_is_found(small_tree):
    tree = small_tree({
        "training/a.py": "import torch.nn\nimport peft",
        "merging/a.py": "import torch",
        "verification/b.py": "try:\n    from torch import nn\nexcept ImportError:\n    pass",
        "serving/c.py": "def f():\n    import torch",
        "merging/__init__.py": "from qlx.merging import a\nimport qlx.training.a",
    })  # fmt: skip
    assert heavy_at_import(tree) == [
        "importing qlx.merging loads peft",
        "qlx.verification.b imports torch",
    ]
    assert torch_anywhere(tree) == ["qlx.serving.c imports torch"]


def test_what_runs_on_a_small_box_never_imports_torch(qlx):
    assert torch_anywhere(qlx) == []


@pytest.mark.parametrize("room", NEVER_TORCH)
def test_the_closure_of_a_torch_free_package_has_no_torch(qlx, room):
    modules = [n for n in qlx.trees if qlx.room(n) == room and n not in TORCH_ENGINES]
    assert modules
    reached = {name.split(".")[0] for module in modules for name in qlx.closure(module)}
    assert reached & {"torch", *HEAVY} == set()


def test_light_packages_load_no_numeric_library():
    rooms = ", ".join(f"qlx.{room}" for room in LIGHT)
    code = f"import sys, {rooms}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(loaded) & NUMERIC == set()
    assert "pydantic" in loaded  # the list is a list of what was loaded


def test_the_shell_of_the_command_line_needs_click_only(qlx):
    """Commands import what they call inside their bodies."""
    assert set(CLI_SHELL) <= set(qlx.trees)
    for module in CLI_SHELL:
        first = {t for t in qlx.imports(module) if t.startswith("qlx")}
        third = {t.split(".")[0] for t in qlx.imports(module)} - {"qlx", *sys.stdlib_module_names}
        assert first <= {"qlx", "qlx.errors", *CLI_SHELL}, module
        assert third <= {"click"}, module


# --- Dependencies

DISTRIBUTION = {  # where it differs from the module
    "PIL": "pillow",
    "jinja2": "jinja2",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
COMES_WITH = {"pydantic_core": "pydantic"}


def undeclared(tree: Tree, declared: set[str]) -> list[str]:
    """Third-party modules that are imported or required but that no dependency brings."""
    found = set()
    for module, parsed in tree.trees.items():
        names = {target.split(".")[0] for target in tree.imports(module, everywhere=True)}
        for node in ast.walk(parsed):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                found_name = node.args[0]
                if isinstance(found_name, ast.Constant):
                    names.add(str(found_name.value).split(".")[0])
        for name in names - {tree.name, "__future__", *sys.stdlib_module_names}:
            name = COMES_WITH.get(name, name)
            if _normal(DISTRIBUTION.get(name, name)) not in declared:
                found.add(f"{module} imports {name}")
    return sorted(found)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_dependencies() -> set[str]:
    """Normalized names of everything that pyproject.toml asks for, `dev` left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(x for name in extras if name != "dev" for x in extras[name]),
    ]
    return {_normal(re.match(r"[\w.-]+", line)[0]) for line in lines}


def test_every_import_is_declared(qlx):
    assert undeclared(qlx, declared_dependencies()) == []


def test_an_undeclared_import_is_found(small_tree):
    tree = small_tree(
        {"quant/a.py": "def f():\n    import polars\n    require('tkinter3.x', 'e')\nimport yaml"}
    )
    assert undeclared(tree, {"pyyaml"}) == [
        "qlx.quant.a imports polars",
        "qlx.quant.a imports tkinter3",
    ]


def test_the_extras_named_in_messages_are_those_of_the_project():
    from qlx.cli import EXTRAS_OF_MODULE

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brings = {
        extra: {_normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
        for extra, lines in project["optional-dependencies"].items()
        if extra not in ("all", "dev")
    }
    for module, extras in EXTRAS_OF_MODULE.items():
        name = _normal(DISTRIBUTION.get(module, module))
        assert set(extras) == {extra for extra, names in brings.items() if name in names}, module


def test_every_declared_dependency_is_pinned():
    pins = {
        _normal(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert declared_dependencies() - {"qlx"} <= pins


# --- Docstrings


def undocumented(tree: Tree) -> list[str]:
    """Modules that do not say what belongs in them."""
    return [name for name, parsed in tree.trees.items() if not ast.get_docstring(parsed)]


def test_every_module_says_what_belongs_in_it(qlx):
    assert undocumented(qlx) == []


def test_a_module_without_a_docstring_is_found(small_tree):
    tree = small_tree({"quant/a.py": "x = 1", "quant/b.py": '"""What belongs here."""'})
    assert "qlx.quant.a" in undocumented(tree)
    assert "qlx.quant.b" not in undocumented(tree)


# --- Documents

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
_LOCAL_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|opt|mnt)/")


def command_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every complete `qlx …` line in the code blocks of a document."""
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ")
            if words.startswith("qlx ") and "[" not in words and "…" not in words:
                yield shlex.split(re.split(r"\s[|>#&]", words)[0])[1:]


def command_error(arguments: list[str]) -> str | None:
    """What is wrong with a command line as far as names, choices and counts go; None if nothing."""
    context = click.Context(program, info_name="qlx", help_option_names=["-h", "--help"])
    name, rest = arguments[0], arguments[1:]
    if name.startswith("-"):
        return None if name in ("--help", "--version", "-h") else f"no option {name}"
    command = program.get_command(context, name)
    if command is None:
        return f"no command {name}"
    inner = click.Context(command, parent=context, info_name=name)
    try:
        values, _, _ = command.make_parser(inner).parse_args(list(rest))
        for parameter in command.get_params(inner):
            given = values.get(parameter.name)
            if isinstance(parameter.type, click.Choice) and given is not None:
                for value in given if isinstance(given, list) else [given]:
                    parameter.type.convert(value, parameter, inner)
            missing = not isinstance(given, (str, list, tuple)) or not given
            if parameter.required and missing:
                return f"{name} needs {parameter.name}"
    except click.UsageError as error:
        return error.format_message()
    return None


def anchors(document: Path) -> set[str]:
    """The names that headings of a Markdown document can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def document_errors(path: Path, text: str) -> list[str]:
    """Wrong commands, dead links, unknown make targets and local paths in one document."""
    found = [
        f"qlx {shlex.join(arguments)}: {error}"
        for arguments in command_lines(text)
        if (error := command_error(arguments))
    ]
    named = re.findall(r"`qlx ([a-z][a-z-]*)", text)
    found += [f"no command {name}" for name in named if name not in MODULES]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)
    found += [f"no make target {name}" for name in named if name not in targets]
    for link in _LINK.findall(text):
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        if "://" in target:
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            found.append(f"dead link {link}")
    found += [f"local path {match}" for match in _LOCAL_PATH.findall(text)]
    return found


def test_there_are_documents():
    names = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    expected = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} | {
        f"docs/{name}.md" for name in ("architecture", "commands", "format", "memory")
    }
    assert expected <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_only_what_exists(path):
    assert document_errors(path, path.read_text()) == []


def test_what_does_not_exist_is_found_in_a_document():
    text = """
```sh
qlx merge --base b --adapter a -o out
qlx merge --bass b --adapter a -o out
qlx pack c -o out --to nf5   # a comment
qlx verify
$ qlx melt x | head
```
Run `qlx frob x` or `make toast`, see [there](nowhere.md), [inside](CONTRIBUTING.md#nothing) and
[here](CONTRIBUTING.md#house-rules), in /home/me/x.
"""
    errors = document_errors(ROOT / "EXAMPLE.md", text)
    expected = (
        "--bass",
        "nf5",
        "verify needs checkpoint",
        "melt",
        "frob",
        "toast",
        "nowhere",
        "nothing",
        "local",
    )
    assert len(errors) == len(expected)
    for error, word in zip(errors, expected, strict=True):
        assert word in error


def test_the_command_reference_is_that_of_the_program():
    from qlx.cli.document import reference

    assert (ROOT / "docs" / "commands.md").read_text() == reference()
