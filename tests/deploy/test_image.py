"""The image, without building it: the Dockerfile agrees with the repository, and what it copies runs by itself."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server.service import SERVICE_NAME
from tests.deploy.chart import CHART, ROOT
from tests.deploy.dockerfile import Copy, Ignore, copies, read

DOCKERFILE = read(ROOT / "docker" / "Dockerfile")
IGNORE = Ignore((ROOT / ".dockerignore").read_text(encoding="utf-8"))
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
STAGES = list(dict.fromkeys(each.stage for each in DOCKERFILE if each.stage))


def last(name: str) -> str:
    return [each.text for each in DOCKERFILE if (each.stage, each.name) == (STAGES[-1], name)][-1]


def from_context() -> list[Copy]:
    return [copy for stage in STAGES for copy in copies(DOCKERFILE, stage) if copy.stage is None]


def visible(source: str) -> list[Path]:
    """The tracked files below a COPY's source that the build can see."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", source], cwd=ROOT, capture_output=True)
    return [ROOT / name for name in listed.stdout.decode().splitlines() if not IGNORE.hides(name)]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/app, as the Dockerfile fills it."""
    folder = tmp_path_factory.mktemp("app")
    for copy in copies(DOCKERFILE, "app"):
        for source in copy.sources if copy.stage is None else ():
            for path in visible(source):
                inside = Path(path.name) if path == ROOT / source else path.relative_to(ROOT / source)
                target = folder / copy.target / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return folder


def run(app: Path, *command: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(app), "HOME": str(app), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stages_are_named_and_come_before_their_use() -> None:
    assert STAGES == ["packages", "app", "serve"]
    for each in DOCKERFILE:
        if each.name == "FROM":
            assert each.text.split()[0] in ("${PYTHON_IMAGE}", *STAGES[: STAGES.index(each.stage)])
    for stage in STAGES:
        for copy in copies(DOCKERFILE, stage):
            assert copy.stage is None or copy.stage in STAGES[: STAGES.index(stage)]
    (base,) = [each.text for each in DOCKERFILE if each.name == "ARG" and each.text.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+", base)  # not one that moves
    assert not [each for each in DOCKERFILE if each.name == "ADD"]


def test_everything_that_is_copied_exists_and_may_enter() -> None:
    sources = {source for copy in from_context() for source in copy.sources}
    assert {"proto", "kernels", "engine", "server", "clients", "requirements/serve.txt"} <= sources
    for source in sources:
        assert (ROOT / source).exists() and visible(source), source


def test_what_needs_not_enter_stays_out(app: Path) -> None:
    for path in ("tests/conftest.py", ".git/config", ".venv/bin/python", "engine/training/loop.py", "README.md"):
        assert IGNORE.hides(path), path
    assert IGNORE.hides("server/__pycache__/app.cpython-311.pyc") and not IGNORE.hides("server/app.py")
    assert not (app / "engine" / "training").exists() and not list(app.rglob("*.pyc"))


def test_what_enters_serves_by_itself(app: Path) -> None:
    """No module of it, at any depth, needs one of ours that was left out."""
    assert "--listen" in run(app, *entry_point(), "--help")
    assert "generate" in run(app, "python", "-m", "clients", "--help")
    assert "--service" in run(app, "python", "-m", "docker.health", "--help")
    ours = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"tests"}
    for path in app.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in ours:
                module = app / node.module.replace(".", "/")
                assert module.is_dir() or module.with_suffix(".py").is_file(), f"{path.name} needs {node.module}"


def entry_point() -> list[str]:
    return list(ast.literal_eval(last("ENTRYPOINT")))


def test_it_runs_as_nobody_and_ends_when_told() -> None:
    user = f"{VALUES['podSecurity']['user']}:{VALUES['podSecurity']['group']}"
    assert last("USER") == user and not user.startswith("0")
    assert entry_point() == ["python", "-m", "docker.start"]  # no shell, which would swallow signals
    assert last("STOPSIGNAL") == "SIGTERM"
    assert set(last("EXPOSE").split()) == {str(VALUES["ports"]["grpc"]), str(VALUES["ports"]["metrics"])}
    assert f'"{SERVICE_NAME}"' in last("HEALTHCHECK")
    written = set(ast.literal_eval(last("VOLUME"))) | {"/tmp"}
    environment = dict(word.split("=", 1) for word in shlex.split(last("ENV")))
    for name in ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "HF_HOME"):
        assert any(environment[name].startswith(folder) for folder in written), name


@pytest.mark.parametrize("variant", ["cpu", "cuda", "tpu"])
def test_a_variant_installs_its_own_pytorch(variant: str, tmp_path: Path) -> None:
    """The real commands, with pip and python that only say what they were asked for."""
    (command,) = [each.text for each in DOCKERFILE if each.name == "RUN" and "pip install" in each.text]
    said = tmp_path / "said"
    for name in ("pip", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {said}\n')
        (tmp_path / name).chmod(0o755)
    command = command.replace("/opt/venv/bin", str(tmp_path)).replace("/tmp/serve.txt", "requirements/serve.txt")
    environment = os.environ | {"VARIANT": variant, "TORCH_CPU_INDEX": "https://index"}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if variant == "tpu":
        assert done.returncode == 1 and "cpu or cuda, not tpu" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    (pinned,) = re.findall(r"^torch==\S+", (ROOT / "requirements/serve.txt").read_text(), re.MULTILINE)
    lines = said.read_text().splitlines()
    own = [f"pip install --no-deps --index-url https://index {pinned}+cpu"] if variant == "cpu" else []
    assert lines[:-1] == [*own, "pip install -r requirements/serve.txt", "pip check"]


def test_commands_are_shell() -> None:
    for each in DOCKERFILE:
        if each.name == "RUN":
            subprocess.run(["sh", "-n", "-c", each.text], check=True)
