# make quickstart   builds the environment if there is none, and distils on generated data; PAIR=TEACHER-STUDENT
# make test         runs the tests in a random order; DETECTRON2=DIR runs them with another Detectron2 source tree
# make soak         runs the long tests: kills, leaks, fuzzing (11 minutes on 2 cores)
# make lint         checks lint and format with ruff
# make format       rewrites files with ruff
# make lock         resolves requirements.in into requirements.txt
# make gpu-pack     packs what `make gpu` needs, into build/gpu
# make gpu          runs tests/cuda and benchmarks/gpu.py on a machine with a GPU, without a network; OUT=output/gpu
# make clean        removes .venv, and what `make quickstart` and `make gpu-pack` made
# make teacher      retrains a teacher of the quickstart (about 20 minutes on 2 cores); TEACHER=FasterRCNN

PAIR ?= faster_rcnn-faster_rcnn_unlabeled
TEACHER ?= FasterRCNN
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# The packaged Detectron2 v0.6 has no C++ sources, see tools/build_without_extension.
UV := PYTHONPATH="$(CURDIR)/tools/build_without_extension" $(PYTHON) -m uv pip
NO_ISOLATION := --no-build-isolation-package pb1-detectron2
PACKAGES := $(CURDIR)/projects/GDetKD
export PYTHONPATH := $(if $(DETECTRON2),$(abspath $(DETECTRON2)):)$(PACKAGES)
export PYTHONWARNINGS := ignore

.PHONY: quickstart test soak lint format lock teacher gpu-pack gpu clean

quickstart: $(INSTALLED)
	$(PYTHON) tools/quickstart.py --pair $(PAIR)

# Run a process for each core, up to four, with one thread each: tiny detectors gain nothing from more threads.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

soak: $(INSTALLED)
	$(PYTHON) -m pytest -m soak -s $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

teacher: $(INSTALLED)
	$(PYTHON) tools/make_teacher.py --config-file configs/quickstart/teacher-$(TEACHER).yaml \
	    --output configs/quickstart/teacher-$(TEACHER).pth

gpu-pack: $(INSTALLED)
	$(PYTHON) tools/pack_for_gpu.py

# Without $(INSTALLED): that machine cannot install anything.
gpu:
	bash tools/run_on_gpu.sh

lock: $(VENV)/.uv
	$(UV) compile --python $(PYTHON) --upgrade --universal --generate-hashes --no-header --no-emit-index-url \
	    $(NO_ISOLATION) requirements.in -o requirements.txt

# Compiled here, imports take a third of the time, also where Python may not write the compiled files itself.
$(INSTALLED): requirements.txt $(VENV)/.uv
	$(UV) install --python $(PYTHON) --compile-bytecode --require-hashes $(NO_ISOLATION) -r requirements.txt
	touch $@

$(VENV)/.uv: requirements-uv.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --require-hashes -r requirements-uv.txt
	touch $@

clean:
	rm -rf $(VENV) build datasets/gdetkd_shapes output/quickstart
