"""The core package installs and works without ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IMPORT_ALL = """
import importlib, pathlib, sys
packages = ("edge", "distill", "split", "training", "evaluation", "report", "models", "data", "link")
names = [f"raycloud.{p.stem}" for p in pathlib.Path(sys.argv[1]).glob("*.py") if p.stem not in ("__main__", "__init__")]
for package in packages:
    for path in (pathlib.Path(sys.argv[1]) / package).rglob("*.py"):
        parts = path.relative_to(sys.argv[1]).with_suffix("").parts
        names.append(".".join(("raycloud", *parts)).removesuffix(".__init__"))
for name in names:
    importlib.import_module(name)
import raycloud.cli.app
assert not [name for name in sys.modules if name.split(".")[0] == "ray"], "ray was imported"
print(len(names))
"""


def test_no_module_of_the_core_imports_ray() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, str(ROOT / "raycloud")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_core_installs_and_works_in_an_environment_without_ray(tmp_path: Path) -> None:
    """Install only a wheel of this package and its dependencies, validate a recipe, and get the error that ray is
    missing."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, str(ROOT)], check=True)

    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *words], capture_output=True, text=True, cwd=tmp_path, env=without)

    assert "No module named 'ray'" in run("-c", "import ray").stderr
    package = run("-c", "import raycloud; print(raycloud.__path__[0])").stdout.strip()
    assert str(venv) in package
    assert (Path(package) / "py.typed").is_file()
    done = run("-c", IMPORT_ALL, package)
    assert done.returncode == 0, done.stderr
    recipe = str(ROOT / "jobs" / "recipes" / "demo.yaml")
    assert "a valid distill recipe" in run("-m", "raycloud", "validate", recipe).stdout
    missing = run("-m", "raycloud", "distill", "--recipe", recipe)
    assert missing.returncode == 2
    assert (
        missing.stderr.strip() == "error: 'raycloud distill' needs the extra 'cluster': pip install 'raycloud[cluster]'"
    )
