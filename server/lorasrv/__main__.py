"""`python -m lorasrv` is the `lorasrv` command."""

import sys

from lorasrv.cli.main import main

sys.exit(main())
