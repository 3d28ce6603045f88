"""``raycloud distill`` for ``ray job submit --working-dir . -- python jobs/distill.py --recipe …``."""

from raycloud.cli.app import main

if __name__ == "__main__":
    main(["distill"])
