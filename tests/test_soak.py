"""Random kills of runs that go on in one and the same store."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from test_faults import Reference

from streamcnn.store import KINDS, FeatureStore

VARIANTS = ("covariance and linear", "randomized and nystroem")


class Soak:
    """Kills that accumulate on one store per variant, and damage now and then; goes on where an earlier one was stopped.

    Each round starts or resumes a run and kills it after a random time. Then the store opens, all its rows are right, and no shard that
    was finished is gone. A run that ends by itself has made the model of an undisturbed run; then something in the store is damaged or
    taken away, so that the next round has work.
    """

    def __init__(self, folder: Path, variant: str, seed: int = 0):
        shutil.rmtree(folder / "reference", ignore_errors=True)
        (folder / "reference").mkdir(parents=True)
        self.folder, self.seed, self.state_path = folder, seed, folder / "state.json"
        self.reference = Reference(folder / "reference", variant)
        shutil.rmtree(folder / "reference" / "store")
        started = time.monotonic()
        assert self.reference.run(folder / "reference").wait() == 0
        self.seconds = time.monotonic() - started
        (folder / "run").mkdir(exist_ok=True)
        self.state = {"kills": 0, "finished": 0, "shards": 0}
        if self.state_path.exists():
            self.state = json.loads(self.state_path.read_text())

    def round(self) -> None:
        """One run, killed or finished."""
        rng = random.Random(f"{self.seed} {self.state['kills']} {self.state['finished']}")
        run = self.folder / "run"
        child = self.reference.run(run)
        while not child.output.exists():  # it has begun
            time.sleep(0.001)
        # most runs shall be killed, and as each goes on where the one before was, they get everywhere
        child.process.join(rng.uniform(0, self.seconds / 2))
        killed = child.process.exitcode is None
        child.process.kill()
        child.process.join()
        if not killed:
            assert child.process.exitcode == 0, child.text
        child.output.unlink()
        if (run / "model.h5").exists():
            assert (run / "model.h5").read_bytes() == self.reference.model
        n_shards = self.reference.check_store(run)
        assert n_shards >= self.state["shards"]
        self.state["kills" if killed else "finished"] += 1
        self.state["shards"] = n_shards
        if not killed:
            assert n_shards == len(self.reference.hashes)
            (run / "model.h5").unlink()
            self.damage(run / "store", rng)
        # renamed into place: the soak itself may be killed
        temporary = self.state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state))
        temporary.replace(self.state_path)

    def damage(self, store: Path, rng: random.Random) -> None:
        """Make work for the next run: all of it, or what a damaged or missing part needs."""
        kind = rng.choice(["all", "all", "all", "all", "shards", "flip", "stage", "line"])
        shards = sorted([*(store / "features").glob("*.h5"), *(store / "reduced").glob("*.h5")])
        if kind == "all":
            shutil.rmtree(store)
        elif kind == "shards":
            for shard in rng.sample(shards, 2):
                shard.unlink()
        elif kind == "flip":
            shard = rng.choice(shards)
            content = bytearray(shard.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            shard.write_bytes(content)
        elif kind == "stage":
            rng.choice(sorted((store / "stages").glob("*.h5"))).unlink()
        else:
            manifest = store / "manifest.jsonl"
            manifest.write_bytes(manifest.read_bytes()[: -rng.randrange(1, 400)])
        if kind != "all":  # the store may now say that it is damaged, which resuming puts right
            child = self.reference.run(self.folder / "run")
            assert child.wait() == 0, child.text
            child.output.unlink()
            assert (self.folder / "run" / "model.h5").read_bytes() == self.reference.model
            with FeatureStore(store) as opened:
                self.state["shards"] = sum(len(opened.shards(kind)) for kind in KINDS)
        else:
            self.state["shards"] = 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_15_random_kills_leave_a_store_that_goes_on(variant, tmp_path):
    # a sample of `test_3000_random_kills`, on each variant
    soak = Soak(tmp_path, variant)
    while soak.state["kills"] < 15:
        soak.round()


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("variant", VARIANTS)
def test_3000_random_kills(variant, request):
    # stopped, the same command goes on; in STREAMCNN_SOAK, or pytest's cache folder
    parent = os.environ.get("STREAMCNN_SOAK") or request.config.cache.mkdir("soak")
    folder = Path(parent) / variant.replace(" ", "-")
    soak = Soak(folder, variant)
    while soak.state["kills"] < 3000 // len(VARIANTS):
        soak.round()
    print(f"\n{variant}: {soak.state['kills']} kills, {soak.state['finished']} runs finished between them")  # noqa: T201
    shutil.rmtree(folder)
