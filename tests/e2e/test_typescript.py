"""The TypeScript client against a real server, with the Python client as its oracle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Process, client, generate

PACKAGE = ROOT / "clients" / "typescript"
PROMPT = "def add(a, b):"


def node(package: Path, *arguments: str, code: int = 0, text: str | None = None) -> str:
    """Runs Node.js in the package's folder; returns stdout, or stderr where failure was expected."""
    done = subprocess.run(
        ["node", *arguments], cwd=package, capture_output=True, text=True, input=text, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def need_node() -> None:
    if shutil.which("node") is None:
        pytest.skip("needs Node.js 20 or newer, which is not installed")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < 20:
        pytest.skip(f"needs Node.js 20 or newer, not {version}")


@pytest.fixture(scope="session")
def built() -> Path:
    """The package, compiled from what is in the sources now."""
    need_node()
    compiler = PACKAGE / "node_modules" / "typescript" / "bin" / "tsc"
    if not compiler.exists():
        pytest.skip("the TypeScript client's packages are not installed: `make typescript` does it")
    node(PACKAGE, str(compiler))
    return PACKAGE


def test_the_client_keeps_its_promises_to_a_scripted_server(built: Path) -> None:
    node(built, "--test", "test")


def test_the_generated_code_is_that_of_the_protos(built: Path) -> None:
    program = [sys.executable, str(ROOT / "proto" / "build_typescript.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_seeded_text_is_the_python_clients(built: Path, server: Process) -> None:
    flags = ("--max-tokens", "40", "--seed", "11", "--temperature", "0.8")
    line = ("dist/main.js", "generate", "--server", server.address, "--prompt", PROMPT, *flags)
    ours = json.loads(node(built, *line, "--json"))
    theirs = generate(server.address, PROMPT, *flags)
    for name in ("text", "token_ids", "finish_reason"):
        assert ours[name] == theirs[name]
    assert ours["usage"]["completion_tokens"] == len(ours["token_ids"]) == 40
    speculation = ours["speculation"]
    assert speculation["rounds"] * speculation["mean_accepted_length"] == pytest.approx(39)
    # Without --json the same text comes out as it is made.
    assert node(built, *line) == ours["text"]


def test_a_stream_comes_in_pieces_and_can_be_left(built: Path, server: Process) -> None:
    program = f"""
        import {{ Client }} from "{(built / "dist" / "index.js").as_uri()}";
        const client = new Client("{server.address}");
        const seen = [];
        for await (const event of client.generate({json.dumps(PROMPT)}, {{ maxTokens: 3000, ignoreEos: true }})) {{
            seen.push(event.$case);
            if (seen.length === 4) break;
        }}
        let load;
        do load = (await client.info()).load; while (load.running || load.waiting);
        console.log(JSON.stringify({{ seen, used: load.pagesTotal - load.pagesFree - load.pagesCached }}));
        client.close();
    """
    answer = json.loads(node(built, "--input-type=module", "--eval", program))
    assert answer == {"seen": ["started", "delta", "delta", "delta"], "used": 0}


def test_a_conversation_remembers(built: Path, server: Process) -> None:
    said = "one\ntwo\n/reset\ntwo\n/quit\nnever\n"
    flags = ("--server", server.address, "--max-tokens", "12", "--temperature", "0")

    def replies(shown: str) -> list[str]:
        return [line for line in shown.splitlines() if "prompt tokens cached" not in line]

    def prompt_tokens(shown: str) -> list[int]:
        return [int(line.split(" prompt tokens")[0].split()[-1]) for line in shown.splitlines() if "cached" in line]

    ours = node(built, "dist/main.js", "chat", *flags, text=said)
    theirs = client(server.address, "chat", *flags[2:], text=said).replace("a new conversation\n", "")
    assert replies(ours) == replies(theirs)
    first, second, third = prompt_tokens(ours)
    assert [first, second, third] == prompt_tokens(theirs)
    assert second > first + 3 and third < second


def test_info_and_errors(built: Path, server: Process) -> None:
    line = ("--server", server.address)
    ours = json.loads(node(built, "dist/main.js", "info", *line))
    theirs = json.loads(client(server.address, "info", "--json"))
    assert (ours["model"], ours["parameters"]) == (theirs["model"], theirs["parameters"])
    assert (ours["drafter"]["kind"], ours["eosTokenIds"]) == (theirs["drafter"]["kind"], theirs["eos_token_ids"])
    said = node(built, "dist/main.js", "generate", *line, "--prompt", "x", "--temperature", "1000", code=1)
    assert "INVALID_ARGUMENT" in said and "sampling.temperature" in said
    assert "usage:" in node(built, "dist/main.js", "dance", code=2)
    assert "--seed" in node(built, "dist/main.js", "generate", "--prompt", "x", "--seed", "1.5", code=2)


@pytest.mark.slow  # downloads the packages
def test_a_clean_checkout_installs_what_the_lock_file_names(tmp_path: Path, server: Process) -> None:
    need_node()
    package = tmp_path / "typescript"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("node_modules", "dist"))
    for command in (["npm", "ci", "--ignore-scripts"], ["npm", "run", "build"], ["npm", "test"]):
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=280, env=os.environ)
        assert done.returncode == 0, done.stdout + done.stderr
    flags = ("--server", server.address, "--prompt", PROMPT, "--max-tokens", "8", "--temperature", "0")
    assert node(package, "dist/main.js", "generate", *flags) == generate(server.address, PROMPT, *flags[4:])["text"]
