"""Draws docs/pictures/start.png: what the monitor draws in docs/start.md, by running that page.

python docs/pictures/start.py
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    page = (HERE.parent / "start.md").read_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names: dict[str, object] = {}
        for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[:2]:
            exec(block, names)
        [picture] = Path(folder).rglob("EffectiveRank.png")
        shutil.copy(picture, HERE / "start.png")


if __name__ == "__main__":
    main()
