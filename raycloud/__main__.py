"""Entry point of ``python -m raycloud``."""

from raycloud.cli.app import main

main()
