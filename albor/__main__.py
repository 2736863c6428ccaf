"""`python -m albor` is `albor`."""

from albor.cli import main

main()
