"""Copy notebooks with their code cells counted: `python count_cells.py OUT NOTEBOOK…`

nbdev_clean takes the counts out so that they do not change with every run; nbval takes a cell without a count for one that was never run.
"""
import json
import sys
from pathlib import Path


def count_cells(notebook: dict) -> dict:
    "Number the code cells as a run from top to bottom would."
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["execution_count"] = number
    return notebook


if __name__ == "__main__":
    out, *paths = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        (out / path.name).write_text(json.dumps(count_cells(json.loads(path.read_text("utf-8"))), ensure_ascii=False), "utf-8")
