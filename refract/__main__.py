"""`python -m refract COMMAND …`, as `refract COMMAND …`."""

import sys

from refract.cli import main

if __name__ == "__main__":
    sys.exit(main())
