# make demo    set up, draw data, run explore → manifest → train → evaluate → export, write reports, identify one tray
# make test    set up, then every check of the project
# make lab     set up, then JupyterLab on the notebooks
# make pushin DATA=FOLDER    the same four notebooks on real phone photos in a YOLO folder
# make clean   remove what the notebooks wrote under work/, reports/ and data_manifests/

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export YOLO_CONFIG_DIR := $(CURDIR)/work/ultralytics
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: demo test lab setup clean pushin
.DEFAULT_GOAL := demo

setup: $(READY)

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { echo "PillSnap needs Python 3.11 or 3.12, $(PYTHON) is $$($(PYTHON) -V 2>&1); give another with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@echo "Setting up .venv: about 3.1 GB to download (torch with its CUDA libraries is most of it), 7.3 GB on the disk."
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[train,dev]'
	@touch $@

demo: $(READY)
	@set -e; start=$$SECONDS; for notebook in explore manifest train evaluate export; do $(BIN)/pillsnap run $$notebook --stage 0; done; \
	photo=$$(find "$${PILLSNAP_WORK:-work}"/synthetic -name 'K-*_2_0_2_90_000_200.png' | sort | head -1); \
	echo; echo "pillsnap identify $$photo --mode combination"; $(BIN)/pillsnap identify "$$photo" --mode combination; \
	echo; echo "To serve it, for this machine only:  $(BIN)/pillsnap serve --insecure-localhost   and open http://127.0.0.1:8000/"; \
	echo; echo "Done in $$((SECONDS - start)) s. Look at $(CURDIR)/reports/index.html"

# Each step's time is printed; `tests/README.md` says what belongs where so that the whole stays within 25 minutes on two cores.
test: $(READY)
	@tests/run_all.sh

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=nbs

PHOTOS := name=pushin-photo split=photo images=267 classes=17 epochs=40 strategy=classifier gates=none
SESSION := name=pushin-session split=session train_session=IMG_6[01] images=267 classes=17 epochs=40 strategy=classifier gates=none

pushin: $(READY)
	@test -d "$(DATA)" || { echo "give the folder with data.yaml: make pushin DATA=FOLDER"; exit 1; }
	@set -e; for fields in "$(PHOTOS)" "$(SESSION)"; do for notebook in explore manifest train evaluate; do \
	$(BIN)/pillsnap run $$notebook --stage 0 --data-root "$(DATA)" --overrides "$$fields"; done; done

clean:
	rm -rf work reports/*/ reports/index.html data_manifests/*/
