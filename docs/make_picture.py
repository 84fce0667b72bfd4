"""Run the quick start and draw the end of what it prints: `python docs/make_picture.py` writes docs/quickstart.svg."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = "bitwright train --out runs/quickstart"


def main() -> None:
    """Run, keep the table, the file and the verdict, write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", *COMMAND.split()], cwd=folder, capture_output=True, text=True, check=True
        )
    lines = done.stdout.rstrip().splitlines()
    start = next(i for i, line in enumerate(lines) if "accuracy" in line and "size KB" in line)
    console = Console(record=True, width=116, file=open("/dev/null", "w"))  # noqa: SIM115 (the process ends here)
    for line in [f"$ {COMMAND}", "...", *lines[start:]]:
        console.print(Text(line, style="bold green" if line.startswith("verified") else ""))
    # Without web fonts: the picture then depends on nothing outside itself.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="bitwright"), flags=re.DOTALL)
    Path(__file__).with_name("quickstart.svg").write_text(picture)


if __name__ == "__main__":
    main()
