"""What the tree promises about itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import epp

PACKAGE = Path(epp.__file__).parent
LINES_MAX = 400
GENERATED = "_pb"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if GENERATED not in path.parts)


def of_tree(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def test_there_is_a_tree_to_look_at() -> None:
    assert len(MODULES) > 40


def test_the_layers_are_kept(tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    ran = subprocess.run([tool, "--cache-dir", str(tmp_path)], cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 broken" in ran.stdout


@pytest.mark.parametrize("path", MODULES, ids=of_tree)
def test_a_module_is_short_says_why_it_is_there_and_leaves_nothing_undone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= LINES_MAX
    tree = ast.parse(text)
    if not (path.name == "__init__.py" and not tree.body):
        assert (ast.get_docstring(tree) or "").strip(), "no module docstring"
    left = [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line)]
    assert not left


def test_nothing_in_the_deciding_core_asks_what_time_it_is_or_throws_dice_of_its_own() -> None:
    """Clock and rng are handed in: `epp.clock` alone reads the time; a Random is made only where everything is put together."""
    clocks = re.compile(r"\btime\.(time|monotonic|perf_counter)\w*\(|\bdatetime\.now\(|\brandom\.(random|choice|randint|shuffle)\(")
    core = [PACKAGE / name for name in ("datastore.py", "director.py", "types.py", "extproc/session.py", "extproc/codec.py")]
    core += [path for folder in ("plugins", "prefix", "parsing", "scheduling") for path in (PACKAGE / folder).rglob("*.py")]
    found = [of_tree(path) for path in core if clocks.search(path.read_text(encoding="utf-8"))]
    assert not found
