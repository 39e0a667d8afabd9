"""`python -m fusec` is the command `fusec`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m fusec"))
