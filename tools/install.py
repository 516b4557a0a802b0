"""Make `.venv` if it is missing, and install the project into it if that is out of date.

    python3 tools/install.py              # the library
    python3 tools/install.py dev          # and what the tests need
    python3 tools/install.py dev corpora  # several extras

A stamp inside `.venv` remembers what was installed, so that a second call costs nothing. This file
must run under any Python 3, to be able to say that a Python is too old: nothing newer than 3.4.
"""

import hashlib
import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
PYTHON = os.path.join(".venv", "Scripts" if os.name == "nt" else "bin", "python")
STAMP = os.path.join(".venv", "speechimg-installed")

BROKEN_PAIR = """
torch and torchaudio are installed but do not load together: {problem}
Both must come from the same place and be built for the same CUDA (or both for none). This works:
    .venv/bin/python -m pip install --force-reinstall \
        "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"
"""

NO_VENV = """
{python} cannot make a virtual environment here. On Debian that part is a package of its own:
    sudo apt-get install python3-venv
"""


def version_of(python):
    "(major, minor) of the interpreter called `python`, or None if there is no such thing."
    command = [python, "-c", "import sys; print('%d %d' % sys.version_info[:2])"]
    try:
        answer = subprocess.check_output(command, stderr=subprocess.DEVNULL).decode()
        return tuple(int(part) for part in answer.split())
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def find_python():
    "An interpreter that is new enough: this one, else one under a versioned name."
    if sys.version_info >= OLDEST:
        return sys.executable
    for minor in range(14, OLDEST[1] - 1, -1):
        name = shutil.which("python3.%d" % minor)
        if name and (version_of(name) or (0, 0)) >= OLDEST:
            return name
    sys.exit(
        "speechimg needs Python %d.%d or newer; `python3` here is %d.%d (%s), and no newer one "
        "is beside it.\n"
        "Install one, or name it:  make PYTHON=/path/to/python3.12 demo"
        % (OLDEST + tuple(sys.version_info[:2]) + (sys.executable,))
    )


def make_venv():
    "Create `.venv`; nothing half-made is left behind when that fails."
    python = find_python()
    print("Making .venv with Python %d.%d" % version_of(python))
    if subprocess.call([python, "-m", "venv", ".venv"]) != 0:
        shutil.rmtree(".venv", ignore_errors=True)
        sys.exit(NO_VENV.format(python=python))


def wanted(extras):
    "What the stamp must say: the requirements, and where this folder is."
    with open("pyproject.toml", "rb") as file:
        requirements = hashlib.sha256(file.read()).hexdigest()
    return [requirements, os.getcwd()] + sorted(extras)


def installed():
    "What the stamp says; nothing if there is none."
    try:
        with open(STAMP) as file:
            return file.read().splitlines()
    except OSError:
        return []


def install(extras):
    "pip install -e .[extras], and a look whether torch and torchaudio fit together."
    print(
        "Installing speechimg%s into .venv (PyTorch is large: minutes, once)"
        % (" with " + ", ".join(extras) if extras else "")
    )
    sys.stdout.flush()
    target = "." + ("[" + ",".join(extras) + "]" if extras else "")
    # Python compiles what it imports, when it does; compiling all of PyTorch takes a minute
    command = [PYTHON, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    command += ["--editable", target]
    if subprocess.call(command + ([] if sys.stdout.isatty() else ["--quiet"])) != 0:
        sys.exit(
            "pip could not install speechimg: its message is above. "
            "Run the same command again once that is solved."
        )
    check = subprocess.Popen([PYTHON, "-c", "import torch, torchaudio"], stderr=subprocess.PIPE)
    error = check.communicate()[1].decode("utf-8", "replace").strip().splitlines()
    if check.returncode != 0:
        sys.exit(BROKEN_PAIR.format(problem=error[-1] if error else "no message"))


def main(extras):
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if version_of(PYTHON) is None:
        make_venv()
    elif version_of(PYTHON) < OLDEST:
        sys.exit(
            "The Python in .venv is older than %d.%d: remove .venv and run the same command again."
            % OLDEST
        )
    before = installed()
    extras = sorted(set(before[2:]) | set(extras))  # extras that are there already stay
    now = wanted(extras)
    if before == now:
        return
    install(extras)
    with open(STAMP, "w") as file:
        file.write("\n".join(now) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
