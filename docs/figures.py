"""Figures of the house: sizes of modules and functions, widths, comments, README, tests beside
code.

    python docs/figures.py [CHECKOUT ...]     # default: this one; several stand side by side

Read from the source with `ast` and `tokenize`; nothing of the checkout is imported.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

WIDTH = 100
"""Columns."""
FAMILY_WORDS = (
    "config.module",
    ".module is None",
    ".module is not None",
    "as_module",
    "has_model(",
)
"""What code says that asks which family is served."""


def main(checkouts: Sequence[Path]) -> None:
    columns = [figures(checkout) for checkout in checkouts]
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


def figures(checkout: Path) -> dict[str, str]:
    """One column: name -> figure, of the package under `handler/`, beside tests and README."""
    package = [path for path in (checkout / "handler").rglob("*.py") if path.read_text().strip()]
    tests = [*(checkout / "tests").rglob("*.py")]
    sizes = sorted(len(_lines(path)) for path in package)
    trees = [ast.parse(path.read_text()) for path in package]
    functions = sorted(end - start + 1 for tree in trees for start, end in _functions(tree))
    lines = [line for path in package for line in _lines(path)]
    code, test_code = sum(sizes), sum(len(_lines(path)) for path in tests)
    comments = sum(_comments(path) for path in package)
    readme = (checkout / "README.md").read_text()
    private = sum(_reaches_in(ast.parse(path.read_text())) for path in tests)
    return {
        "lines of the package": str(code),
        "modules": str(len(package)),
        "folders": str(len({path.parent for path in package}) - 1),
        "lines a module: median / p90 / max": _spread(sizes),
        "lines a function: p50 / p90 / max": _spread(functions),
        f"lines over {WIDTH} columns": f"{100 * _wide(lines) / len(lines):.1f} %",
        "comments per 100 lines": f"{100 * comments / code:.1f}",
        "places that ask for the family": str(
            sum(_asks_for_family(path) for path in package if path.name != "model.py")
        ),
        "private attributes that tests reach for": str(private),
        "README: words": str(len(readme.split())),
        "tests : code": f"{test_code / code:.2f}",
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _functions(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """First and last line of every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.end_lineno or node.lineno


def _comments(path: Path) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def _wide(lines: Sequence[str]) -> int:
    return sum(len(line) > WIDTH for line in lines)


def _asks_for_family(path: Path) -> int:
    return sum(path.read_text().count(word) for word in FAMILY_WORDS)


def _reaches_in(tree: ast.Module) -> int:
    """Private attributes (one underscore) of anything but `self` and `cls`."""
    return sum(
        isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        for node in ast.walk(tree)
    )


def _spread(values: Sequence[int]) -> str:
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return f"{statistics.median(values):.0f} / {tenths[-1]:.0f} / {values[-1]}"


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [Path(__file__).parents[1]])
