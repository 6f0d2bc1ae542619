"What a person meets at the command line: refusals, exit statuses, reports of failed notebooks, the base install."
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from conftest import PROJECT


@pytest.mark.parametrize(("words", "message"), [
    (["run", "trian"], "did you mean 'train'"),
    (["run", "train", "--stage", "9"], "unknown stage '9'"),
    (["run", "train", "--stage", "3"], "PILLSNAP_DATA_ROOT"),
    (["run", "train", "--overrides", "epoch=3"], "did you mean 'epochs'"),
    (["run", "train", "--overrides", "lr=7"], "lr='7'"),
    (["run", "train", "--overrides", "epochs"], "is not field=value"),
    (["run", "explore", "--resume", "auto"], "has no parameter 'resume'"),
    (["run", "train", "--data-root", "/nowhere", "--overrides", "name=x"], "/nowhere is not a folder"),
    (["run", "train", "--data-root", "/tmp"], "needs a name"),
    (["index"], "no data root"),
    (["report", "nowhere.ipynb"], "is not there"),
])
def test_refusals_name_the_value_and_the_remedy(pillsnap, words, message):
    done = pillsnap(*words)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_a_misspelled_setting_is_refused(pillsnap):
    done = pillsnap("index", PILLSNAP_DATAROOT="/data")
    assert done.returncode == 1 and "did you mean 'data_root'" in done.stderr


def test_papermill_with_an_unknown_parameter_fails(environ, tmp_path):
    "papermill itself only warns, and would run the smoke stage instead of what was meant."
    import os
    done = subprocess.run([sys.executable, "-m", "papermill", PROJECT / "nbs/01_explore.ipynb", tmp_path / "out.ipynb", "-p", "stag", "3"], env=os.environ | environ, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode != 0 and "did you mean 'stage'" in done.stderr


def test_a_failed_notebook_gets_its_report(pillsnap, tmp_path):
    (tmp_path / "empty").mkdir()
    done = pillsnap("run", "explore", "--data-root", tmp_path / "empty", "--overrides", "name=empty")
    page = (tmp_path / "reports/stage_0-empty/01_explore.html").read_text("utf-8")
    assert done.returncode == 1 and "what is read: AIHub photos" in done.stderr
    assert page.index("what is read: AIHub photos") < page.index("<main>") and ">failed<" in page
    assert "01_explore" in (tmp_path / "reports/index.html").read_text("utf-8")


def test_an_edited_notebook_that_was_not_exported_is_refused(tmp_path):
    "The module would not be what the notebook shows."
    import shutil

    from pillsnap.core import stale_modules
    for folder in ("nbs", "pillsnap"):
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("_*", "images"))
    assert stale_modules(tmp_path) == []
    path = tmp_path / "nbs/03_preprocess.ipynb"
    nb = nbformat.read(path, 4)
    cell = next(c for c in nb.cells if "#| export" in c.source and "INTER_AREA" in c.source)
    cell.source = cell.source.replace("INTER_AREA", "INTER_CUBIC")
    nbformat.write(nb, path)
    assert stale_modules(tmp_path) == ["03_preprocess.ipynb"]


def test_synth_is_the_same_everywhere(pillsnap, tmp_path):
    for name in "ab":
        assert pillsnap("synth", tmp_path / name, "--drugs", 2, "--views", 3, "--trays", 0, "--width", 96).returncode == 0
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "ab"]
    assert files[0] == files[1] and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files[0])
    again = pillsnap("synth", tmp_path / "a")
    assert again.returncode == 1 and "not empty" in again.stderr


def test_index_says_what_is_there(pillsnap, tree):
    done = pillsnap("index", tree)
    assert done.returncode == 0 and "photos" in done.stdout and "255" in done.stdout


BASE = "import sys; [sys.modules.__setitem__(m, None) for m in ('torch', 'timm', 'ultralytics', 'matplotlib', 'papermill', 'nbdev', 'albumentations')]; "


def test_the_base_install_answers_help():
    done = subprocess.run([sys.executable, "-c", BASE + "sys.argv = ['pillsnap', '--help']; from pillsnap.cli import main; main()"], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0 and "synth" in done.stdout


def test_the_base_install_says_what_is_missing():
    code = BASE + "sys.argv = ['pillsnap', 'run', 'explore']; from pillsnap.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode != 0 and "[train]" in done.stderr


def test_the_base_install_indexes(tree, environ):
    code = BASE + f"sys.argv = ['pillsnap', 'index', {str(tree)!r}, '--check', 'all']; from pillsnap.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=os.environ | environ)
    assert done.returncode == 0 and "AIHub 166, English names" in done.stdout, done.stderr


def test_core_imports_nothing_heavy():
    code = "import sys, pillsnap.core, pillsnap.cli; print([m for m in ('torch', 'pandas', 'numpy', 'matplotlib', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT).stdout.strip() == "[]"


def test_the_module_needs_no_nbdev():
    used = [p.name for p in (PROJECT / "pillsnap").glob("*.py") if any(w in p.read_text("utf-8") for w in ("import nbdev", "from nbdev", "import fastcore", "from fastcore"))]
    assert used == []


def test_notebooks_define_nothing_after_run():
    "A stage notebook's second half is thin: one parameters cell, a dozen cells, each calling what the first half exports."
    for path in sorted((PROJECT / "nbs").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        run = [i for i, c in enumerate(cells) if c["cell_type"] == "markdown" and re.match(r"## Run\b", "".join(c["source"]))]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == len(run), path.name
        late = [c for i in run for c in cells[i:] if c["cell_type"] == "code"]
        assert not any(line.startswith(("def ", "class ")) for c in late for line in c["source"]), path.name


def test_outside_a_checkout_the_notebooks_are_missed_by_name(environ, tmp_path):
    "An installed package has no notebooks beside it."
    import os
    import shutil
    shutil.copytree(PROJECT / "pillsnap", tmp_path / "site/pillsnap")
    done = subprocess.run([sys.executable, "-S", "-c", "import sys; sys.path[:0] = sys.argv[1:]; sys.argv = ['pillsnap', 'run', 'explore']; from pillsnap.cli import main; main()",
                           str(tmp_path / "site"), *[p for p in sys.path if p.endswith("site-packages")]], env=os.environ | environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "inside a checkout" in done.stderr
