"""`streamcnn bench` and `streamcnn warmup`."""

import json
import subprocess
import sys

import numpy as np
import pytest

from streamcnn import bench
from streamcnn.cli import main
from streamcnn.errors import ParameterError
from streamcnn.kernels import cpu, jit, peak
from streamcnn.warmup import compile_kernels


@pytest.fixture
def tiny(monkeypatch):
    """One small case of each kind, and a latency that is not measured: it trains two models."""
    cases = (bench.ConvCase("first", 16, (8, 8, 1), 5, 3), bench.ConvCase("second", 17, (6, 6, 4), 6, 3, deep=True))
    monkeypatch.setattr(bench, "CONV_CASES", cases)
    monkeypatch.setattr(bench, "_latency_ms", lambda kernel, *_: {"linear": 0.5, "rbf": 0.7}[kernel])


def test_bench_conv_prints_one_object_of_the_documented_keys(tiny, capsys):
    """`bench conv --json` at tiny size: every key there, rates positive, ratios those of the rates."""
    assert main(["bench", "conv", "--threads", "1", "--repeats", "2", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["benchmarks"] == ["conv"] and result["threads"] == 1 and result["emulate"] is None and result["seconds"] > 0
    conv = result["conv"]
    assert conv["latency_ms"] == {"linear": 0.5, "rbf": 0.7} and conv["peak_gflops"] > 0
    assert [(row["use"], row["shape"], row["deep"]) for row in conv["rows"]] == [
        ("first", "16 x 8 x 8 x 1 -> 5, 3 x 3", False),
        ("second", "17 x 6 x 6 x 4 -> 6, 3 x 3", True),
    ]
    for row in conv["rows"]:
        assert row["gflops"] > 0 and row["sgemm_gflops"] > 0
        assert row["peak_fraction"] == pytest.approx(row["gflops"] / conv["peak_gflops"])
        if result["versions"]["torch"] is None:
            assert row["torch_gflops"] is None and row["ratio"] is None
        else:
            assert row["ratio"] == pytest.approx(row["gflops"] / max(row["torch_gflops"].values()))
    assert ("PyTorch is not installed" in printed.err) == (result["versions"]["torch"] is None)
    assert "| first | 16 x 8 x 8 x 1 -> 5, 3 x 3 |" in printed.err


def test_bench_without_pytorch_gives_our_own_figures(tiny, monkeypatch):
    """Where PyTorch cannot be imported its figures are null, the summary says so, and ours are there."""
    monkeypatch.setitem(sys.modules, "torch", None)
    result = bench.run_benchmarks("conv", 1, 1)
    row = result["conv"]["rows"][0]
    assert row["torch_gflops"] is row["torch_float32_gflops"] is row["ratio"] is row["ratio_float32"] is None
    assert result["conv"]["ratio_first_layers"] is None and row["gflops"] > 0
    assert "pip install" in bench.report(result)


def test_ratios_are_to_the_best_rival(tiny, monkeypatch):
    """`ratio` is to the faster layout, `ratio_float32` to the fastest of all, their mean is geometric over first layers."""
    seconds = {"ours": 1.0, "sgemm": 1.0, "NCHW": 4.0, "channels_last": 3.0, "NCHW float32": 5.0, "channels_last float32": 2.0}
    monkeypatch.setattr(bench, "torch_with", lambda n_threads: FakeTorch)
    monkeypatch.setattr(bench, "_torch_works", lambda *_: ({"NCHW": None, "channels_last": None}, dict.fromkeys(list(seconds)[4:])))

    def medians(works, repeats):
        works["ours"]()
        works["peak"]()
        return seconds

    monkeypatch.setattr(bench, "medians", medians)
    monkeypatch.setattr(bench, "_check_result", lambda *_: None)
    result = bench.conv(1, 1, 1)
    assert [(row["ratio"], row["ratio_float32"]) for row in result["rows"]] == [(3.0, 2.0)] * 2
    assert result["ratio_first_layers"] == pytest.approx(3.0) and result["ratio_float32_first_layers"] == pytest.approx(2.0)


class FakeTorch:
    """Stands for PyTorch where it is not called."""


def test_bench_io_measures_the_whole_and_its_parts(capsys):
    """`bench io --json` at small size: the parts are shorter than the whole, ratios are those of the seconds, the table names all."""
    assert main(["bench", "io", "--repeats", "1", "--shrink", "25", "--json"]) == 0
    printed = capsys.readouterr()
    io = json.loads(printed.out)["io"]
    assert (io["images"], io["shape"], io["features"]) == (2048, [32, 32, 3], 7 * 7 * 64)
    assert set(io["limited_seconds"]) == {"512 MiB", "unlimited"}
    assert io["speed_under_limit"] == pytest.approx(io["limited_seconds"]["unlimited"] / io["limited_seconds"]["512 MiB"])
    parts = io["parts_seconds"]
    assert io["overlap"] == pytest.approx(io["extract_seconds"] / max(parts["convolve"], parts["read"] + parts["write"]))
    assert min(parts.values()) > 0
    assert io["start_seconds"] > 0.1  # a process that imports numpy and numba takes longer
    assert f"starts its first chunk {io['start_seconds']:.1f} s after the command" in printed.err
    if io["torch_seconds"]:
        assert io["ratio"] == pytest.approx(min(io["torch_seconds"].values()) / io["extract_seconds"])
    assert "| only convolve |" in printed.err


def test_bench_pca_prints_a_row_for_each_contestant(capsys):
    """`bench pca --json` at small size: both solvers beside IncrementalPCA, and their table."""
    assert main(["bench", "pca", "--repeats", "1", "--shrink", "40", "--json"]) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["pca"]["rows"]
    engines = [row["engine"].split("(")[0] for row in rows]
    assert engines == [
        "streamcnn covariance",
        "IncrementalPCA",
        "streamcnn randomized",
        "IncrementalPCA",
    ]  # its batch sizes are one at this size
    assert all(row["captured"] > 0.9999 for row in rows if row["engine"].startswith("streamcnn"))
    assert "| streamcnn randomized | 2,000 x 307 -> 76 |" in printed.err


def test_unknown_benchmarks_and_cpus_are_refused_by_name(capsys):
    """A name that is no benchmark (yet), no emulated CPU, or no number of repetitions, is one clear sentence."""
    assert main(["bench", "gpu"]) == 1
    assert "the benchmark must be one of conv, io, pca, svm, rbf, pipeline, all, got 'gpu'" in capsys.readouterr().err
    assert main(["bench", "pca", "--rows", "5000"]) == 1
    assert (
        "--rows and --alone are for bench svm and rbf, --landmarks for bench rbf, --images for these and pipeline, without --emulate; "
        "got them for bench pca" in capsys.readouterr().err
    )
    assert main(["bench", "svm", "--rows", "5000", "0"]) == 1
    assert "--rows must be at least 1000, got 0" in capsys.readouterr().err
    assert main(["bench", "conv", "--emulate", "sse2"]) == 1
    assert "--emulate must be one of avx2, got 'sse2'" in capsys.readouterr().err
    assert main(["bench", "conv", "--repeats", "0"]) == 1
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="must be one of conv, io, pca, svm, rbf, pipeline, all, got 'gpu'"):
        bench.emulated("avx2", "gpu", 1, 1, 1)


def test_emulation_runs_a_child_held_to_the_older_cpu(monkeypatch):
    """The child gets the environment that holds every library back, and its object is passed on, marked."""
    seen = {}

    def run(command, env, **_):
        seen.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 0, '{"threads": 2, "emulate": null}', "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench.platform, "machine", lambda: "x86_64")
    assert bench.emulated("avx2", "conv", 2, 3, 4) == {"threads": 2, "emulate": "avx2"}
    assert seen["command"][1:] == ["-m", "streamcnn", "bench", "conv", "--json", *"--threads 2 --repeats 3 --shrink 4".split()]
    expected = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    assert expected.items() <= seen["env"].items()


def test_peak_counts_the_multiply_adds_it_makes():
    """Every chain of every lane makes its steps: the sum of their ends is there, and two operations a step are counted."""
    positions, filters, lanes = cpu.TILE.dtype["accumulators"].shape
    chains = positions * filters
    numbers = np.array([*range(chains), 0.5, 3.0], np.float32)
    assert peak._peak_worker(2, numbers, cpu.TILE) == 2 * 2 * chains * lanes
    # r <- r / 2 + 3 twice is r / 4 + 4.5
    assert numbers[:lanes].tolist() == [sum(r / 4 + 4.5 for r in range(chains))] * lanes
    assert peak.multiply_add_rate(2, 100) > 0


def test_warmup_leaves_nothing_to_compile():
    """After it every kernel on disk's list is compiled, and convolving other sizes and types compiles no more."""
    result = compile_kernels()
    assert result["seconds"] > 0 and result["compiled"] + result["cached"] >= len(jit.CACHED) > 0
    before = [len(kernel.signatures) for kernel in jit.CACHED]
    assert all(count > 0 for count in before)
    images, filters = np.zeros((20, 9, 9, 3), np.float32), np.zeros((7, 3, 3, 3), np.float32)
    edges, out = np.arange(8), np.empty((20, 7, 7, 14), np.float32)
    scratch = np.empty((2, cpu.conv_scratch((9, 9, 3), filters.shape, out.shape[1:], 0)), np.float32)
    cpu.conv_layer(images, filters, np.zeros(7, np.float32), 1, 0, 3, 0.5, 1, edges, edges, scratch, out)
    assert [len(kernel.signatures) for kernel in jit.CACHED] == before


def test_warmup_command_prints_seconds_and_folder(capsys):
    """`warmup --json`: seconds, numbers of kernels, cache folder."""
    assert main(["warmup", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"seconds", "compiled", "cached", "cache"} and result["seconds"] > 0
