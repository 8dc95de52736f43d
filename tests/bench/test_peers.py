"""The parts of `make bench-peers` that need no peer: environments, the runners' protocol, workloads, the table."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from tests.bench.peers import arms, machine, report, workloads
from tests.bench.peers.environments import Environment

ECHO = """
from protocol import serve

def start(told):
    if told.get("fault"):
        raise OSError("no such model\\nand more")
    print("chatter of a library")
    def plain(prompts, tokens):
        if tokens < 0:
            raise ValueError("tokens")
        return [prompt[:1] * tokens for prompt in prompts]
    return {"versions": {"echo": "1"}}, {"plain": plain}

serve(start)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    shutil.copy(arms.RUNNERS / "protocol.py", tmp_path)
    (tmp_path / "echo.py").write_text(ECHO, encoding="utf-8")
    return tmp_path / "echo.py"


def runner(program: Path, **told: object) -> arms.Runner:
    return arms.Runner("echo", program, Path(sys.executable), {"threads": 1, **told}, logs=program.parent)


def test_a_runner_answers_and_what_it_prints_is_no_answer(program: Path) -> None:
    process = runner(program)
    try:
        assert process.ready()["versions"] == {"echo": "1"}
        with pytest.raises(arms.Unusable, match="ValueError: tokens"):
            process.generate("plain", [[1]], -1)
        took, outputs = process.generate("plain", [[7, 8], [9, 9]], 3)
        assert outputs == [[7, 7, 7], [9, 9, 9]] and took >= 0
    finally:
        process.stop()
    assert "chatter" in (program.parent / "echo.log").read_text(encoding="utf-8")


def test_a_runner_that_cannot_start_says_why(program: Path) -> None:
    process = runner(program, fault=True)
    with pytest.raises(arms.Unusable, match=r"^OSError: no such model$"):
        process.ready()
    process.stop()


def test_a_runner_that_dies_names_its_log(program: Path) -> None:
    program.write_text("import sys; sys.stdin.readline(); sys.exit(3)", encoding="utf-8")
    process = runner(program)
    with pytest.raises(arms.Unusable, match=r"ended with code 3; .*echo.log has the cause"):
        process.ready()
    process.stop()


def test_texts_of_another_length_are_no_measurement(program: Path) -> None:
    process = runner(program)
    try:
        process.ready()
        assert len(arms.Arm("echo", process).generate([[1, 2]], 4)[1][0]) == 4
        with pytest.raises(arms.Unusable, match=r"returned \[0\] tokens where 1 × 4"):
            arms.Arm("echo", process).generate([[]], 4)
    finally:
        process.stop()


def test_an_environment_is_made_once_and_anew_for_other_requirements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# nothing\n", encoding="utf-8")
    environment = Environment("empty", requirements, "20 MB", folder=tmp_path)
    assert environment.missing is not None
    assert environment.install() is None and environment.missing is None
    assert "installing" in capsys.readouterr().err
    assert environment.install() is None and capsys.readouterr().err == ""
    requirements.write_text(f"nothing @ file://{tmp_path}/missing.whl\n", encoding="utf-8")
    assert environment.missing is not None
    assert "missing.whl" in (environment.install() or "")
    assert "missing.whl" in (environment.missing or "")


def test_the_random_checkpoint_is_one_that_transformers_reads_whole(tmp_path: Path) -> None:
    workload = workloads.random_qwen3(tmp_path)
    model, found = AutoModelForCausalLM.from_pretrained(workload.directory, output_loading_info=True)
    assert not any(found.values())
    assert model.config.hidden_size == 256 and model.config.head_dim == 64
    assert {len(prompt) for prompt in workload.prompts} == {32} and len(workload.prompts) == max(workload.counts)
    # What a step reads is all but the input embedding, which is as large as the head.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert machine.weight_bytes(workload.directory, "float32") == 4 * (parameters - 8192 * 256)
    with safe_open(workload.directory / "model.safetensors", "pt") as file:
        first = file.get_tensor("lm_head.weight")
    shutil.rmtree(workload.directory)
    workloads.write_random(workload.directory)
    with safe_open(workload.directory / "model.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.weight").equal(first)


def test_prompts_are_the_ends_of_texts_behind_what_opens_every_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"<s>": 0, **{letter: 1 + i for i, letter in enumerate("abcdef")}}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert workloads._tokenised(tmp_path, ["a b c d e f", "a b", "f e d c"], 4, 2) == [[0, 4, 5, 6], [0, 5, 4, 3]]


def test_the_table_has_ratios_agreement_and_reasons() -> None:
    def point(arm: str, requests: int, speeds: list[float], texts: list[list[int]]) -> report.Point:
        return report.Point("w", arm, requests, speeds, texts)

    points = [
        point("ours", 1, [100, 300, 200], [[1, 2, 3, 4]]),
        point("ours", 2, [400], [[1, 2, 3, 4], [5, 5, 5, 5]]),
        point("vllm", 1, [50], [[1, 2, 3, 4]]),
        point("vllm", 2, [500], [[1, 2, 9, 4], [5, 5, 5, 5]]),
        point("lookup", 1, [80], [[1, 2, 3, 4]]),
    ]
    lines = report.records(points)
    assert [line["ours_over_this"] for line in lines] == [1.0, 1.0, 4.0, 0.8, 2.5]
    assert lines[3]["texts_as_ours"] == 1 and lines[3]["share_before_difference"] == 0.75
    shown = report.table("about", points, ["lookup"], {"llama.cpp": "not installed"})
    assert "| vllm | 50.0 (4.00 ×) | 500 (0.80 ×) | 1 of 2 |" in shown
    assert "| lookup | 80.0 (2.50 ×) | as at 1 | 1 of 1 |" in shown
    assert "Left out: llama.cpp (not installed)." in shown
