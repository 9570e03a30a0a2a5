"""`python -m streamcnn`."""

import sys

from streamcnn.cli import main

sys.exit(main())
