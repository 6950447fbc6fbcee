"""`python -m keysieve` equals the `keysieve` command."""

import sys

from keysieve.compiler.cli import main

if __name__ == "__main__":
    sys.exit(main())
