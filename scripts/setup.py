"""Make `.venv` ready: the standard library's venv, then pip with the committed constraints.

Does nothing, and needs no network, when what is asked for is there already. pip's own settings
(PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf) pass through untouched. Runs on any Python from
3.6, so that an old one gets a hint rather than a syntax error.
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
NEEDED_GB = {"cpu": 3.0, "cuda": 12.0}  # cpu: 2.2 GB measured with all extras; cuda: a bound
DOWNLOAD = {
    "cpu": "about 0.5 GB to download",
    "cuda": "several GB to download: torch's Linux build brings the CUDA libraries",
}


def main():
    """Check the machine, then bring `.venv` to the asked state."""
    parser = argparse.ArgumentParser(description="Make .venv ready.")
    parser.add_argument("--extra", action="append", default=[], help="an optional group of pyproject.toml")
    extras = sorted(parser.parse_args().extra)
    # Checked on the Python that asks: the one in .venv is a link to it.
    if sys.version_info < (3, 11):  # noqa: UP036  the Python that asks may be old
        fail(
            "Marrow needs Python 3.11 or newer; this is " + platform.python_version(),
            "make run PYTHON=python3.12   (or wherever a newer one is)",
        )
    wanted = state()
    have, ready, place = read_stamp()
    if have == wanted and set(extras) <= ready:
        return
    check_machine()
    if place not in ("", here()):  # scripts in .venv name the folder and the Python they were made for
        shutil.rmtree(VENV, ignore_errors=True)
    fresh = have is not None and have != wanted
    build(sorted(set(extras) | (ready if not fresh else set())), wanted)


def state():
    """Return a hash of all that decides what is installed."""
    digest = hashlib.sha256(here().encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def here():
    """Return a hash of what an environment cannot be carried between: folders, and Pythons."""
    return hashlib.sha256((ROOT + sys.version).encode()).hexdigest()


def read_stamp():
    """Return what the last finished set-up installed: its state, its extras, and where."""
    try:
        with open(STAMP) as file:
            lines = file.read().split("\n")
    except OSError:
        return None, set(), ""
    if not os.path.exists(os.path.join(VENV, "bin", "python")):
        return None, set(), ""
    return lines[0], set(lines[1].split()), lines[2]


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
        hint = "free some space"
        if build_kind == "cuda":
            hint += "; a CPU build of torch (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL) needs 3 GB"
        fail(f"{free_gb:.1f} GB free on this disk, set-up needs {NEEDED_GB[build_kind]:.1f} GB", hint)
    say(f"Setting up .venv, once: {DOWNLOAD[build_kind]}.")


def torch_build():
    """Tell which torch pip will take: Linux wheels bring CUDA, unless pip has a source of its own."""
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
    if not os.path.exists(python) or subprocess.call([python, "-c", "import pip"], stderr=subprocess.DEVNULL):
        shutil.rmtree(VENV, ignore_errors=True)
        hint = "on Debian and Ubuntu: apt install python3-venv"
        run([sys.executable, "-m", "venv", VENV], "python -m venv failed", hint)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--quiet"] * (not sys.stderr.isatty())
    pip += ["--constraint", os.path.join(ROOT, "constraints.txt")]
    hint = "check the network, or point pip at your own index: PIP_INDEX_URL=... make run; then run it again"
    run([*pip, "setuptools"], "pip could not install", hint)
    group = f"[{','.join(extras)}]" if extras else ""
    run([*pip, "--no-build-isolation", "--editable", ROOT + group], "pip could not install Marrow", hint)
    with open(STAMP, "w") as file:
        file.write("\n".join([wanted, " ".join(extras), here(), ""]))


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
