"""keysieve plugin build: the TensorRT plugin library of a bundle, or the custom ops of ONNX Runtime."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from keysieve.compiler.cli.arguments import add_library_options, add_quiet, given, progress_of
from keysieve.compiler.cli.terminal import UsageError, show, usage_errors
from keysieve.compiler.config import TensorRTConfig


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["build"], help="compile the kernels and the library; needs no GPU")
    parser.add_argument(
        "bundle", metavar="DIR", type=Path, nargs="?", help="for TensorRT: a bundle folder, made by `keysieve compile`"
    )
    parser.add_argument("--ort", action="store_true", help="for ONNX Runtime on a CPU; serves every bundle")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="the library (default: libkeysieve_tensorrt.so here; with --ort, where keysieve finds it)",
    )
    add_library_options(parser)
    add_quiet(parser)


def run(args: Namespace) -> int:
    """Print the library's path."""
    with usage_errors():
        options = TensorRTConfig(**given(args, "architectures", "aliased", "include"))
    if args.ort == (args.bundle is not None):
        raise UsageError("give either the bundle whose TensorRT library is wanted, or --ort")
    if args.ort:
        if options != TensorRTConfig():
            raise UsageError("--arch, --aliased and --tensorrt-include are for TensorRT; leave them out with --ort")
        from keysieve.plugins.onnxruntime.build import build_library

        with progress_of(args).stage("library"):
            output = build_library(args.output)
        show(str(output))
        return 0
    from keysieve.compiler.bundle import open_bundle
    from keysieve.compiler.tensorrt import write_library
    from keysieve.export.tensorrt import LIBRARY
    from keysieve.plugins.tensorrt.configuration import read_configuration

    configuration = read_configuration(open_bundle(args.bundle).model)
    output = args.output or Path(LIBRARY)
    write_library(configuration, options, output, progress_of(args))
    show(str(output))
    return 0
