"""`make sbom`: what an environment holds as a CycloneDX SBOM, and its pins with the hashes of their files.

python docker/sbom.py VENV OUT writes OUT/resmoe.cdx.json, by cyclonedx-py of docker/constraints-sbom.txt, and
OUT/requirements.txt, for `pip install --require-hashes --no-deps -r`. Needs pip's index.
"""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PINS = HERE / "constraints-cpu.txt"
TOOLS = HERE / "constraints-sbom.txt"


def main() -> None:
    """Write both files, check them against the pins, print the counts."""
    if len(sys.argv) != 3:
        sys.exit("usage: python docker/sbom.py VENV OUT")
    python, out = Path(sys.argv[1]).absolute() / "bin" / "python", Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    sbom, requirements = out / "resmoe.cdx.json", out / "requirements.txt"
    installed = write_sbom(python, sbom, out / "tools")
    hashes = read_hashes(python)
    lines = [
        line for name in sorted(hashes) for line in (f"{name}=={hashes[name][0]} \\", f"    --hash={hashes[name][1]}")
    ]
    requirements.write_text("\n".join(lines) + "\n")
    print(f"{sbom}: {len(installed)} components")
    print(f"{requirements}: {len(hashes)} packages with hashes")
    if missing := sorted(name for name, (version, _) in hashes.items() if installed.get(name) != version):
        sys.exit(f"{sbom}: these pins are not installed at their version: {', '.join(missing)}; run `make venv`")


def write_sbom(python: Path, sbom: Path, tools: Path) -> dict[str, str]:
    """The SBOM of an environment, checked against CycloneDX's schema; its components' versions by name."""
    if not (tools / "bin" / "cyclonedx-py").exists():
        venv.create(tools, with_pip=True, clear=True)
        pip = [tools / "bin" / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "-r", TOOLS], check=True)
    command = [tools / "bin" / "cyclonedx-py", "environment", "--pyproject", HERE.parent / "pyproject.toml"]
    subprocess.run([*command, "--output-reproducible", "--validate", "-o", sbom, python], check=True)
    components = json.loads(sbom.read_text())["components"]
    return {normal(component["name"]): component["version"] for component in components}


def read_hashes(python: Path) -> dict[str, tuple[str, str]]:
    """Version and ``sha256:...`` of each pin's file for this machine, as pip's index has them; nothing is installed."""
    command = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--dry-run", "--ignore-installed"]
    done = subprocess.run([*command, "--no-deps", "--report", "-", "-r", PINS], stdout=subprocess.PIPE, check=True)
    found = {}
    for entry in json.loads(done.stdout)["install"]:
        metadata, archive = entry["metadata"], entry["download_info"]["archive_info"]
        found[normal(metadata["name"])] = metadata["version"], f"sha256:{archive['hashes']['sha256']}"
    return found


def normal(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
