# The front door. `make help` says what there is.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format fuzz sanitize bench proto lock clean system models test-npu lock-npu test-spark lock-spark

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/ready  ## build .venv: locked dependencies, kernels, console assets; nothing else

# pip checks every file against the hashes of the lock; the package itself is built in place.
$(VENV)/deps: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shoal needs python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

$(VENV)/ready: $(VENV)/deps pyproject.toml setup.py $(wildcard ext/*.pyx ext/*.pxd ext/*.h) \
  server/web/vendor.py server/web/package-lock.json
	command -v npm >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --require-hashes -r server/web/node.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: setup  ## the whole loop on this machine: ten devices, one fleet, a better model
	$(BIN)/shoal demo $(ARGS)

# mosquitto and chromium come from the distribution when this user may install them; tests that
# want one that is missing are skipped with that reason and counted.
system:
	@missing=""; \
	command -v mosquitto >/dev/null || test -x /usr/sbin/mosquitto || missing="$$missing mosquitto"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing$$missing"; \
	  (apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing) >/dev/null 2>&1 \
	    || echo "apt could not install$$missing: tests that need it will be skipped"; \
	elif [ -n "$$missing" ]; then \
	  echo "not installed and not root:$$missing; tests that need it will be skipped"; \
	fi

# The oldest onnxruntime whose library the engine takes; its test is skipped where pip fails.
OLDEST := .models/onnxruntime-1.20.0
$(OLDEST):
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	  --target $@.part -r tests/ext/onnxruntime-oldest.lock && mv $@.part $@ \
	  || echo "onnxruntime 1.20.0 was not fetched: its test will be skipped"

# Triton's own client, which needs another protobuf than ours; likewise.
TRITON := .venv-triton
$(TRITON): tests/agent/local/triton.lock
	$(BIN)/python -m venv $@.part
	$@.part/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $< \
	  && mv $@.part $@ || echo "tritonclient was not fetched: its tests will be skipped"

# Half of the tests wait for a disk, a process or a browser: as many at a time as there are cores.
# A file stays in one process, for what its tests share. JOBS=0 runs one after another.
JOBS := auto
# Seven processes that learn and judge against the clock: a machine of their own, as users have.
ALONE := tests/server/demo/test_demo.py

test: setup system $(OLDEST) $(TRITON)  ## every test: kernels, contracts, real processes, a real broker, a real browser
	-$(BIN)/python tests/models/fetch.py
	-$(BIN)/python -m tests.real.fetch
	if [ -x $(TRITON)/bin/python ]; then export SHOAL_TRITON_PYTHON=$(CURDIR)/$(TRITON)/bin/python; fi; \
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
	  $(or $(ARGS),--ignore=$(ALONE))$(if $(ARGS),, && $(BIN)/python -m pytest $(ALONE))

check: setup  ## style, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## figures, each as a ratio to a peer in the same run
	@for each in bench/[a-z]*.py; do echo "== $$each"; $(BIN)/python $$each || exit 1; done

# Ten million mutations; another SEED tries others.
SEED := 0
fuzz: setup  ## mutate the bytes of sketches and records: ten million times, in about ten minutes
	$(BIN)/python tests/fuzz/kll.py --mutations 4000000 --seed $(SEED)
	$(BIN)/python tests/fuzz/distinct.py --mutations 2500000 --seed $(SEED)
	$(BIN)/python tests/fuzz/frequent.py --mutations 2500000 --seed $(SEED)
	$(BIN)/python tests/fuzz/record.py --mutations 1000000 --seed $(SEED)

sanitize: setup  ## the sketch kernels' tests and a short fuzzing under gcc's sanitizers
	if [ -e "$$(gcc -print-file-name=libasan.so)" ]; then $(BIN)/python tests/fuzz/sanitize.py $(ARGS); 	else echo "gcc has no libasan here: the sanitizers were NOT run"; fi

models: setup  ## real models for tests and benchmarks, into .models/
	$(BIN)/python tests/models/fetch.py
	$(BIN)/python -m tests.real.fetch

# The peer of bench/local_api.py, which needs another protobuf than ours.
.venv-mlserver: bench/mlserver.lock
	$(BIN)/python -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r bench/mlserver.lock

NPU := .venv-npu
# made with .venv's Python: the kernels in the tree are built for it
$(NPU)/ready: tests/npu/requirements.lock
	test -x $(NPU)/bin/python || $(BIN)/python -m venv $(NPU)
	$(NPU)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r tests/npu/requirements.lock
	touch $@

test-npu: setup models $(NPU)/ready  ## OpenVINO, QNN's simulator and Vela, for real
	PYTHONPATH=build/view $(NPU)/bin/python -m pytest tests/npu $(ARGS)

lock-npu: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-emit-index-url \
	  --no-emit-find-links --no-annotate --generate-hashes --upgrade tests/npu/requirements.in \
	  -o tests/npu/requirements.lock

# Half a gigabyte, and it needs a Java from 17 on.
SPARK := .venv-spark
$(SPARK)/ready: tests/server/lake/spark.lock
	test -x $(SPARK)/bin/python || $(PYTHON) -m venv $(SPARK)
	$(SPARK)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	touch $@

test-spark: setup $(SPARK)/ready  ## Spark and DataSketches' Java library read the lake
	SHOAL_SPARK_PYTHON=$(CURDIR)/$(SPARK)/bin/python $(BIN)/python -m pytest tests/server/lake/test_spark.py $(ARGS)

lock-spark: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-emit-index-url \
	  --no-emit-find-links --no-annotate --generate-hashes --upgrade tests/server/lake/spark.in \
	  -o tests/server/lake/spark.lock

proto: setup  ## make the protobuf stubs again
	$(BIN)/python proto/generate.py

lock:  ## choose dependency versions anew; writes requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile -q --universal --no-header --no-emit-index-url --no-emit-find-links \
	  --no-annotate --generate-hashes --upgrade --extra server --extra dev \
	  pyproject.toml -o requirements.lock

clean:  ## remove what the build made
	rm -rf build dist $(VENV) $(NPU) .venv-mlserver .venv-triton *.egg-info ext/*.so server/web/static/vendor
