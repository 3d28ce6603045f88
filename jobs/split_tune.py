"""``raycloud split-tune`` for ``ray job submit --working-dir . -- python jobs/split_tune.py --recipe …``."""

from raycloud.cli.app import main

if __name__ == "__main__":
    main(["split-tune"])
