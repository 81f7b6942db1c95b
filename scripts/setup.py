"""Make `.venv` ready: the standard library's venv, then pip with the committed constraints.

Does nothing, and needs no network, when what is asked for is there already. pip's own settings
(PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf) pass through untouched. Runs on any Python 3, so that
an old one gets a hint rather than a syntax error.
"""

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "ready")
NEEDED_GB = {"cpu": 2.5, "cuda": 12.0}  # on disk after set-up, measured with torch 2.13
DOWNLOAD = {
    "cpu": "about 0.5 GB",
    "cuda": "about 3 GB, most of it the CUDA libraries that torch's Linux build brings",
}


def main():
    """Check the machine, then bring `.venv` to the asked state."""
    parser = argparse.ArgumentParser(description="Make .venv ready.")
    parser.add_argument("--extra", action="append", default=[], help="an optional group of pyproject.toml")
    extras = sorted(parser.parse_args().extra)
    # Checked on the Python that asks: the one in .venv is a link to it.
    if sys.version_info < (3, 11):
        fail(
            "Marrow needs Python 3.11 or newer; this is " + platform.python_version(),
            "make run PYTHON=python3.12   (or wherever a newer one is)",
        )
    wanted = state()
    have, ready = read_stamp()
    if have == wanted and set(extras) <= ready:
        return
    check_machine()
    fresh = have is not None and have != wanted
    build(sorted(set(extras) | (ready if not fresh else set())), wanted)


def state():
    """Return a hash of all that decides what is installed."""
    digest = hashlib.sha256((ROOT + sys.version).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def read_stamp():
    """Return what the last finished set-up installed: its state and its extras."""
    try:
        with open(STAMP) as file:
            lines = file.read().split("\n")
    except OSError:
        return None, set()
    if not os.path.exists(os.path.join(VENV, "bin", "python")):
        return None, set()
    return lines[0], set(lines[1].split())


def check_machine():
    """Refuse, with a hint, what cannot end well."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) not in {("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")}:
        fail(
            f"no torch build is known for {system} {machine}",
            "use Linux (x86-64, arm64) or macOS on Apple silicon",
        )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            fail(f"this Python has no {module}", "on Debian and Ubuntu: apt install python3-venv")
    if not os.access(ROOT, os.W_OK):
        fail("no permission to write in " + ROOT, "clone into a folder that you own")
    build_kind = torch_build()
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < NEEDED_GB[build_kind]:
        fail(
            f"{free_gb:.1f} GB free on this disk, set-up needs {NEEDED_GB[build_kind]:.1f} GB",
            "free some space"
            + (
                "; a CPU build of torch (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL) needs 2.5 GB"
                if build_kind == "cuda"
                else ""
            ),
        )
    say(f"Setting up .venv: {DOWNLOAD[build_kind]} to download, once.")


def torch_build():
    """Tell which torch pip will take: Linux x86-64 wheels bring CUDA, unless a source of its own is set."""
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout + " ".join(name for name in os.environ if name.startswith("PIP_"))
    own_source = any(word in settings.lower().replace("_", "-") for word in ("find-links", "index-url"))
    return "cuda" if (platform.system() == "Linux" and not own_source) else "cpu"


def build(extras, wanted):
    """Create the environment where it is missing, install, and leave the stamp last."""
    python = os.path.join(VENV, "bin", "python")
    if os.path.exists(STAMP):
        os.remove(STAMP)
    if (
        subprocess.call([python, "-c", "import pip"], stderr=subprocess.DEVNULL)
        if os.path.exists(python)
        else True
    ):
        shutil.rmtree(VENV, ignore_errors=True)
        run(
            [sys.executable, "-m", "venv", VENV],
            "python -m venv failed",
            "on Debian and Ubuntu: apt install python3-venv",
        )
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--constraint", os.path.join(ROOT, "constraints.txt")]
    hint = "check the network, or point pip at your own index: PIP_INDEX_URL=... make run; then run it again"
    run([*pip, "setuptools"], "pip could not install", hint)
    group = "[{}]".format(",".join(extras)) if extras else ""
    run([*pip, "--no-build-isolation", "--editable", ROOT + group], "pip could not install Marrow", hint)
    with open(STAMP, "w") as file:
        file.write(wanted + "\n" + " ".join(extras) + "\n")


def run(command, what, hint):
    """Run a command; its failure is ours."""
    if subprocess.call(command):
        fail(what, hint)


def say(text):
    """Talk on stderr."""
    sys.stderr.write(text + "\n")


def fail(message, hint):
    """End with a message and what to do next."""
    say(f"error: {message}\nhint: {hint}")
    sys.exit(1)


if __name__ == "__main__":
    main()
