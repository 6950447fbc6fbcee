"""The command line's grammar: the verbs and the options that all of them share."""

from argparse import SUPPRESS, ArgumentParser

from keysieve.compiler.cli import calibrate, compare, compile, doctor, inspect, models, plugin, remember, run
from keysieve.version import __version__

VERBS = {
    "calibrate": (calibrate, "measure where a model's queries point, on text"),
    "compile": (compile, "turn a model into an engine that evicts its own cache"),
    "inspect": (inspect, "show which layers match, or what a bundle holds"),
    "models": (models, "show the architectures that were tested, and what came of it"),
    "run": (run, "generate text with a bundle"),
    "compare": (compare, "measure what eviction costs on text"),
    "remember": (remember, "measure what an engine still knows after eviction"),
    "plugin": (plugin, "build the TensorRT plugin library of a bundle"),
    "doctor": (doctor, "show what is installed, and what can be built and run here"),
}


def build_parser() -> ArgumentParser:
    """Parsed arguments carry `run`, the verb's function, and `debug`."""
    parser = ArgumentParser(
        prog="keysieve",
        description="Compiles HuggingFace decoders into engines that keep their own KV cache inside a budget.",
        epilog="`keysieve VERB --help` lists the options of a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"keysieve {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the warnings of libraries")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, (module, summary) in VERBS.items():
        verb = verbs.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        # SUPPRESS: a verb's own default must not undo `keysieve --debug VERB`.
        verb.add_argument("--debug", action="store_true", default=SUPPRESS, help=SUPPRESS)
        verb.set_defaults(run=module.run)
        module.add_arguments(verb)
    return parser
