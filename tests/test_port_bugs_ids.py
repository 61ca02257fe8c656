"""Bugs that ports of Gemma have had with ids: beginning, end, and rows that are no piece.

One test for each, named after its row in our list of known bugs, see `test_port_bugs.py`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refimpl_weights import synthetic_gguf, synthetic_tokenizer
from refimpl_weights.gguf import GGUFFile

from refimpl.engine.engine import Engine, EngineOptions
from refimpl.engine.request import SamplingParams
from refimpl.errors import CheckpointError, InvalidRequestError
from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.gemma import load_checkpoint
from refimpl.model.gguf_config import from_gguf
from refimpl.model.hf_config import from_hugging_face, to_hugging_face
from refimpl.model.numerics import FLOAT32
from refimpl.model.tokenizer import Tokenizer
from refimpl.model.variants import VARIANTS
from tests.tiny_models import TinyModel
from tests.tiny_variations import text_tensors, traced, write_folder

BOS, EOS, END_OF_TURN = 2, 1, synthetic_tokenizer.END_OF_TURN
SUPPRESSED = 77


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Metadata of a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return GGUFFile(synthetic_gguf.write_gguf(path, architecture="gemma3")).metadata


@pytest.fixture(scope="module")
def tokenizers(
    gguf: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tokenizer]:
    """The tiny tokenizer as each kind of file has it, with what the file says of <bos>."""
    file = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
    file.write_text(json.dumps(synthetic_tokenizer.tokenizer_json()))
    assert "TemplateProcessing" in file.read_text()  # Hugging Face's own way to put <bos> in front.
    forgetful = {**gguf, "tokenizer.ggml.add_bos_token": False}
    return {
        "tokenizer.json": Tokenizer.from_file(file),
        "GGUF": Tokenizer.from_gguf(gguf),
        "GGUF without": Tokenizer.from_gguf(forgetful),
    }


@pytest.mark.parametrize("source", ["tokenizer.json", "GGUF", "GGUF without"])
def test_row_16_bos_comes_exactly_once(tokenizers: dict[str, Tokenizer], source: str) -> None:
    """<bos> missing, which takes Gemma 7B's perplexity from 3.5 to 6e9 (lm-evaluation-harness
    #1465); or twice, where a chat template had put one (ollama #15252 and #16367).
    """
    tokenizer = tokenizers[source]
    plain = tokenizer.encode("the end", add_bos=False)
    assert BOS not in plain
    assert tokenizer.encode("the end") == [BOS, *plain]
    templated = "<bos><start_of_turn>user\nthe end<end_of_turn>\n"
    assert tokenizer.encode(templated, parse_special=True).count(BOS) == 1
    assert tokenizer.encode(templated, parse_special=True)[0] == BOS


def rigged_folder(folder: Path) -> Path:
    """A model that wants to say a row that is no piece, then a suppressed one, then <end_of_turn>,
    whatever it reads.

    With nothing but zeros in its layers, a token's logit is proportional to its embedding here.
    """
    tensors = {k: np.zeros_like(a) for k, a in text_tensors("gemma3_multimodal", layers=1).items()}
    table = tensors["embed_tokens.weight"]
    assert table.shape == (synthetic_tokenizer.NUM_PIECES + 64, 32)
    table[:] = 0.5
    table[END_OF_TURN] = 1.0
    table[SUPPRESSED] = 1.5
    table[synthetic_tokenizer.NUM_PIECES :] = 2.0
    write_folder(folder, "gemma3_multimodal", tensors)
    place = folder / "generation_config.json"
    generation = json.loads(place.read_text())
    place.write_text(json.dumps({**generation, "suppress_tokens": [SUPPRESSED]}))
    return folder


@pytest.fixture(scope="module")
def rigged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    gemma = load_checkpoint(rigged_folder(tmp_path_factory.mktemp("rigged")))
    with Engine(gemma, EngineOptions(slots=1, compile_at_start=False)) as engine:
        yield engine


def test_row_17_every_variant_has_all_its_end_ids() -> None:
    """<end_of_turn> left out of the ids that end a text, so that a chat model talks on (trl #7228).
    Some models name it in `generation_config.json` alone.
    """
    released = {"gemma-2-9b": [1, 107], "gemma-3-1b": [1, 106], "gemma-3-4b": [1, 106]}
    for variant, ids in released.items():
        text = {**to_hugging_face(VARIANTS[variant]), "eos_token_id": 1}
        assert from_hugging_face(text).eos_ids == (1,)
        assert from_hugging_face(text, generation={"eos_token_id": ids}).eos_ids == tuple(ids)
        assert from_hugging_face({**text, "eos_token_id": ids}).eos_ids == tuple(ids)
    text = to_hugging_face(VARIANTS["gemma-3-4b"])
    nested = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    assert from_hugging_face(nested).eos_ids == (1, 106)


def test_row_17_end_ids_of_a_gguf_file(gguf: Mapping[str, Any]) -> None:
    """The same, where the file calls it `eot`, the end of a turn."""
    assert from_gguf(gguf, vocab_size=512).eos_ids == (EOS, END_OF_TURN)
    pretrained = {key: value for key, value in gguf.items() if "eot" not in key}
    assert from_gguf(pretrained, vocab_size=512).eos_ids == (EOS,)


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("generation_config.json", {"eos_token_id": 1}, {EOS}),
        ("generation_config.json", {"eos_token_id": [EOS, END_OF_TURN]}, {EOS, END_OF_TURN}),
        ("config.json", {"eos_token_id": [EOS, END_OF_TURN]}, {EOS, END_OF_TURN}),
        ("tokenizer_config.json", {"chat_template": "{{ bos_token }}"}, {EOS, END_OF_TURN}),
        ("tokenizer_config.json", {"eos_token": "<end_of_turn>"}, {EOS, END_OF_TURN}),
        ("chat_template.jinja", {}, {EOS, END_OF_TURN}),
    ],
)
def test_row_17_end_ids_are_those_of_all_files(
    file: str, changes: Mapping[str, Any], expected: set[int], tmp_path: Path
) -> None:
    """The same, through the files of a folder."""
    folder = rigged_folder(tmp_path)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": EOS}))
    place = folder / file
    present = json.loads(place.read_text()) if place.exists() else {}
    place.write_text(json.dumps({**present, **changes}))
    assert set(load_checkpoint(folder).eos_ids) == expected


def test_row_17_generation_stops_at_the_end_of_a_turn(rigged: Engine) -> None:
    """The same, where it has to reach the engine."""
    assert rigged.gemma.eos_ids == (EOS, END_OF_TURN)
    [choice] = rigged.complete([BOS, 300], SamplingParams(max_tokens=4, temperature=0)).choices
    assert choice.token_ids == (END_OF_TURN,)
    assert (choice.text, choice.finish_reason, choice.stop) == ("", "stop", END_OF_TURN)


def test_suppressed_ids_are_never_drawn(rigged: Engine) -> None:
    """Gemma 4 12B says so of its pieces for images and sound; a draw of nothing else is refused."""
    assert rigged.gemma.suppressed_ids == (SUPPRESSED,)
    for params in (
        SamplingParams(max_tokens=31, temperature=2.0, seed=3, ignore_eos=True, logprobs=1),
        SamplingParams(max_tokens=4, temperature=0, logit_bias={SUPPRESSED: 100.0}, logprobs=1),
    ):
        [choice] = rigged.complete([BOS, 300], params).choices
        assert SUPPRESSED not in choice.token_ids
        # The model's own opinion stays what it is.
        assert choice.logprobs is not None
        assert choice.logprobs[0].top[0][0] == SUPPRESSED
    with pytest.raises(InvalidRequestError, match="leave no token to draw"):
        rigged.complete([BOS], SamplingParams(max_tokens=1, allowed_token_ids=(SUPPRESSED,)))


@pytest.mark.parametrize("ids", [[600], ["7"], 7, [True]])
def test_suppressed_ids_that_are_none_are_refused(ids: Any, tmp_path: Path) -> None:
    folder = rigged_folder(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": ids}))
    with pytest.raises(CheckpointError, match=r"suppress_tokens must be a list of ids in 0\.\.575"):
        open_checkpoint(folder)


def test_row_29_rows_without_a_piece_are_never_sampled(rigged: Engine) -> None:
    """Padding rows of the embedding drawn: Gemma 3 4B has 262,208 rows for 262,144 pieces, and the
    last 64 are random (transformers `convert_gemma3_weights_orbax_to_hf.py`).
    """
    gemma, pieces = rigged.gemma, synthetic_tokenizer.NUM_PIECES
    assert (gemma.vocab_size, gemma.config.vocab_size) == (pieces, pieces + 64)
    model = TinyModel(gemma.config, FLOAT32, gemma.graph, gemma.parameters)
    logits = np.asarray(traced(model)(np.array([[BOS, 300]]), np.array([[0, 1]]))[0])
    assert (logits.argmax(axis=-1) >= pieces).all()  # What the bug would say, at every place.

    for temperature in (0.0, 2.0):
        params = SamplingParams(max_tokens=31, temperature=temperature, seed=1, ignore_eos=True)
        [choice] = rigged.complete([BOS, 300], params).choices
        assert len(choice.token_ids) == 31
        assert max(choice.token_ids) < pieces
        assert (set(choice.token_ids) == {END_OF_TURN}) == (temperature == 0)
