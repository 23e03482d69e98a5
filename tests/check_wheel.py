"""Build the wheel, install it apart from the checkout, and run its command: what a user of the package gets.

Run by `make test`, not by pytest: it makes an environment of its own (sharing the installed dependencies).
"""

import json
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, cwd: Path) -> str:
    finished = subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stdout}\n{finished.stderr}")
    return finished.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", str(place), str(ROOT), cwd=place)
        (wheel,) = place.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        for needed in (
            "batchless/py.typed",
            "batchless/recipes/embedded_quick.yaml",
            "batchless/report/page.html.j2",
            "batchless/report/page.css.j2",
            "batchless/report/page.js",
        ):
            assert needed in names, f"{needed} is not in the wheel"
        assert not [name for name in names if name.startswith("tests")], "tests are in the wheel"
        # The dependencies are those of this environment: torch alone would be gigabytes once more.
        venv.create(place / "env", with_pip=True)
        python = place / "env" / "bin" / "python"
        libraries = run(
            sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place
        ).strip()
        own = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip()
        run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel), cwd=place)
        (Path(own) / "shared.pth").write_text(f"{libraries}\n")
        where = run(str(python), "-c", "import batchless; print(batchless.__file__)", cwd=place).strip()
        assert where.startswith(own), f"the wheel's package is not the one imported: {where}"
        command = str(place / "env" / "bin" / "batchless")
        train = (
            "train",
            "--config",
            "embedded_quick",
            "--images",
            "32",
            "--data.test_images",
            "20",
            "--evaluations",
            "1",
        )
        run(command, *train, "--out", "run", cwd=place)
        summary = json.loads((place / "run" / "summary.json").read_text())
        assert 0 <= summary["test_accuracy"] <= 1, summary
        run(command, "evaluate", "run/checkpoints/best.pt", cwd=place)
        run(command, "compare", "run", "--out", "report.html", cwd=place)
        assert (place / "report.html").stat().st_size > 10_000
        run(command, "convert", "cifar_resnet8", "gn+ws", "--image_size", "32", cwd=place)
        print(f"{wheel.name}: installed apart, trained, {len(names)} files")


if __name__ == "__main__":
    main()
