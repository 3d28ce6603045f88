"""``raycloud tune-teacher`` for ``ray job submit --working-dir . -- python jobs/tune_teacher.py --recipe …``."""

from raycloud.cli.app import main

if __name__ == "__main__":
    main(["tune-teacher"])
