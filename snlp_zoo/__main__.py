"""`python -m snlp_zoo` is `snlp-zoo`, so that launchers can start it."""

from snlp_zoo.cli import main

main()
