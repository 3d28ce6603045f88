from __future__ import annotations

from pathlib import Path

import pytest

from raycloud.data.batches import Sample
from raycloud.data.tokens import TokenFile, token_table, write_tokens
from raycloud.errors import DataError


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    samples = [Sample((5, 6, 7), 1), Sample((8,), 0), Sample(tuple(range(100)), 40)]
    write_tokens(tmp_path / "tokens.arrow", [token_table(samples[:2]), token_table(samples[2:])])
    file = TokenFile(tmp_path / "tokens.arrow")
    assert [file[index] for index in range(len(file))] == samples
    assert file.lengths.tolist() == [3, 1, 100]
    assert file.targets.tolist() == [sample.targets for sample in samples]


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tokens.arrow"
    with pytest.raises(DataError, match="cannot read the tokens"):
        TokenFile(path)
    write_tokens(path, [token_table([Sample((1, 2), 0)] * 50)])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot read the tokens"):
        TokenFile(path)
