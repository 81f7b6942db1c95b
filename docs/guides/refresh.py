"""Run the commands that a guide shows and put what they print in its place.

    python docs/guides/refresh.py docs/guides/from-40-to-100-percent.md

A fenced block whose first line begins with "$ " is run line by line in a folder of its own, each line
that begins with "$ " being a command; what was below it is replaced by what it prints now.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```console\n(\$ .*?)^```$", re.MULTILINE | re.DOTALL)


def shown(commands: list[str], folder: str) -> str:
    """Run commands and return them with what they print."""
    environment = os.environ | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    lines = []
    for command in commands:
        words = [str(ROOT / word) if word.startswith("docs/") else word for word in shlex.split(command)]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        lines.append(f"$ {command}\n{done.stdout.rstrip()}\n")
    return "".join(lines)


def main() -> None:
    """Refresh the guide named on the command line."""
    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:

        def again(block: "re.Match[str]") -> str:
            commands = [line[2:] for line in block[1].splitlines() if line.startswith("$ ")]
            return f"```console\n{shown(commands, folder)}```"

        text = BLOCK.sub(again, path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
