"""Takes out of the image's packages what a running picker never opens: tests, and what compilers and type checkers read.

Run by the image's build, in the environment it trims. Only files and directories of these kinds go, never a module that could be
imported by another: an `import` that works outside the image works in it. Debug symbols stay: stripping a library that auditwheel has
patched can break it.
"""

# ruff: noqa: INP001 - a script of the image's build, in no package

import shutil
import sys
import sysconfig
from pathlib import Path

SUFFIXES = frozenset({".a", ".c", ".f", ".f90", ".h", ".pxd", ".pxi", ".pyi", ".pyx"})


def trim(site_packages: Path) -> int:
    """Bytes taken out."""
    freed_bytes = 0
    for directory in [path for path in site_packages.rglob("tests") if path.is_dir()]:
        freed_bytes += sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        shutil.rmtree(directory)
    for file in [path for path in site_packages.rglob("*") if path.suffix in SUFFIXES and path.is_file()]:
        freed_bytes += file.stat().st_size
        file.unlink()
    return freed_bytes


if __name__ == "__main__":
    sys.stdout.write(f"trimmed {trim(Path(sysconfig.get_path('purelib'))) / 1e6:.1f} MB\n")
