"""Scripts are no package: they find each other in their own folder, as when they are run, and so do their tests."""

import sys
from pathlib import Path


SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "studies")]
