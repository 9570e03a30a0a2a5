"""Mutated files: right result or an error of ours, see `fuzz.py`. The full 10,000: `pytest -m large tests/test_fuzz.py`."""

import numpy as np
import pytest
from fuzz import TARGETS, fuzz, summary
from mutations import lookup3, metadata_blocks

from streamcnn import FeatureStore

_QUICK = 10 * len(TARGETS)


@pytest.mark.parametrize("cases", [range(_QUICK), pytest.param(range(10_000), marks=pytest.mark.large)], ids=len)
def test_mutated_files_give_the_right_result_or_an_error_of_ours(tmp_path, cases):
    """No crash, no hang, no wrong rows or predictions, no other exception, nothing written elsewhere, 256 MiB and 5 seconds at most."""
    outcomes = fuzz(cases, 0, tmp_path)
    text = summary(outcomes)
    assert sorted(outcomes) == list(cases)
    assert "FINDING" not in "".join(outcomes.values()), text
    # both happen, for the kinds of files together
    assert 0.2 < sum(outcome == "right" for outcome in outcomes.values()) / len(cases) < 0.6, text


def test_the_fuzzer_notices_wrong_rows(tmp_path, monkeypatch):
    """Without the comparison of hashes, some of these mutations are read as rows or labels: the oracle sees it."""
    import fuzz as module

    module.make_seeds(tmp_path / "seeds")
    monkeypatch.setattr(FeatureStore, "_check_once", lambda store, entry: None)
    monkeypatch.setattr(FeatureStore, "verify", lambda store: [])
    swapped = [number for number in range(400) if TARGETS[number % len(TARGETS)] == "swapped shards"]
    with pytest.raises(module.WrongError, match="were read"):
        for number in swapped:
            module.run_case(number, 0, tmp_path / "seeds", tmp_path / "case")


def test_metadata_is_hashed_as_hdf5_does(tmp_path):
    """The checksum of each block of metadata of an HDF5 file is what the library wrote behind it."""
    with FeatureStore.create(tmp_path / "s") as store:
        store.append(np.ones((3, 2), np.float32), [0, 1, 2])
    data = (tmp_path / "s/features/00000.h5").read_bytes()
    blocks = metadata_blocks(data)
    assert len(blocks) == 4
    assert all(lookup3(data[start:end]) == int.from_bytes(data[end : end + 4], "little") for start, end in blocks)
