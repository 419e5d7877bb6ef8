"""Print the N-th shell command of README.md: CI runs what the reader is told to run."""

import re
import sys
from pathlib import Path

readme = (Path(__file__).parent.parent / "README.md").read_text()
commands = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
print(commands[int(sys.argv[1]) - 1].strip())
