"""Verbs that compute nothing start fast: they import neither torch nor ray nor transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, typer
from raycloud.cli import verbs
from raycloud.cli.app import main

def below(command, words=()):
    yield words
    for name, one in getattr(command, "commands", {}).items():
        yield from below(one, (*words, name))

helps = [(*words, "--help") for words in below(typer.main.get_command(verbs.app))]
jobs = ("tune_teacher", "distill", "evaluate", "split_evaluate", "split_tune")
others = [("--version",), ("fetch",), ("runs", "."), ("report", "nowhere")]
others += [("schema", job) for job in jobs] + [("validate", "--recipe", f"{job}.yaml", "--show") for job in jobs]
for words in [*helps, *others]:
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        assert end.code == (2 if words[0] == "report" and words[1] != "--help" else 0), (words, end.code)
    heavy = {"torch", "ray", "transformers"} & set(sys.modules)
    assert not heavy, f"{' '.join(words)} imports {heavy}"
print(len(helps), "helps")
"""


def test_light_verbs_import_nothing_heavy(tmp_path: Path) -> None:
    for job in ("tune_teacher", "distill", "split_evaluate", "split_tune"):
        (tmp_path / f"{job}.yaml").write_text(f"job: {job}\n")
    (tmp_path / "evaluate.yaml").write_text("job: evaluate\nmodels: [m]\ndata: [d]\n")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) > 25
