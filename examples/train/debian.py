"""Reads files out of Debian packages, fetched with apt-get into a cache folder."""

import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(tempfile.gettempdir()) / "spillway-training"


def package(name: str) -> Path:
    """The package's file, downloaded if it is not in the cache."""
    CACHE.mkdir(exist_ok=True)
    if not (found := sorted(CACHE.glob(f"{name}_*.deb"))):
        subprocess.run(["apt-get", "download", name], cwd=CACHE, check=True, capture_output=True)
        found = sorted(CACHE.glob(f"{name}_*.deb"))
    return found[0]


def members(name: str, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Every file of the package whose path matches: the match and the file's bytes."""
    wanted = re.compile(pattern)
    command = ["dpkg-deb", "--fsys-tarfile", str(package(name))]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            found = wanted.fullmatch(member.name) if member.isfile() else None
            file = tar.extractfile(member) if found else None
            if found and file:
                yield found, file.read()
