"""The TypeScript client against a real server, with the Python client as its oracle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import trustme

from clients.client import Client
from clients.events import Chat, Message
from clients.scheduler import SchedulerClient
from tests.e2e.conftest import ROOT, Process, client, generate, start

PACKAGE = ROOT / "clients" / "typescript"
PROMPT = "def add(a, b):"
TOKEN = "s3cr3t-0123456789abcdef"


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


async def test_token_ids_are_the_python_clients(built: Path, server: Process) -> None:
    said = "naïve 漢字 🙂\n"
    ours = json.loads(node(built, "dist/main.js", "tokenize", "--server", server.address, "--prompt", said))
    program = f"""
        import {{ Client }} from "{(built / "dist" / "index.js").as_uri()}";
        const client = new Client("{server.address}");
        const {{ tokenIds, pieces }} = await client.tokenize({{ messages: [{{ role: "user", content: "hi" }}] }});
        const text = await client.detokenize({json.dumps(ours)});
        console.log(JSON.stringify({{ tokenIds, bytes: Buffer.concat(pieces).length, text }}));
        client.close();
    """
    answer = json.loads(node(built, "--input-type=module", "--eval", program))
    async with Client(server.address) as theirs:
        assert ours == await theirs.tokenize(said)
        chat = await theirs.tokenize(Chat([Message("user", "hi")]))
        assert answer["tokenIds"] == chat
        assert answer["bytes"] == len((await theirs.detokenize(chat, skip_special_tokens=False)).encode())
    assert answer["text"] == said


async def test_rounds_are_those_that_the_python_client_sees(built: Path, server: Process) -> None:
    generate(server.address, PROMPT, "--max-tokens", "24", "--temperature", "0")
    program = f"""
        import {{ Client, SchedulerClient }} from "{(built / "dist" / "index.js").as_uri()}";
        const client = new Client("{server.address}");
        for await (const {{ records }} of new SchedulerClient(client).watch({{ history: 4 }})) {{
            const plain = (_, value) => (typeof value === "bigint" ? Number(value) : value);
            console.log(JSON.stringify(records, plain));
            break;
        }}
        client.close();
    """
    ours = json.loads(node(built, "--input-type=module", "--eval", program))
    async with Client(server.address) as theirs, aclosing(SchedulerClient(theirs).watch(history=4)) as batches:
        records = (await anext(batches)).records
    pairs = {"round": "round", "running": "running", "measuredS": "measured_s", "tokens": "tokens", "policy": "policy"}
    assert len(ours) == 4
    for mine, other in pairs.items():
        assert [record[mine] for record in ours] == [record[other] for record in records]


def test_the_policy_is_read_changed_and_set_back(built: Path, server: Process) -> None:
    def policy(*flags: str) -> dict[str, object]:
        answer = json.loads(node(built, "dist/main.js", "policy", "--server", server.address, *flags))
        theirs = json.loads(client(server.address, "policy", "--json"))
        assert (answer["policy"]["name"], answer["policy"]["maxQueue"]) == (
            theirs["policy"]["name"],
            theirs["policy"]["max_queue"],
        )
        assert answer["names"] == theirs["names"]
        found: dict[str, object] = answer["policy"]
        return found

    before = policy()
    changed = policy("--name", "fixed", "--max-queue", "7")
    assert changed == {**before, "name": "fixed", "maxQueue": 7}
    assert policy("--reset", "name", "--reset", "max_queue") == before
    said = node(built, "dist/main.js", "policy", "--server", server.address, "--name", "best", code=1)
    assert "INVALID_ARGUMENT" in said and "policy.name" in said
    assert "--reset" in node(built, "dist/main.js", "policy", "--reset", "speed", code=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority's certificate, pairs of the server and of a client, and a token with the server's list of them."""
    folder, authority = tmp_path_factory.mktemp("secure"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("server", "client"):
        pair = authority.issue_cert(f"{name}.example")
        (folder / f"{name}.pem").write_bytes(b"".join(part.bytes() for part in pair.cert_chain_pems))
        pair.private_key_pem.write_to_path(folder / f"{name}-key.pem")
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    (folder / "tokens.toml").write_text(f'[[token]]\nname = "tenant-1"\nsha256 = "{digest}"\nadmin = true\n')
    (folder / "token").write_text(TOKEN + "\n")
    return folder


@pytest.fixture(scope="module")
def secure(files: Path) -> Iterator[Process]:
    tls = (f"--tls-cert={files}/server.pem", f"--tls-key={files}/server-key.pem", f"--tls-client-ca={files}/ca.pem")
    process = start([*tls, f"--auth-tokens={files}/tokens.toml"], files / "log")
    yield process
    assert process.stop() == 0


def test_mutual_tls_and_a_token_open_the_door(built: Path, secure: Process, files: Path) -> None:
    ca = (f"--server={secure.address}", f"--tls-ca={files}/ca.pem", "--server-name=server.example", "--timeout=20")
    ours = (f"--tls-cert={files}/client.pem", f"--tls-key={files}/client-key.pem")
    token = f"--token-file={files}/token"
    flags = ("--prompt", PROMPT, "--max-tokens", "8", "--temperature", "0")
    text = node(built, "dist/main.js", "generate", *ca, *ours, token, *flags)
    theirs = client(secure.address, "generate", *ca[1:], *ours, token, *flags, "--json")
    assert text == json.loads(theirs)["text"]
    assert json.loads(node(built, "dist/main.js", "policy", *ca, *ours, token))["policy"]["name"]
    assert "UNAUTHENTICATED" in node(built, "dist/main.js", "info", *ca, *ours, code=1)
    program = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ Client, NEVER }} from "{(built / "dist" / "index.js").as_uri()}";
        const tls = {{ ca: readFileSync("{files}/ca.pem"), serverName: "server.example" }};
        for (const each of [tls, undefined]) {{
            const client = new Client("{secure.address}", {{ tls: each, token: "{TOKEN}", retry: NEVER }});
            await client.info({{ timeoutMs: 20000 }}).then(() => console.log("in"), (error) => console.log(error.code));
            client.close();
        }}
    """
    assert (
        node(built, "--input-type=module", "--eval", program).split() == ["UNAVAILABLE"] * 2
    )  # no certificate, no TLS


def test_wrong_flags_of_the_connection_are_named(built: Path, files: Path) -> None:
    wrong = {
        "--tls-cert and --tls-key": (f"--tls-cert={files}/client.pem",),
        "--tls-ca": ("--tls-ca=nowhere.pem",),
        "--token-file": (f"--token-file={files}/ca.pem",),
        "no such command": ("dance",),
    }
    for named, flags in wrong.items():
        assert named in node(built, "dist/main.js", "info", *flags, code=2)


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
