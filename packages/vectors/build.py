"""Build a package of the golden vectors: `python packages/vectors/build.py wheel OUT` or `npm OUT`.

The version is format.catalogue.BUILD. Builds of one commit have the same bytes. The group
`packages` of pyproject.toml lists the needs: hatchling builds the wheel, and ndonnx the graphs.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "src"))  # the data are those of this commit

from doraxp.testing import VERSION, write_vectors  # noqa: E402
from doraxp.testing._vectors import FORMAT, write_checksums  # noqa: E402

BUILD = 0
"""Goes up where a package changes and its cases do not, and starts again at 0 where they do."""


def version() -> str:
    """Return the version of both packages."""
    return f"{FORMAT}.{VERSION}.{BUILD}"


def write_data(folder: Path) -> None:
    """Write the folder `data`: the vectors, the schema, the graphs, and the checksums of all."""
    import graphs

    write_vectors(folder)
    shutil.copy(HERE / "schema.json", folder)
    for dtype in ("float32", "float64"):
        (folder / f"layer-{dtype}.onnx").write_bytes(graphs.layer(dtype))
    write_checksums(folder)


def wheel(out: Path) -> None:
    """Write the wheel into a folder."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        shutil.copytree(HERE / "python", source, ignore=shutil.ignore_patterns("__pycache__"))
        add_texts(source)
        write_data(source / "doraxp_vectors" / "data")
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out.absolute()],
            cwd=source,
            env=os.environ | {"DORAXP_VECTORS_VERSION": version()},
            stdout=subprocess.DEVNULL,
            check=True,
        )


def npm(out: Path) -> None:
    """Write the package for npm into a folder, as `npm pack` would."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        shutil.copytree(HERE / "npm", source)
        add_texts(source)
        write_data(source / "data")
        manifest = json.loads((source / "package.json").read_text("utf-8"))
        manifest["version"] = version()
        text = json.dumps(manifest, indent=2) + "\n"
        (source / "package.json").write_text(text, "utf-8", newline="\n")
        (out / f"doraxp-vectors-{version()}.tgz").write_bytes(packed(source))


def add_texts(source: Path) -> None:
    """Copy the files that people read."""
    shutil.copy(HERE / "README.md", source)
    shutil.copy(ROOT / "LICENSE", source)


def packed(source: Path) -> bytes:
    """Return a .tgz of a folder, without times and owners: these differ between machines."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(f"package/{path.relative_to(source).as_posix()}")
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    return gzip.compress(archive.getvalue(), mtime=0)


def main() -> None:
    """Read the command line, and build."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", choices=["wheel", "npm"])
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder; it is made if need be")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    {"wheel": wheel, "npm": npm}[arguments.package](arguments.out)


if __name__ == "__main__":
    main()
