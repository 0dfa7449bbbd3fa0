"""`python -m fisherlab` is `fisherlab`, for what starts modules, such as torchrun."""

import sys

from fisherlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
