"""The `epp` command, also as `python -m epp`. It reads the rest of itself within, for Ctrl-C may come as early as that."""

import sys


def main() -> int:
    """Exit codes: cli."""
    try:
        from epp.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:  # Python 3.11 wraps what comes while a class is made, as it is when modules are read
        if isinstance(error.__cause__, KeyboardInterrupt):
            return 130
        raise


if __name__ == "__main__":
    sys.exit(main())
