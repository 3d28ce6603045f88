"""``raycloud retrain`` for ``ray job submit --working-dir . -- python jobs/retrain.py --recipe …``."""

from raycloud.cli.app import main

if __name__ == "__main__":
    main(["retrain"])
