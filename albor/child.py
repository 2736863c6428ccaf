"""albor as another albor command starts it: `python -m albor.child PARENT ARGUMENTS`. It ends with that."""

from __future__ import annotations

import sys

from albor.parent import end_with


def main() -> None:
    """What `albor ARGUMENTS` does, for as long as the process PARENT lives."""
    end_with(int(sys.argv.pop(1)))
    from albor.cli import main as command

    command()


if __name__ == "__main__":
    main()
