"""What the command line takes: commands, flags and their values; a wrong one is a single line and exit code 2."""

import argparse
import contextlib
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

# enough for some of each digit, and an eighth to test on
_FEWEST_DEMO = 100
# of the commands that need something
_EXAMPLES = {
    "plan": "photos/",
    "fit": "photos/ --model photos.h5",
    "predict": "photos.h5 new/ --output labels.csv",
    "evaluate": "photos.h5 test/",
    "reproduce": "lee2017 CroppedYale/",
    "verify": "photos.h5",
    "info": "photos.h5",
    "report": "photos.store",
    "bench": "conv",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with an example of what is missing; argparse's usage of a command is a dozen lines."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        example = ""
        if message.startswith("the following arguments are required"):
            program, _, command = self.prog.partition(" ")
            example = f"; for example: {program} {command or 'fit'} {_EXAMPLES[command or 'fit']}"
        self.exit(2, f"{self.prog}: {message}{example}; all options: {self.prog} --help\n")

    def check_flags(self, words: Sequence[str]) -> None:
        """Refuse the first flag that is none of this parser's, with the nearest that is."""
        known = self._option_string_actions
        for word in takewhile(lambda word: word != "--", words):
            flag = word.partition("=")[0]
            # as argparse tells flags from values: -1 is a number
            if re.match("--?[A-Za-z]", flag) and " " not in word and flag not in known:
                # without dashes, which all have in common
                names = {name.strip("-"): name for name in known}
                near = [name for name in known if name.startswith(flag)] or difflib.get_close_matches(flag.strip("-"), names)
                self.error(f"unknown flag {flag}" + (f", perhaps --{near[0].strip('-')} is meant" if near else ""))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the program, or these. An unknown flag is named before what is missing: one may be the other, misspelt."""
    words, parser = sys.argv[1:] if words is None else list(words), build_parser()
    commands: Any = next(action.choices for action in parser._actions if action.dest == "command")
    before = list(takewhile(lambda word: word.startswith("-"), words))
    name, *rest = words[len(before) :] or [""]
    command = commands.get(name, parser)
    for speaker, flags in ((parser, before), (command, rest)):
        speaker.check_flags(flags)
    parsed, left = parser.parse_known_args(words)
    if left:
        command.error(f"unrecognized arguments: {' '.join(left)}")
    return parsed


def _name(text: str) -> str:
    """A file or folder; an empty text would be the current folder, or as if it was left away."""
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a file or folder, got ''")
    return text


def _number(*words: str) -> Callable[[str], float | str]:
    """A positive number, or one of the words."""

    def number(text: str) -> float | str:
        if text in words:
            return text
        with contextlib.suppress(ValueError):
            if 0 < float(text) < math.inf:
                return float(text)
        raise argparse.ArgumentTypeError(f"must be a positive number or {' or '.join(words)}, got {text!r}")

    return number


def _components(text: str) -> int | str:
    if text in ("auto", "none"):
        return text
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'must be a positive whole number, "auto" or "none", got {text!r}')
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def _demo_images(text: str) -> int:
    if not text.isdecimal() or int(text) < _FEWEST_DEMO:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {_FEWEST_DEMO}, got {text!r}")
    return int(text)


def _image_size(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"must look like 96x96 or 96x96x3, got {text!r}")
    return tuple(int(part) for part in text.split("x"))


def _common(parser: argparse.ArgumentParser, *, training: bool = False, data: bool = True) -> None:
    parser.add_argument("--memory-limit", metavar="SIZE", help='resident memory of the whole process, such as "1GiB"')
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, or naive (the slow reference)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads; all cores if left away")
    if training:
        parser.add_argument("--preset", metavar="NAME", help="fast, faces (for changing light), patches (natural images) or lee2017")
        parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of filters and of every choice of images (default 0)")
    if data:
        parser.add_argument("--images-key", metavar="KEY", help="data set of the images in an .h5 or .npz file")
        parser.add_argument("--labels-key", metavar="KEY", help="data set of the labels")
        parser.add_argument(
            "--skip-bad", action="store_true", help="leave out image files that cannot be read: at most 1 %% of them, or 3 of a few"
        )
        parser.add_argument(
            "--image-size",
            type=_image_size,
            metavar="HxW[xC]",
            help="resize image files, for example to 96x96 or 96x96x3; chosen in training where they are of several sizes",
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "values that override the preset's")
    group.add_argument("--n-components", type=_components, metavar="N", help='width after PCA: a number, "auto" or "none"')
    group.add_argument("--pca-solver", metavar="NAME", help="auto, covariance, randomized or incremental")
    group.add_argument("--kernel", metavar="NAME", help="auto, linear, rbf or nystroem")
    group.add_argument("--n-landmarks", type=int, metavar="N", help="of the RBF kernel beyond 20,000 images")
    group.add_argument("--C", type=_number("auto"), metavar="X", help='SVM penalty: a number or "auto"')
    group.add_argument("--gamma", type=_number("auto", "scale"), metavar="X", help='RBF width: a number, "auto" or "scale"')
    group.add_argument("--class-weight", choices=["balanced"], help="weigh classes by their frequency")
    group.add_argument(
        "--probability",
        action="store_true",
        help="train twice, the first time with images held out to calibrate on: the score of predict is then a probability",
    )
    group.add_argument("--feature-dtype", metavar="NAME", help="float16 or float32")
    group.add_argument("--mirror", choices=["auto", "yes", "no"], default="auto", help="whether an image and its mirror image are the same")
    group.add_argument(
        "--keep-features", choices=["auto", "yes", "no"], default="auto", help="keep feature rows on disk, or convolve again"
    )


def build_parser() -> _Parser:
    """All commands and flags."""
    from importlib.metadata import version

    parser = _Parser("streamcnn", description="train image classifiers on data larger than RAM, under a memory limit", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"streamcnn {version('streamcnn')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    demo = add("demo", "the whole job on digits enlarged to a data set twice the memory limit")
    _common(demo, training=True, data=False)
    demo.add_argument("--images", type=_demo_images, default=262_144, metavar="N", help="images to make (262,144 is 1 GiB)")

    plan = add("plan", "print what a fit would take; nothing is run")
    plan.add_argument("data", type=_name)
    _common(plan, training=True)
    _model_options(plan)

    fit = add("fit", "train a model")
    fit.add_argument("data", type=_name)
    fit.add_argument("--model", type=_name, required=True, metavar="M.h5", help="file to write")
    fit.add_argument("--store", type=_name, metavar="DIR", help="folder for features and finished stages, kept for later fits")
    fit.add_argument("--test", type=_name, metavar="DATA2", help="labelled images to evaluate the model on")
    fit.add_argument("--resume", action="store_true", help="continue an interrupted fit; refuses other data or parameters")
    fit.add_argument(
        "--search",
        metavar="TIME",
        help="such as 15min, 90s or 1h: spend half of it trying presets and sizes on a sample, then fit the best of them in the rest; "
        "with --preset, the sizes of that preset only",
    )
    fit.add_argument("--verify-data", action="store_true", help="reread the images of finished shards; refuses when they have changed")
    _common(fit, training=True)
    _model_options(fit)

    predict = add(
        "predict",
        "label images with a model: CSV of index, path, label, score; after fit --probability the score is the label's probability",
    )
    predict.add_argument("model", type=_name)
    predict.add_argument("data", type=_name, help="images with or without labels, a flat folder, or one image")
    predict.add_argument("--output", type=_name, metavar="FILE.csv", help="write there instead of to standard output")
    _common(predict)

    evaluate = add("evaluate", "accuracy and recall per class of a model on labelled images; with --json the confusion too")
    evaluate.add_argument("model", type=_name)
    evaluate.add_argument("data", type=_name)
    _common(evaluate)

    reproduce = add("reproduce", "the table of a paper")
    reproduce.add_argument("paper", choices=["lee2017"])
    reproduce.add_argument("folder", type=_name, help="the standard cropped Extended Yale B folder")
    reproduce.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds: mean and spread")
    reproduce.add_argument(
        "--baseline",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="also train what the paper compares with, in PyTorch: cnn (by back-propagation), frozen (a neural network on our filters)",
    )
    _common(reproduce, training=True, data=False)

    for name, text in (("verify", "check a store or a model against its checksums and hashes"), ("info", "describe a store or a model")):
        command = add(name, text)
        command.add_argument("path", type=_name)
        command.add_argument("--memory-limit", metavar="SIZE", help='resident memory of the whole process, such as "1GiB"')
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    report = add("report", "one self-contained HTML file about a store: plan and measurements, pictures, how to repeat it")
    report.add_argument("store", type=_name)
    report.add_argument("--output", type=_name, metavar="FILE.html", help="file to write; STORE.html beside the store if left away")
    report.add_argument(
        "--test", type=_name, metavar="DATA", help="labelled images for the confusion matrix, the most confused and the most certain"
    )
    _common(report)

    bench = add("bench", "measured figures of this machine")
    bench.add_argument("name", metavar="NAME", help="conv, io, pca, svm, rbf, pipeline, or all")
    bench.add_argument("--threads", type=int, metavar="N", help="threads of every library compared; all cores if left away")
    bench.add_argument("--repeats", type=int, default=9, metavar="N", help="repetitions, of which the median is taken")
    bench.add_argument("--shrink", type=int, default=1, metavar="N", help="divide the number of images, to try it out")
    bench.add_argument(
        "--rows", type=int, nargs="+", metavar="N", help="svm, rbf: numbers of rows, each a run (default 60000 and, with svm, 1000000)"
    )
    bench.add_argument("--images", nargs="+", metavar="FOLDER", help="svm, rbf, pipeline: class-per-folder images for training and test")
    bench.add_argument("--alone", action="store_true", help="svm, rbf: ours without its rivals")
    bench.add_argument("--landmarks", type=int, nargs="+", metavar="N", help="rbf: numbers of landmarks (default 2048 8192)")
    bench.add_argument("--emulate", metavar="CPU", help="avx2: hold every library to that instruction set")
    warmup = add("warmup", "compile the kernels now, into the cache on disk")
    for command in (bench, warmup):
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


__all__ = ["build_parser", "parse"]
