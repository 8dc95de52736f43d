"""A GGUF file becomes the checkpoint that it was made of, tokenizer and all; once, and whole or not at all."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

from engine.errors import LoadError
from engine.models import hub
from engine.types import PlanRow
from tests.engine.gemma import make_gemma
from tests.engine.helpers import load
from tests.engine.sentencepiece_bpe import pieces
from tests.engine.test_parity import close, logits, oracle, sequence, some_tokens

gguf = pytest.importorskip("gguf", reason="GGUF files are written and read by the gguf package (requirements/dev.txt)")

from engine.models.gguf import convert as conversion  # noqa: E402
from engine.models.gguf.convert import converted, kept, to_bfloat16  # noqa: E402
from server.chat import ChatTemplate  # noqa: E402
from server.tokenizer import Tokenizer  # noqa: E402
from tests.engine.gguf_files import bfloat16_weights, vocabulary, write_gguf  # noqa: E402

VOCAB = len(vocabulary())
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ODD_TEXTS = (
    "",
    " ",
    "the band and the thing",
    "a  b   c         d ",
    "\n\n\n\n\nab\n \n",
    "abababa the<b>  the</b>",
    "naïve café 🦙 \x00\x07 日本 \u2581 \u2581\u2581x",
    "  \n  the\t\tend",
)


def model(**options: Any) -> Gemma3ForCausalLM:
    """Sizes that every quantisation can hold, and what llama.cpp takes for granted of the family."""
    rope = {"full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0}}
    sizes: dict[str, Any] = {"hidden": 64, "layers": 7, "heads": 2, "kv_heads": 1, "head_dim": 32, "intermediate": 64}
    sizes |= {"pattern": 6, "query_scale": sizes["head_dim"], "rope": rope | {"sliding_attention": LOCAL_ROPE}}
    return bfloat16_weights(make_gemma(vocab=VOCAB, window=20, **(sizes | options)))


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def gemma() -> Gemma3ForCausalLM:
    torch.set_num_threads(1)
    return model()


@pytest.fixture(scope="module")
def file(gemma: Gemma3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gemma)


@pytest.fixture(scope="module")
def directory(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(file, cache=tmp_path_factory.mktemp("cache"), say=quiet)


def test_the_engine_decodes_it_as_the_model_that_was_written(gemma: Gemma3ForCausalLM, directory: Path) -> None:
    tokens = some_tokens(60, VOCAB)
    expected = oracle(gemma, tokens)
    close(logits(load(directory, dtype="float32"), PlanRow(sequence(tokens, range(4)), 0, 60)), expected)
    again = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    close(oracle(again, tokens), expected)


def test_bfloat16_weights_come_back_bit_for_bit(gemma: Gemma3ForCausalLM, directory: Path) -> None:
    """Norms too, although the file holds 1 + w."""
    tensors = load_file(directory / "model.safetensors")
    expected = {name: t for name, t in gemma.state_dict().items() if name != "lm_head.weight"}
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        if tensor.dim() == 1:  # 1 + w has lost what float32 does not hold beside the 1
            torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=2**-24)
        else:
            assert torch.equal(tensor.float(), expected[name]), name


@pytest.mark.parametrize("kinds", [("F16",), ("BF16",), ("Q8_0",), ("Q5_0", "Q4_0")], ids=str)
def test_quantised_files(kinds: tuple[str, ...], gemma: Gemma3ForCausalLM, tmp_path: Path) -> None:
    """Each number as near as its kind can be."""
    path = write_gguf(tmp_path / "quantised.gguf", gemma, kinds)
    tensors = load_file(converted(path, cache=tmp_path / "cache", say=quiet) / "model.safetensors")
    worst = {"F16": 2**-9, "BF16": 0.0, "Q8_0": 0.01, "Q5_0": 0.1, "Q4_0": 0.2}[kinds[-1]]
    for name, expected in gemma.state_dict().items():
        if expected.dim() > 1 and name != "lm_head.weight":
            assert (tensors[name].float() - expected).abs().max() <= worst * expected.abs().max(), name


def test_k_quants_as_llama_cpp_packs_them(tmp_path: Path) -> None:
    """The package quantises none of them: blocks of known bits, with values by ggml's own formula."""
    from engine.models.gguf.source import Source

    generator = np.random.default_rng(0)
    quants = generator.integers(0, 16, (8, 32))
    scales = generator.integers(0, 16, 8)  # below 16, a scale's and a minimum's upper bits are zero
    minima = generator.integers(0, 16, 8)
    packed = np.concatenate([scales[:4], minima[:4], (scales[4:] & 15) | (minima[4:] << 4)]).astype(np.uint8)
    low, high = quants[0::2], quants[1::2]  # two groups of 32 share 32 bytes
    block = np.float16([0.5, 0.25]).tobytes() + packed.tobytes() + (low | high << 4).astype(np.uint8).tobytes()
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "gemma3")
    row = np.frombuffer(block, np.uint8)[None]
    writer.add_tensor("x", row, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    (values,) = Source(tmp_path / "k.gguf").values("x")
    assert np.array_equal(values.reshape(8, 32), 0.5 * scales[:, None] * quants - 0.25 * minima[:, None])


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3e38])])
    assert to_bfloat16(values.numpy()) == values.bfloat16().view(torch.int16).numpy().tobytes()


def test_settings(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert config["rms_norm_eps"] == 1e-6
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [1, 5]
    template = ChatTemplate.load(directory)
    assert template is not None
    rendered = template.render([{"role": "user", "content": "the"}])
    assert rendered == "<bos><start_of_turn>user\nthe<end_of_turn>\n"
    assert Tokenizer.load(directory).encode(rendered, add_special_tokens=False)[:2] == [2, 4]
    assert "Gemma Terms of Use" in (directory / "NOTICE").read_text()


def odd_texts() -> Iterator[str]:
    yield from ODD_TEXTS
    generator = random.Random(0)
    parts = [*"abthe in", "  ", "the", "and", "\n", "\n\n", "é", "ü", "🦙", "<b>", "\u2581", "ing"]
    for _ in range(300):
        yield "".join(generator.choices(parts, k=generator.randrange(1, 40)))


def test_texts_become_the_tokens_that_sentencepiece_makes_and_come_back(directory: Path) -> None:
    tokenizer, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in odd_texts():
        ids = tokenizer.encode(text)
        assert ids == [2, *pieces(text, vocabulary())], text
        assert theirs(text).input_ids == ids, text
        assert tokenizer.decode(ids) == text.replace("\u2581", " "), text


def test_special_tokens(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("<start_of_turn>the<end_of_turn><eos>", add_special_tokens=False) == [
        *(4, tokenizer.encode("the")[-1], 5, 1)
    ]
    assert tokenizer.decode([2, 4, 5, 1]) == ""


def test_it_is_converted_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = hub.resolve(str(file), None)
    assert first.is_relative_to(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write", lambda *_: pytest.fail("converted twice"))
        assert hub.resolve(str(file), None) == first
    (first / "model.safetensors").unlink()
    said: list[str] = []
    assert converted(file, say=said.append) == first
    assert (first / "model.safetensors").exists()
    assert any("%" in line for line in said)


def test_what_a_killed_conversion_left_is_done_again(file: Path, tmp_path: Path) -> None:
    place = kept(file.name, conversion.digest_of(file), cache=tmp_path)
    partial = place.with_name(f".{place.name}.partial")
    for folder in (place, partial):
        folder.mkdir(parents=True)
        (folder / "rubbish").touch()
    assert not (converted(file, cache=tmp_path, say=quiet) / "rubbish").exists()
    assert not partial.exists()


def test_a_failed_conversion_leaves_nothing_to_serve(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(LoadError, match=r"cut\.gguf.*fetch it again"):
        converted(cut, cache=tmp_path / "cache", say=quiet)
    assert not list((tmp_path / "cache").rglob("config.json"))


@pytest.mark.parametrize("length", [4, 20, 100, 3000])
def test_damage_in_the_header(length: int, file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:length])
    with pytest.raises(LoadError, match=r"cut\.gguf.*fetch it again"):
        converted(tmp_path / "cut.gguf", cache=tmp_path / "cache", say=quiet)


def test_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(LoadError, match=r"zip\.gguf is no GGUF file"):
        hub.resolve(str(tmp_path / "zip.gguf"), None)
    (tmp_path / "file.bin").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match=r"\.gguf file"):
        hub.resolve(str(tmp_path / "file.bin"), None)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer__ggml__model": "gpt2"}, "tokenizer 'gpt2'"),
    ({"tokenizer__ggml__add_space_prefix": True}, "space prefix"),
    ({"gemma3__final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"gemma3__attention__value_length": 16}, "different lengths"),
    ({"gemma3__rope__scaling__type": "yarn"}, "yarn"),
    ({"gemma3__embedding_length": None}, "embedding_length is missing"),
    ({"gemma3__feed_forward_length": "many"}, "feed_forward_length must be int"),
    ({"gemma3__block_count": 9}, "blk.7.* is missing"),
    ({"gemma3__block_count": 1}, "has no place"),
    ({"split__count": 2}, "several parts"),
    ({"tokenizer__ggml__bos_token_id": 10**6}, "bos_token_id 1000000"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_converted_is_refused(
    changes: dict[str, Any], message: str, gemma: Gemma3ForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", gemma, **changes)
    with pytest.raises(LoadError, match=message) as caught:
        converted(path, cache=tmp_path / "cache", say=quiet)
    assert "odd.gguf" in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = model(layers=1)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(LoadError, match=r"output_norm\.weight.*not finite"):
        converted(write_gguf(tmp_path / "nan.gguf", broken), cache=tmp_path / "cache", say=quiet)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(LoadError, match="'llama' is not converted"):
        converted(tmp_path / "llama.gguf", cache=tmp_path / "cache", say=quiet)


def test_without_the_package(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(LoadError, match=r"requirements/real\.txt"):
        converted(file, cache=tmp_path, say=quiet)


def test_a_cache_that_cannot_be_written(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder would be")
    with pytest.raises(LoadError, match="XDG_CACHE_HOME"):
        converted(file, cache=tmp_path / "taken", say=quiet)
