"""`python -m longvideo` is the command `longvideo`."""

import sys

from longvideo.cli import main

if __name__ == "__main__":
    sys.exit(main())
