"""`python -m minilora` is the command `minilora`."""

import sys

from minilora.cli import main

sys.exit(main())
