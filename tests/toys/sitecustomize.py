"""Makes the toy stages beside this file stages of genpipe, in every process with this folder on PYTHONPATH."""

from pathlib import Path

import genpipe.stages

genpipe.stages.__path__.append(str(Path(__file__).parent / "stages"))
