"""Run `refract COMMAND …` as `python -m refract COMMAND …`."""

import sys

from refract.cli import main

if __name__ == "__main__":
    sys.exit(main())
