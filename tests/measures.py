"""What can be counted of code that is to be read: lines, signposts, density, imports.

Used by test_readability.py and test_readme.py, which hold the repository to its own promises.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nano_moca"
SCRIPTS = [ROOT / "train_cpt.py", ROOT / "train_cl.py"]
# beside the road: neither stage needs it to train and to save
BESIDE = ("qwen3", "builtin", "convert", "plan", "lora", "report", "evaluate", "ablate",
          "benchmark", "benchmark_gpu")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise)
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}


def is_beside(path: Path) -> bool:
    """Whether a file of the package stands beside the road."""
    return path.with_suffix("").relative_to(ROOT).parts[1:2] in {(name,) for name in BESIDE}


def road_files() -> list[Path]:
    """What the two stages run on: both scripts and their part of the package."""
    return [*SCRIPTS, *(path for path in sorted(PACKAGE.rglob("*.py")) if not is_beside(path))]


def beside_files() -> list[Path]:
    """The rest of the package."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if is_beside(path)]


def docstrings(tree: ast.AST) -> Iterator[ast.Expr]:
    """The docstrings of a module and all that is in it."""
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            yield node.body[0]


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, no comment, no docstring."""
    source = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for docstring in docstrings(ast.parse(source)):
        lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


@dataclass
class Density:
    """Counts over some files, from which the figures per 100 lines of code follow."""

    code: int = 0
    comments: int = 0  # on lines of their own
    blank: int = 0  # lines inside functions
    comprehensions: int = 0
    nested: int = 0  # comprehensions with two loops, or inside another
    statements: int = 0
    nodes: int = 0  # of the syntax tree, in these statements
    lines: int = 0  # not blank
    long: int = 0  # over 85 characters
    by_file: dict[str, "Density"] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        """Count one more file."""
        source = path.read_text(encoding="utf-8")
        lines, tree = source.splitlines(), ast.parse(source)
        self.code += code_lines(path)
        self.comments += sum(line.lstrip().startswith("#") for line in lines)
        self.lines += sum(bool(line.strip()) for line in lines)
        self.long += sum(len(line) > 85 for line in lines)

        inside: set[int] = set()  # lines of function bodies, without docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                inside.update(range(node.body[0].lineno, node.end_lineno + 1))
        for docstring in docstrings(tree):
            inside.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
        self.blank += sum(not lines[number - 1].strip() for number in inside)

        for node in ast.walk(tree):
            if isinstance(node, COMPREHENSIONS):
                self.comprehensions += 1
                inner = any(isinstance(below, COMPREHENSIONS) for below in ast.walk(node)
                            if below is not node)
                self.nested += inner or len(node.generators) > 1
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, STATEMENTS) and not text:
                self.statements += 1
                self.nodes += sum(1 for _ in ast.walk(node))

    def per_100(self, count: int) -> float:
        """A count per 100 lines of code."""
        return 100 * count / self.code


def imports(path: Path, everywhere: bool) -> set[str]:
    """The modules of this repository that a file imports: at its top, or also inside functions.
    A name imported from a package counts as its module where there is one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if module_file(name) else node.module for name in names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if module_file(name)}


def module_file(name: str) -> Path | None:
    """The file of a module of this repository; None for any other name."""
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def module_name(path: Path) -> str:
    """The name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
