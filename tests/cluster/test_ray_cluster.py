"""Job on separate clusters in separate processes: submitted with a token, driver killed, stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.recipes import small, split_edges
from tests.endings import of_a_submitted_job, report_of
from tests.ports import free_port
from tests.retrain.in_process import DIGITS, recipe_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{BIN}:{os.environ['PATH']}"
    # As the tests of another process have them.
    for name in ("RAY_TMPDIR", "RAY_worker_niceness", "RAY_memory_monitor_refresh_ms"):
        kept[name] = os.environ[name]
    return {**kept, "HOME": str(home), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", **more}


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.2)


def written(model: Path, folder: Path) -> Path:
    """Recipe of three rounds, each long enough to be interrupted, with results in ``folder/run``."""
    path = folder / "recipe.yaml"
    steps = {"count": 3, "steps": 25, "deadline_s": 280}
    path.write_text(small(model, folder / "run", rounds=steps).dump())
    return path


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    return written(tiny_llama, tmp_path)


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[dict[str, str], int]]:
    """``ray start --head`` with a token, custom resources and free ports; its environment and dashboard port."""
    # Sockets have short names only.
    scratch = Path(tempfile.mkdtemp(prefix="rc-"))
    env = environment(scratch, RAY_AUTH_MODE="token")
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    port, dashboard = free_port(), free_port()
    words = [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={scratch / 't'}", "--num-cpus=4"]
    words += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", '--resources={"cloud": 1, "edge": 2}']
    words += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    words += ["--object-store-memory=500000000", "--labels=tier=cloud"]
    subprocess.run([BIN / "ray", "start", "--head", *words], env=env, check=True, capture_output=True, timeout=400)
    try:
        yield {**env, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}, port
    finally:
        # Only the processes of this cluster: they name its folder.
        subprocess.run(["pkill", "-9", "-f", str(scratch)], check=False)
        shutil.rmtree(scratch, ignore_errors=True)


def submit(env: dict[str, str], name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ray", "job", "submit", "--working-dir", ".", "--submission-id", name, *words]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_every_job_is_submitted_in_a_test_here() -> None:
    """Every job has such a test."""
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {"distill", "retrain", "split_tune", "tune_teacher"}


@pytest.fixture(scope="module")
def submitted(
    head: tuple[dict[str, str], int], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Output and result directory of a submitted job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("submitted")
    words = ["--", "python", "jobs/distill.py", "--recipe", str(written(tiny_llama, folder))]
    done = submit(head[0], "distill", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "run"


def test_a_job_is_submitted_with_a_token(head: tuple[dict[str, str], int], submitted: tuple[str, Path]) -> None:
    env, _ = head
    without = submit({**env, "RAY_AUTH_MODE": "disabled"}, "refused", "--", "python", "jobs/distill.py", "--help")
    assert without.returncode != 0
    said, path = submitted
    assert json.loads((path / "summary.json").read_text())["rounds"] == 3
    assert "gap closed" in said
    assert "Traceback" not in said
    assert report_of(of_a_submitted_job(said)) is None


def test_a_teacher_is_tuned_by_a_submitted_job(
    head: tuple[dict[str, str], int], tiny_llama: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    env, _ = head
    recipe = tmp_path / "teacher.yaml"
    recipe.write_text(
        f"""
        job: tune_teacher
        output: {tmp_path / "teacher"}
        model: {tiny_llama}
        data: {{source: builtin:instruct, format: alpaca, max_length: 96, max_prompt_length: 80, limit: 60}}
        training: {{batch_size: 4}}
        steps: 2
        workers: {{placement: {{num_cpus: 0.1}}}}
        evaluation: {{held_out_samples: 8}}
        """
    )
    done = submit(env, "teacher", "--", "python", "jobs/tune_teacher.py", "--recipe", str(recipe), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "teacher" / "summary.json").read_text())["steps"] == 2
    assert "held-out perplexity" in done.stdout
    assert "Traceback" not in done.stdout
    summary = report_of(of_a_submitted_job(done.stdout))
    assert summary is not None and summary["steps"] == 2


def doctor(env: dict[str, str], *words: str) -> tuple[int, dict[tuple[str, str], str]]:
    """Run the doctor; return its exit code, and its findings by check and level."""
    done = subprocess.run(
        [BIN / "raycloud", "doctor", "--json", *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.stdout, done.stderr
    findings = json.loads(done.stdout.splitlines()[-1])["findings"]
    return done.returncode, {(one["check"], one["level"]): one["what"] for one in findings}


def test_edges_are_split_tuned_by_a_submitted_job(
    head: tuple[dict[str, str], int], tiny_llama: Path, tmp_path: Path
) -> None:
    env, _ = head
    path = tmp_path / "edges.yaml"
    path.write_text(split_edges(tiny_llama, tmp_path / "run").dump())
    done = submit(env, "edges", "--", "python", "jobs/split_tune.py", "--recipe", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "store: held-out perplexity" in done.stdout
    assert report_of(of_a_submitted_job(done.stdout)) is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [one["members"] for one in summary["rounds"]] == [["store", "newsroom"]] * 3


def test_blocks_are_retrained_by_a_submitted_job(head: tuple[dict[str, str], int], tmp_path: Path) -> None:
    env, _ = head
    path, least = tmp_path / "retrain.yaml", {"num_cpus": 0.1}
    recipe = recipe_of(DIGITS, output=str(tmp_path / "run"), cloud_placement=least, edge_placement=least)
    path.write_text(recipe.dump())
    done = submit(env, "retrain", "--", "python", "jobs/retrain.py", "--recipe", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "window 2, a: invert" in done.stdout and "Traceback" not in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["windows"], summary["alarms"], summary["over_budget"]) == (2, 1, 0)


def test_the_doctor_knows_token_ports_and_room(head: tuple[dict[str, str], int], recipe: Path) -> None:
    env, port = head
    address = f"127.0.0.1:{port}"
    job_server = env["RAY_ADDRESS"]
    env = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
    code, found = doctor(env, "--recipe", str(recipe), "--address", address)
    assert code == 0, found
    assert found["token", "fine"] == "the cluster asks for its token"
    assert found["job server", "fine"] == job_server
    assert found["capacity", "fine"].startswith("there is room for 3 actors")
    code, found = doctor({**env, "RAY_AUTH_MODE": "disabled"}, "--address", address)
    assert code == 2
    assert f"{address} answers, but not to one without a token" in found["address", "error"]


def test_ray_job_stop_leaves_a_directory_that_resumes(
    head: tuple[dict[str, str], int], recipe: Path, tmp_path: Path
) -> None:
    env, _ = head
    entry = ["--", "python", "jobs/distill.py", "--recipe", str(recipe)]
    assert submit(env, "stopped", "--no-wait", *entry).returncode == 0
    state = tmp_path / "run" / "state"
    wait_for((state / "round-0001").is_dir, 400, "the first round")
    subprocess.run([BIN / "ray", "job", "stop", "stopped"], env=env, check=True, capture_output=True, timeout=600)
    logs = subprocess.run([BIN / "ray", "job", "logs", "stopped"], env=env, capture_output=True, text=True, timeout=600)
    assert "continue with --resume" in logs.stdout
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = subprocess.run(
        [BIN / "raycloud", "distill", "--recipe", recipe, "--resume"],
        env={**env, "RAY_ADDRESS": f"127.0.0.1:{head[1]}"}, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert report_of(resumed.stdout, resumed.stderr) is None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 3


def test_a_cluster_without_edges_is_one_line(recipe: Path, tmp_path: Path) -> None:
    script = (
        "import ray, sys; from raycloud.cli.app import main; "
        "ray.init(address='local', num_cpus=2, resources={'cloud': 1}, include_dashboard=False, log_to_driver=False);"
        f"sys.argv[1:] = ['--recipe', {str(recipe)!r}]; main(['distill'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "has 0 of the resource 'edge', this job needs 2; start nodes with: ray start" in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_killed_driver_resumes_to_the_same_weights(recipe: Path, submitted: tuple[str, Path], tmp_path: Path) -> None:
    """After SIGKILL of the driver and its Ray between rounds, the resumed run ends like the undisturbed one that was
    submitted elsewhere."""
    env = environment(tmp_path)
    command = [str(BIN / "raycloud"), "distill", "--recipe", str(recipe)]
    driver = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "run" / "state" / "round-0001").is_dir, 400, "the first round")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = subprocess.run([*command, "--resume", "--json"], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records if record["kind"] == "round"] == [0, 1, 2]
    assert report_of(done.stdout, done.stderr) == json.loads((tmp_path / "run" / "summary.json").read_text())
    runs = (tmp_path / "run", submitted[1])
    resumed, undisturbed = (load_file(run / "student" / "model.safetensors") for run in runs)
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in resumed.items())


def test_ctrl_c_ends_cleanly(recipe: Path, tmp_path: Path) -> None:
    command = [str(BIN / "raycloud"), "distill", "--recipe", str(recipe)]
    driver = subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for((tmp_path / "run" / "state" / "round-0001").is_dir, 400, "the first round")
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=600)
    assert driver.returncode == 130
    assert [line for line in errors.splitlines() if line.startswith("error: stopped; continue with --resume")]
    assert "Traceback" not in errors
