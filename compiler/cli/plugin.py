"""keysieve plugin build DIR: the TensorRT plugin library of a bundle."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from keysieve.compiler.cli.arguments import add_library_options, add_quiet, given, progress_of
from keysieve.compiler.cli.terminal import show, usage_errors
from keysieve.compiler.config import TensorRTConfig


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["build"], help="compile the kernels and the library; needs no GPU")
    parser.add_argument("bundle", metavar="DIR", type=Path, help="a bundle folder, made by `keysieve compile`")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="the library (default: libkeysieve_tensorrt.so here)"
    )
    add_library_options(parser)
    add_quiet(parser)


def run(args: Namespace) -> int:
    """Print the library's path."""
    with usage_errors():
        options = TensorRTConfig(**given(args, "architectures", "aliased", "include"))
    from keysieve.compiler.bundle import open_bundle
    from keysieve.compiler.tensorrt import write_library
    from keysieve.export.tensorrt import LIBRARY
    from keysieve.plugins.tensorrt.configuration import read_configuration

    configuration = read_configuration(open_bundle(args.bundle).model)
    output = args.output or Path(LIBRARY)
    write_library(configuration, options, output, progress_of(args))
    show(str(output))
    return 0
