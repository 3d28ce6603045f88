"""Calibration of a model's cuts, its file, and its command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from raycloud.cli.split import app
from raycloud.data.batches import Sample
from raycloud.errors import DataError, LinkError, ModelError, StorageError
from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.link.codecs.fitting import FITTED
from raycloud.models.loading import load_tokenizer
from raycloud.models.segments import Segment
from raycloud.split.calibration import Calibration, calibrate, num_sink_positions
from raycloud.split.calibration_texts import MAX_TOKENS, load_calibration_texts
from tests.models.families import tiny

BLOCKS = 6


def texts(seed: int = 0, count: int = 30) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 20, (count,), generator=generator).tolist()
    return [Sample(tuple(torch.randint(3, 97, (n,), generator=generator).tolist()), 0) for n in lengths]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def made(model: PreTrainedModel) -> Calibration:
    return calibrate(model, texts(), (BLOCKS, 0, 2, 2))


@pytest.fixture
def file(made: Calibration, tmp_path: Path) -> Path:
    made.save(tmp_path / "cut.safetensors")
    return tmp_path / "cut.safetensors"


def test_cuts_are_those_asked_for(made: Calibration) -> None:
    assert made.cuts == (0, 2, BLOCKS)
    assert made.width == 32
    assert made.check(32, (2, 0)) is made


@pytest.mark.parametrize("cut", [0, 2, BLOCKS])
def test_hidden_states_of_other_texts_come_through(model: PreTrainedModel, made: Calibration, cut: int) -> None:
    """Codecs are fitted to exactly the hidden states sent there: before the block, and before the final norm."""
    ids = torch.tensor([texts(seed=1, count=1)[0].ids])
    with torch.no_grad():
        hidden = Segment(model, 0, cut, embed=True, head=False).hidden(ids)[0]
    for name, error in (("int8", 0.01), ("int4", 0.12), ("bfloat16", 0.004)):
        codec = made.cut_codec(name, cut)
        assert codec.name == name
        assert (codec.decode(codec.encode(hidden, 0), 0, len(hidden)) - hidden).norm() < error * hidden.norm()
        assert made.fitted[cut].choices.errors.get(name, 0.0) < error


def test_a_file_gives_the_same_bits(made: Calibration, file: Path) -> None:
    again = Calibration.load(file)
    assert again.fingerprint == made.fingerprint
    assert again.model == made.model
    hidden = torch.randn(9, 32)
    for name in FITTED:
        for cut in made.cuts:
            before, after = made.cut_codec(name, cut), again.cut_codec(name, cut)
            payload = before.encode(hidden, 0)
            assert torch.equal(payload, after.encode(hidden, 0))
            assert torch.equal(before.decode(payload, 0, 9), after.decode(payload, 0, 9))
            assert before.first == after.first


def test_the_fingerprint_tells_calibrations_apart(model: PreTrainedModel, made: Calibration) -> None:
    assert calibrate(model, texts(), (0, 2, BLOCKS)).fingerprint == made.fingerprint
    assert calibrate(model, texts(seed=5), (0, 2, BLOCKS)).fingerprint != made.fingerprint
    other = tiny("llama", dtype=torch.float32, seed=1)
    assert calibrate(other, texts(), (0, 2, BLOCKS)).model != made.model


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3"])
def test_every_family_has_cuts(family: str) -> None:
    found = calibrate(tiny(family, dtype=torch.float32), texts(), (0, 1, BLOCKS))
    assert found.fitted[1].choices.errors["int8"] < 0.02


def test_the_first_position_and_sinks_after_it_are_sent_apart(made: Calibration) -> None:
    assert made.cut_codec("int8", 2).first >= 1
    assert made.cut_codec("float16", 2).first == 0
    positions = torch.arange(12).repeat(5)
    hidden = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    assert num_sink_positions(hidden, positions) == 1
    hidden[positions == 2] *= 50
    assert num_sink_positions(hidden, positions) == 3
    hidden[positions == 5] *= 50
    assert num_sink_positions(hidden, positions) == 3


def test_the_old_file_stays_when_writing_fails(made: Calibration, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space"):
        made.save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("at", [3, 40, -1, -900])
def test_a_damaged_file_is_refused(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged or no calibration file") as caught:
        Calibration.load(file)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no calibration file at .*'raycloud split calibrate' makes one"):
        Calibration.load(tmp_path / "none")
    (tmp_path / "short").write_bytes(file.read_bytes()[:500])
    (tmp_path / "empty").write_bytes(b"")
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    save_file(load_file(file), tmp_path / "bare")
    for name in ("short", "empty", "weights", "bare"):
        with pytest.raises(ModelError, match="is damaged or no calibration file"):
            Calibration.load(tmp_path / name)


def test_what_it_has_not_is_named(made: Calibration) -> None:
    with pytest.raises(LinkError, match=r"no codec 'int3'; there are: float32, .*int8, int4$"):
        made.cut_codec("int3", 2)
    with pytest.raises(LinkError, match="cut 5 is not calibrated; this calibration has: 0, 2, 6"):
        made.cut_codec("int8", 5)
    with pytest.raises(LinkError, match="hidden states of 32 numbers, the model's have 576"):
        made.check(576, (2,))
    with pytest.raises(LinkError, match="cut 4 is not calibrated"):
        made.check(32, (2, 4))


def test_what_cannot_be_calibrated_is_named(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="cut 7 is not in this model; allowed: 0 to 6"):
        calibrate(model, texts(), (7,))
    with pytest.raises(DataError, match="too little text to calibrate on"):
        calibrate(model, texts(count=3), (1,))
    broken = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="hidden states at cut 3 are not all finite"):
        calibrate(broken, texts(), (1, 3))


def test_the_verb_writes_the_file_and_shows_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycloud.split.calibration.CALIBRATION_TOKENS", 800)
    out = tmp_path / "deep" / "codecs.safetensors"
    words = ["calibrate", "--model", str(tiny_llama), "--start-block", "1", "--end-block", "3", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    made = Calibration.load(out)
    assert made.cuts == (1, 3)
    assert isinstance(made.cut_codec("int4", 3), CutCodec)


def test_the_verb_refuses_cuts_the_model_has_not(tiny_llama: Path) -> None:
    words = ["calibrate", "--model", str(tiny_llama), "--start-block", "1", "--end-block", "5"]
    with pytest.raises(ModelError, match="end_block=5 is beyond the model's 4 blocks"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_calibration_texts_are_as_long_as_what_people_send(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    chats = load_calibration_texts(["builtin:instruct"], "test", tokenizer, 2000)
    joined = load_calibration_texts(["builtin:reviews"], "test", tokenizer, 2000)
    assert chats == load_calibration_texts(["builtin:instruct"], "test", tokenizer, 2000)
    assert tokenizer.decode(chats[0].ids).startswith("<|im_start|>system")
    for found in (chats, joined):
        lengths = [len(text.ids) for text in found]
        assert 2000 <= sum(lengths) < 2000 + MAX_TOKENS
        assert sum(lengths) / len(lengths) > 50
    both = load_calibration_texts(["builtin:instruct", "builtin:reviews"], "test", tokenizer, 2000)
    assert both[0] == chats[0]
    assert both[-1] in joined
