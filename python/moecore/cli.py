"""The command line: ``python -m moecore`` or ``moecore``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moecore
from moecore import _core
from moecore.models import MODELS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failed check, 2 for a bad request."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.cmake_dir or args.include_dir:
        path = moecore.cmake_dir() if args.cmake_dir else moecore.include_dir()
        if path is None:
            return _fail("this moecore is a source tree without the C++ package; install it: pip install .")
        print(path)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    run = {
        "demo": _demo,
        "bench": _bench,
        "tune": _tune,
        "show-config": _show_config,
        "collect-env": _collect_env,
        "explain": _explain,
    }
    return run[args.command](args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moecore", description="The Mixture-of-Experts data path on CPU and CUDA."
    )
    parser.add_argument("--version", action="version", version=f"moecore {moecore.__version__}")
    parser.add_argument(
        "--cmake-dir", action="store_true", help="print the directory of moecore-config.cmake"
    )
    parser.add_argument("--include-dir", action="store_true", help="print the directory of the C++ headers")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    layer = argparse.ArgumentParser(add_help=False)
    layer.add_argument(
        "--model", choices=MODELS, default="qwen3-30b-a3b", help="whose expert layer (%(default)s)"
    )
    layer.add_argument(
        "--tokens", type=_natural, default=64, metavar="T", help="tokens in the batch (%(default)s)"
    )
    layer.add_argument(
        "--dtype", choices=("bf16", "f16", "f32"), default="bf16", help="of weights and activations"
    )

    demo = commands.add_parser(
        "demo",
        parents=[layer],
        help="run one full-size expert layer, time its stages, check the result against float64",
        description="Runs one full-size expert layer with random weights on the best device: stage by stage "
        "through the public ops, then fused. Prints time, GB/s, GFLOP/s and the share of the measured roof "
        "of every stage, and checks sampled tokens against a float64 computation.",
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="keep this share of the weights: fewer experts, then narrower ones",
    )
    demo.add_argument("--threads", type=_natural, default=0, help="CPU threads; 0 takes every available CPU")

    _add_bench(commands)
    _add_tune(commands)

    commands.add_parser("show-config", help="print what this build and this machine offer")
    commands.add_parser("collect-env", help="print what a bug report should contain")

    explain = commands.add_parser(
        "explain",
        parents=[layer],
        help="print which kernel an op would take and why",
        description="Prints which kernel and policy an op takes for the shapes of a model's expert layer, "
        "and why. Nothing runs.",
    )
    explain.add_argument("op", choices=moecore.OPS, metavar="OP", help=", ".join(moecore.OPS))
    explain.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure every op and the layer beside other libraries and the roof",
        description="Measures ops and layers on named cases: model x tokens x type. Every result is first "
        "checked against float64, then timed with rotated inputs (CUDA: graph replay), beside the peers that "
        "are installed, and held against the roof measured in the same run.",
    )
    bench.add_argument("--quick", action="store_true", help="one model, two batches: a minute")
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    names = {"metavar": "A,B", "default": ""}
    bench.add_argument("--op", help="ops, comma-separated (all)", **names)
    bench.add_argument("--model", help=f"of {', '.join(MODELS)}", **names)
    bench.add_argument("--tokens", help="tokens in a batch, comma-separated", **names)
    bench.add_argument("--dtype", help="element types and formats, comma-separated", **names)
    bench.add_argument(
        "--routing",
        choices=("uniform", "zipf", "one_hot"),
        default="uniform",
        help="how tokens fall on experts; one_hot: all on the same",
    )
    bench.add_argument(
        "--peers", default="auto", metavar="auto|none|LIST", help="other libraries to measure beside moecore"
    )
    bench.add_argument(
        "--peers-dir", type=Path, metavar="DIR", help="their binaries, where they are not installed"
    )
    bench.add_argument("--seconds", type=float, metavar="S", help="time for one measurement")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines")
    inner = bench.add_subparsers(dest="bench_command", metavar="compare", title="comparison")
    compare = inner.add_parser("compare", help="ratios of two result files; exit 1 on a regression")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument(
        "--threshold", type=float, default=0.05, metavar="X", help="tolerated slowdown (%(default)s)"
    )


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="search the launch policies of an op on this GPU",
        description="Tries the launch policies of an op on this GPU, prints what it would change, and writes "
        "a file that the environment variable MOECORE_TUNING makes every process load.",
    )
    tune.add_argument("op", nargs="?", metavar="OP", help="route, plan, finalize, grouped_gemm.up, ...")
    tune.add_argument("--model", default="qwen3-30b-a3b", metavar="A,B", help="(%(default)s)")
    tune.add_argument("--tokens", default="1,16,64,256,1024,4096", metavar="A,B", help="(%(default)s)")
    tune.add_argument("--dtype", default="", metavar="TYPE", help="instead of the op's usual one")
    tune.add_argument("--seconds", type=float, default=60, metavar="S", help="of search (%(default)s)")
    tune.add_argument(
        "--threshold", type=float, default=0.03, metavar="X", help="least gain that counts (%(default)s)"
    )
    tune.add_argument("--out", type=Path, metavar="FILE", help="write the policies that pay")
    tune.add_argument("--check", type=Path, metavar="FILE", help="only read a file as the library would")


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _demo(args: argparse.Namespace) -> int:
    try:
        from moecore import demo
    except ModuleNotFoundError as error:
        return _fail(f"the demo needs {error.name}: pip install {error.name}")
    try:
        return demo.run(args.model, args.tokens, args.dtype, args.device, args.scale, args.threads)
    except (demo.DemoError, ValueError) as error:
        return _fail(str(error))


def _bench(args: argparse.Namespace) -> int:
    try:
        from moecore._arrays import DeviceMissingError
        from moecore.bench import cases, compare, harness
    except ModuleNotFoundError as error:
        return _fail(f"bench needs {error.name}: pip install {error.name}")
    try:
        if args.bench_command == "compare":
            return compare.compare(args.before, args.after, args.threshold)
        selection = cases.Selection(
            ops=_among("--op", args.op, cases.OPS),
            models=_among("--model", args.model, list(MODELS)),
            tokens=[_natural(count) for count in args.tokens.split(",") if count],
            dtypes=_among("--dtype", args.dtype, cases.all_dtypes()),
            routing=args.routing,
            quick=args.quick,
        )
        return harness.run(
            harness.Request(selection, args.device, args.peers, args.peers_dir, args.seconds, args.out)
        )
    except (DeviceMissingError, OSError, ValueError, argparse.ArgumentTypeError) as error:
        return _fail(f"bench: {error}")


def _tune(args: argparse.Namespace) -> int:
    try:
        if args.check is not None:
            print(f"{args.check}: {_core.check_tuning(str(args.check))} policies")
            return 0
        from moecore._arrays import DeviceMissingError
        from moecore.bench import tune
    except ModuleNotFoundError as error:
        return _fail(f"tune needs {error.name}: pip install {error.name}")
    except ValueError as error:
        return _fail(f"tune: {error}")
    if args.op is None:
        return _fail(f"tune: no op, expected one of {', '.join(tune.OPS)}")
    try:
        models = _among("--model", args.model, list(MODELS))
        tokens = [_natural(count) for count in args.tokens.split(",") if count]
        return tune.run(args.op, models, tokens, args.dtype, args.seconds, args.threshold, args.out)
    except (DeviceMissingError, OSError, ValueError, argparse.ArgumentTypeError) as error:
        return _fail(f"tune: {error}")


def _among(option: str, names: str, known: Sequence[str]) -> list[str]:
    """A comma-separated option; ValueError with the choices for a name that is not one."""
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        if name not in known:
            raise ValueError(f"{option}: {name} is unknown, expected some of {', '.join(known)}")
    return chosen


def _show_config(args: argparse.Namespace) -> int:
    del args
    moecore.show_config()
    return 0


def _collect_env(args: argparse.Namespace) -> int:
    del args
    from moecore.collect_env import collect_env

    print(collect_env())
    return 0


def _explain(args: argparse.Namespace) -> int:
    try:
        from moecore import demo
        from moecore._arrays import DeviceMissingError
    except ModuleNotFoundError as error:
        return _fail(f"explain needs {error.name}: pip install {error.name}")
    try:
        print(demo.explain(args.op, args.model, args.tokens, args.dtype, args.device), end="")
    except (DeviceMissingError, NotImplementedError, moecore.BackendError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"moecore: {message}", file=sys.stderr)
    return 2
