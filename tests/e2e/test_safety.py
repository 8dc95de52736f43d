"""A real server with TLS and tokens; one on a full disk; one whose weights hold NaN; wrong settings."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from clients.client import Client, ServerError
from clients.connection import Tls
from clients.events import Chat, Message, Options
from tests.e2e.conftest import ROOT, Process, client, start

TOKEN, PROMPT = "s3cr3t-0123456789abcdef", "PRIVATE-WORDS-OF-A-USER"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, cert.pem, key.pem, tokens.toml, token and server.toml."""
    folder = tmp_path_factory.mktemp("secure")
    authority = trustme.CA()
    cert = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    (folder / "cert.pem").write_bytes(b"".join(part.bytes() for part in cert.cert_chain_pems))
    cert.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "tokens.toml").write_text(f'[[token]]\nname = "tenant-1"\ntoken = "{TOKEN}"\n')
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "server.toml").write_text(
        f'tls_cert = "{folder}/cert.pem"\ntls_key = "{folder}/key.pem"\nauth_tokens = "{folder}/tokens.toml"\n'
        'log_level = "debug"\nmax_running = 4\n'
    )
    return folder


@pytest.fixture(scope="module")
def secure(files: Path) -> Iterator[Process]:
    process = start(["--config", str(files / "server.toml")], files / "log")
    yield process
    if process.popen.poll() is None:
        assert process.stop() == 0


async def test_nothing_secret_is_logged_or_told(secure: Process, files: Path) -> None:
    tls = Tls(ca=(files / "ca.pem").read_bytes(), server_name="localhost")
    errors = []
    async with Client(secure.address, token=TOKEN, tls=tls) as one:
        assert (await one.complete(PROMPT, Options(max_tokens=4))).token_ids
        assert (await one.complete(Chat([Message("user", PROMPT)]), Options(max_tokens=4))).token_ids
        for options in (Options(temperature=-1), Options(max_tokens=0), Options(stop=["x"] * 99)):
            with pytest.raises(ServerError) as error:
                await one.complete(PROMPT, options)
            errors.append(str(error.value))
        with pytest.raises(ServerError) as error:
            await one.complete(PROMPT, Options(max_tokens=3000, ignore_eos=True), timeout_s=0.2)
    for wrong in (TOKEN + "x", None):
        async with Client(secure.address, token=wrong, tls=tls) as stranger:
            with pytest.raises(ServerError, match="UNAUTHENTICATED") as error:
                await stranger.complete(PROMPT)
            errors.append(str(error.value))
    said = secure.log_path.read_text() + "".join(errors)
    assert '"tenant": "tenant-1"' in said
    assert '"from": "file ' in said
    for secret in (TOKEN, PROMPT, "BEGIN PRIVATE KEY", "BEGIN EC PRIVATE KEY"):
        assert secret not in said


def test_the_command_line_gets_in(secure: Process, files: Path) -> None:
    flags = ["--tls-ca", str(files / "ca.pem"), "--server-name", "localhost", "--token-file", str(files / "token")]
    assert json.loads(client(secure.address, "info", "--json", *flags))["model"]
    assert "UNAUTHENTICATED" in client(secure.address, "info", *flags[:4], code=1)


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--tls-cert", "nowhere.pem", "--tls-key", "nowhere.pem"], {}, "nowhere.pem"),
        ([], {"DSPARK_MAX_RUNNING": "many"}, "DSPARK_MAX_RUNNING"),
        (["--auth-tokens", "nowhere.toml"], {}, "nowhere.toml"),
    ],
)
def test_wrong_settings_end_the_start(arguments: list[str], environment: dict[str, str], named: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


async def test_a_full_disk_costs_logs_and_tables_only(tmp_path: Path) -> None:
    """No file can grow and the log's device is full: as a disk without room."""
    with Path("/dev/full").open("w") as full:  # noqa: ASYNC230
        popen = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", "--cost-cache", str(tmp_path / "costs")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
    try:
        assert popen.stdout is not None
        line = popen.stdout.readline()
        assert line.startswith("serving ")
        async with Client(line.split()[-1]) as one:
            assert len((await one.complete("import os\n", Options(max_tokens=8, ignore_eos=True))).token_ids) == 8
        assert not [path for path in (tmp_path / "costs").glob("*") if path.stat().st_size]
        popen.terminate()
        assert popen.wait(60) == 0
    finally:
        popen.kill()
        popen.wait()


@pytest.mark.slow  # the engine's and the service's own tests have its two halves
async def test_nan_ends_one_request_with_data_loss(tmp_path: Path) -> None:
    import torch

    from tests.engine.checkpoints import edit_config, edit_tensors, make_target, save_target

    model = make_target(vocab=300, tied=False)
    target = save_target(tmp_path / "target", model)
    embedding = model.model.embed_tokens.weight.detach().clone()
    embedding[41] = torch.nan
    edit_tensors(target, model__embed_tokens__weight=embedding)
    edit_config(target, eos_token_id=None)
    shutil.copy(ROOT / "engine" / "demo" / "target" / "tokenizer.json", target)
    process = start(["--model", str(target), "--log-level", "warning"], tmp_path / "log")
    try:
        async with Client(process.address) as one:
            good = await one.complete([1, 2, 3], Options(temperature=0, max_tokens=8, logit_bias={41: -100}))
            with pytest.raises(ServerError, match="DATA_LOSS: the model's logits are not finite"):
                await one.complete([1, 41, 3], Options(temperature=0, max_tokens=8))
            again = await one.complete([1, 2, 3], Options(temperature=0, max_tokens=8, logit_bias={41: -100}))
        assert good.token_ids == again.token_ids
    finally:
        assert process.stop() == 0
