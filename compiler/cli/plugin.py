"""keysieve plugin build DIR: the TensorRT plugin library of a bundle's model."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from keysieve.compiler.cli.arguments import add_quiet, positive_list, progress_of
from keysieve.compiler.cli.terminal import show
from keysieve.kernels.triton.aot import ARCHITECTURES


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["build"], help="compile the kernels and the library; needs no GPU")
    parser.add_argument("bundle", metavar="DIR", type=Path, help="a bundle folder, made by `keysieve compile`")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="the library (default: libkeysieve_tensorrt.so in DIR)"
    )
    parser.add_argument(
        "--arch",
        metavar="SM,...",
        type=positive_list,
        default=list(ARCHITECTURES),
        help=f"GPU architectures (default: {','.join(map(str, ARCHITECTURES))}); PTX for all others comes with 80",
    )
    parser.add_argument(
        "--tensorrt-include", metavar="DIR", type=Path, help="compile against TensorRT's official headers in DIR"
    )
    parser.add_argument(
        "--no-alias",
        dest="aliased",
        action="store_false",
        help="do not declare the caches' outputs as aliases of the inputs: smaller plan, caches to be bound in place",
    )
    add_quiet(parser)


def run(args: Namespace) -> int:
    """Print the library's path."""
    from keysieve.export.tensorrt import LIBRARY
    from keysieve.kernels.triton.aot import build
    from keysieve.plugins.tensorrt.build import build_library
    from keysieve.plugins.tensorrt.configuration import read_configuration

    progress = progress_of(args)
    configuration = read_configuration(args.bundle / "model.onnx")
    with progress.stage("kernels") as stage:
        artifacts = build(configuration, args.arch)
        stage.note(f"{len(artifacts)} for sm_{', sm_'.join(map(str, args.arch))}")
    with progress.stage("library") as stage:
        output = args.output or args.bundle / LIBRARY
        build_library(configuration, artifacts, output, aliased=args.aliased, tensorrt_include=args.tensorrt_include)
        stage.note(f"{output.stat().st_size / 1e3:,.0f} kB")
    show(str(output))
    return 0
