# Everything a fresh machine with python3, make and g++ needs: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
ORACLE_VENV := .venv-oracle
CLIENTS_VENV := .venv-clients
PYTEST := $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal
SOURCES := pyproject.toml CMakeLists.txt $(wildcard native/*)
CPP := $(wildcard native/*.h native/*.cpp native/*.inl)
# llama-cpp-python comes as source: AVX2 and no more, because its AMX code dies when compiled by gcc 12.
LLAMA_CPP_FLAGS := -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/tests/oracle/without_common.cmake
, := ,
say = @printf '\n== %s\n' "$(1)"

.PHONY: help demo tiny test test-rest test-all nightly plant-faults check test-oracle test-clients sanitize sanitize-address sanitize-thread sanitize-whole benchmarks bench bench-engine bench-peers bench-llama-cpp bench-bars bench-experts soak serve-soak docs reference pictures goldens format stubs clean

help:
	@echo "Start:"
	@echo "  make demo            build, fetch the default model, answer one prompt with the KV cache and without it"
	@echo
	@echo "Test:"
	@echo "  make tiny            for each save, 10 seconds: lint, import rules, the cache, a few ops, 100 simulations; no model"
	@echo "  make test            before a push, minutes: all that needs no torch, but for long and repeated runs"
	@echo "  make test-all        before a merge: what make test leaves out, sanitizers, comparisons with torch and llama.cpp"
	@echo "  make nightly         hours: random seeds, 20,000 simulations, every format under sanitizers, soak"
	@echo "  make check           formats, lint, types, import rules, stubs"
	@echo "  make test-oracle     the comparisons with transformers, in a venv of their own"
	@echo "  make test-clients    kvik serve with other people's clients of it, Python and Node, in a venv of their own"
	@echo "  make sanitize        the native core's tests under ASan and UBSan, and under TSan"
	@echo "  make soak            20 minutes of random requests: nothing wrong, nothing held for ever, no growth"
	@echo "  make serve-soak      30 minutes of 300 clients of kvik serve, a fifth of whom leave"
	@echo "  make plant-faults    which tier finds which of the faults that tests/plant_faults.py plants (an hour)"
	@echo
	@echo "Measure:"
	@echo "  make bench           tokens per second of prefill and decode on this machine, and where the time goes"
	@echo "  make bench-engine    what batches, shared prefixes and prompts seen before bring, and the prefix cache's own speed"
	@echo "  make benchmarks      what docs/benchmarks.md shows of kvik race and kvik bench, and docs/scaling.md of routing, measured again"
	@echo "  make bench-peers     the same file through llama-cpp-python, transformers and OpenVINO GenAI (half an hour)"
	@echo "  make bench-llama-cpp build llama.cpp and compare with its own benchmark programs (an hour)"
	@echo "  make bench-bars      build ik_llama.cpp too, make a model of 1.1 B random weights, and compare with the better of both"
	@echo "  make bench-experts   three mixtures of experts of random weights next to llama.cpp (10 GB of disk)"
	@echo
	@echo "Write:"
	@echo "  make docs            the documentation as a site, build/site, which needs no network"
	@echo "  make reference       docs/reference from the program; a test tells when it is not current"
	@echo "  make pictures        the sample page of kvik explain, docs/explain.html, and the pictures of the documents"
	@echo "  make goldens         what transformers makes of the small checkpoints in tests/families, kept for the tests without torch"
	@echo "  make format          reformat Python and C++"
	@echo "  make stubs           rewrite the native module's stub"
	@echo "  make clean           remove virtual environments, builds and caches"

demo: $(VENV)/.installed
	$(call say,Fetch the default model once: SmolLM2-135M-Instruct (98 MB))
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Answer one prompt without the KV cache and with it)
	$(VENV)/bin/kvik race

tiny: $(VENV)/.check-installed
	$(VENV)/bin/ruff format --check -q .
	$(VENV)/bin/ruff check -q .
	$(VENV)/bin/lint-imports --no-logo
	KVIK_TIER=tiny $(VENV)/bin/python -m pytest -q -m tiny

test: $(VENV)/.tests-installed
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Run the tests that need no torch$(,) two at a time; make test-all runs the rest)
	KVIK_TIER=test $(PYTEST) -m 'not full and not nightly'

# Two at a time: each of them leaves a processor half idle.
test-all: $(VENV)/.tests-installed
	$(call say,What make test leaves out)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Gemma 3 270M$(,) if you accept its terms; its tests are skipped otherwise)
	$(VENV)/bin/kvik models pull gemma3-270m $(if $(CI),--yes) || test -z "$(CI)"
	$(MAKE) -j2 --output-sync=target test-oracle test-clients sanitize-address sanitize-thread test-rest

# Hypothesis marks its own tests: they run again with all of their examples.
test-rest: $(VENV)/.tests-installed
	$(call say,Long tests$(,) all simulations$(,) all examples)
	KVIK_TIER=all $(PYTEST) -m '(full or hypothesis) and not nightly'

nightly: $(VENV)/.tests-installed
	$(call say,Everything with random seeds; KVIK_SEED repeats a run)
	$(VENV)/bin/kvik models pull smollm2
	$(VENV)/bin/kvik models pull gemma3-270m $(if $(CI),--yes) || test -z "$(CI)"
	KVIK_TIER=nightly KVIK_RANDOM_SEEDS=1 $(PYTEST)
	$(MAKE) sanitize-whole
	$(MAKE) goldens
	$(VENV)/bin/python -m pytest tests/families/test_goldens.py
	$(MAKE) test-oracle
	$(MAKE) test-clients
	$(MAKE) soak
	$(MAKE) serve-soak

plant-faults: $(VENV)/.check-installed
	$(call say,Plant one fault at a time in a copy of the tree$(,) and run the tiers until one fails)
	$(VENV)/bin/python tests/plant_faults.py

check: $(VENV)/.check-installed
	$(call say,Python: format and lint)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(call say,C++: format)
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(call say,C++: the hot loops keep their sums in registers)
	$(VENV)/bin/python .ci/disassembly.py build/cp*/_native*.so
	$(call say,Types)
	$(VENV)/bin/mypy
	$(call say,Imports point downward only)
	$(VENV)/bin/lint-imports
	$(call say,The stub of the native module is current)
	KVIK_ISA=generic $(VENV)/bin/python -m nanobind.stubgen -q -m kvik._native -O build/stubs
	$(VENV)/bin/ruff format -q build/stubs/_native.pyi
	diff src/kvik/_native.pyi build/stubs/_native.pyi

test-oracle: $(ORACLE_VENV)/.installed
	$(call say,Compare with transformers in float32 and with llama.cpp)
	$(ORACLE_VENV)/bin/python -m pytest tests/oracle

# What other people's packages warn of is theirs to mend.
test-clients: $(CLIENTS_VENV)/.installed
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,kvik serve with lm-eval$(,) llm$(,) LangChain$(,) Pydantic AI$(,) OpenAI's agents$(,) instructor$(,) and two libraries in Node)
	$(CLIENTS_VENV)/bin/python -m pytest -W default tests/clients

goldens: $(ORACLE_VENV)/.installed
	$(call say,Logits of small checkpoints of every family$(,) by transformers)
	cd tests && ../$(ORACLE_VENV)/bin/python -m families.make_goldens

bench: $(VENV)/.installed
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Prefill and decode with int8 activations$(,) and where a step's time goes)
	$(VENV)/bin/kvik bench --depth 0,2048 --kv f16,int8 --profile
	$(call say,The same with int16 activations)
	$(VENV)/bin/kvik bench --activations int16

bench-engine: $(VENV)/.installed
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Many requests$(,) shared prefixes and prompts seen before; llama.cpp too where make bench-peers built it)
	$(VENV)/bin/python bench/engine.py --json build/engine.json
	$(call say,The prefix cache without a model)
	$(VENV)/bin/python bench/radix.py
	$(call say,A prompt seen before$(,) after a restart)
	$(VENV)/bin/python bench/restart.py

docs: reference $(VENV)/.docs-installed
	$(call say,The site$(,) strict: build/site/index.html)
	$(VENV)/bin/zensical build --clean --strict
	@! grep -rnoE '<(script|img|iframe|link)[^>]*(src|href)=.?https?://[^ >]*|iframe-worker' build/site --include='*.html' || \
	  { echo "the site fetches something from elsewhere"; exit 1; }
	@echo "read it: $(VENV)/bin/python -m http.server -d build/site -b 127.0.0.1 8001"

reference: $(VENV)/.tests-installed
	$(call say,docs/reference$(,) from the program)
	$(VENV)/bin/python docs/make_reference.py

pictures: $(VENV)/.tests-installed
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,The sample page)
	$(VENV)/bin/kvik explain "The cat sat on the mat because" --html docs/explain.html
	$(call say,A picture of it$(,) by Chromium)
	$(VENV)/bin/python docs/make_picture.py docs/explain.html docs/explain.png
	$(call say,A picture of the live page)
	$(VENV)/bin/python docs/make_live_picture.py docs/live.png

soak: $(VENV)/.installed
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Random requests for 20 minutes; --minutes and --seed of bench/soak.py make it another run)
	$(VENV)/bin/python bench/soak.py

serve-soak: $(VENV)/.installed
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Clients of kvik serve for 30 minutes; --minutes$(,) --clients and --seed of bench/serve_soak.py make it another run)
	$(VENV)/bin/python bench/serve_soak.py

bench-llama-cpp: $(VENV)/.installed
	$(call say,Build llama.cpp)
	PYTHON=$(VENV)/bin/python bench/peers/build_llama_cpp.sh
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Compare; --only and --rounds of bench/against_llama_cpp.py make it shorter)
	$(VENV)/bin/python bench/against_llama_cpp.py --json build/peers/llama_cpp.json

BARS ?= llama-1.1b
MODELS ?= build/peers/models
bench-bars: $(VENV)/.installed
	$(call say,Build llama.cpp and ik_llama.cpp)
	PYTHON=$(VENV)/bin/python bench/peers/build_llama_cpp.sh
	PYTHON=$(VENV)/bin/python bench/peers/build_ik_llama_cpp.sh
	$(call say,Make $(BARS).Q4_K_M.gguf of random weights; BARS names another config of bench/shapes)
	$(VENV)/bin/python bench/random_model.py bench/shapes/$(BARS).json --out $(MODELS)
	$(call say,Compare)
	$(VENV)/bin/python bench/against_llama_cpp.py --model $(MODELS)/$(BARS).Q4_K_M.gguf --rounds 3 --json build/peers/$(BARS).json

EXPERTS ?= olmoe-1b-7b.Q4_K_M qwen3-30b-a3b-8l.Q4_K_M gpt-oss-20b-8l.MXFP4_MOE
bench-experts: $(VENV)/.installed
	$(call say,Build llama.cpp)
	PYTHON=$(VENV)/bin/python bench/peers/build_llama_cpp.sh
	$(call say,Make $(EXPERTS) of random weights; MODELS names another folder than build/peers/models)
	for model in $(EXPERTS); do $(VENV)/bin/python bench/random_model.py bench/shapes/$${model%.*}.json --types $${model##*.} --out $(MODELS) || exit; done
	$(call say,Compare: decode$(,) prefill 512$(,) 8 sequences)
	for model in $(EXPERTS); do $(VENV)/bin/python bench/against_llama_cpp.py --model $(MODELS)/$$model.gguf --rounds 3 --json build/peers/$$model.json || exit; done

bench-peers: $(VENV)/.installed
	$(call say,Make a virtual environment for each of the others)
	PYTHON=$(VENV)/bin/python bench/peers/build.sh
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,Compare$(,) and write docs/benchmarks.md; --only and --rounds of bench/against_peers.py make it shorter)
	$(VENV)/bin/python bench/against_peers.py --json build/peers/peers.json --markdown docs/benchmarks.md

# Both at once: each of them leaves a processor half idle.
sanitize: $(VENV)/.tests-installed
	$(call say,Native code under sanitizers$(,) two at a time)
	$(MAKE) -j2 --output-sync=target sanitize-address sanitize-thread

sanitize-address sanitize-thread: $(VENV)/.tests-installed
	PYTHON=$(VENV)/bin/python tests/sanitize.sh $(subst sanitize-,,$@)

sanitize-whole: $(VENV)/.tests-installed
	PYTHON=$(VENV)/bin/python tests/sanitize.sh --whole

benchmarks: $(VENV)/.tests-installed
	$(call say,Fetch the default model once)
	$(VENV)/bin/kvik models pull smollm2
	$(call say,kvik race and kvik bench$(,) as docs/benchmarks.md shows them$(,) and simulated routing (40 minutes))
	$(VENV)/bin/python bench/write_benchmarks.py

format: $(VENV)/.check-installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

stubs: $(VENV)/.check-installed
	KVIK_ISA=generic $(VENV)/bin/python -m nanobind.stubgen -q -m kvik._native -o src/kvik/_native.pyi
	$(VENV)/bin/ruff format -q src/kvik/_native.pyi

clean:
	rm -rf $(VENV) $(ORACLE_VENV) $(CLIENTS_VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.made:
	$(call say,Make a virtual environment in $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvik needs Python 3.11 or newer, %s is %d.%d" % (sys.executable, *sys.version_info[:2]))'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# -e: Python sources are used where they lie; a change of native code or of pyproject.toml installs again.
$(VENV)/.installed: $(SOURCES) | $(VENV)/.made
	$(call say,Build and install kvik (half a minute))
	$(VENV)/bin/pip install -q -e '.[server]'
	@touch $@

# By name: kvik is there already, and only what these extras need is added; from its sources it would be compiled again.
$(VENV)/.tests-installed: $(VENV)/.installed
	$(call say,Install what the tests need)
	$(VENV)/bin/pip install -q 'kvik[test]'
	@touch $@

$(VENV)/.check-installed: $(VENV)/.installed
	$(call say,Install the checkers)
	$(VENV)/bin/pip install -q 'kvik[check]'
	@touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(call say,Install the site builder)
	$(VENV)/bin/pip install -q 'kvik[docs]'
	@touch $@

# kvik, once compiled, and what its tests need come from $(VENV). One of an older kind is made anew.
$(ORACLE_VENV)/.made $(CLIENTS_VENV)/.made: | $(VENV)/.tests-installed
	$(call say,Make a virtual environment in $(@D) on top of $(VENV))
	$(VENV)/bin/python -m venv --clear $(@D)
	$(@D)/bin/python -c 'import sys, sysconfig; from pathlib import Path; \
	  Path(sysconfig.get_path("purelib"), "tests.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
	  "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

# pip finds what $(VENV) has, and adds what is missing.
$(ORACLE_VENV)/.installed: tests/oracle/without_common.cmake $(VENV)/.tests-installed | $(ORACLE_VENV)/.made
	$(call say,Add torch$(,) transformers and llama.cpp$(,) which is compiled (some minutes))
	CMAKE_ARGS="$(LLAMA_CPP_FLAGS)" $(ORACLE_VENV)/bin/pip install -q 'kvik[oracle]'
	@touch $@

# npm on an older Node than 22 looks for older packages, so package.json names exact versions, of Node too.
$(CLIENTS_VENV)/.installed: tests/clients/package.json $(VENV)/.tests-installed | $(CLIENTS_VENV)/.made
	$(call say,Add clients of the server (a minute))
	$(CLIENTS_VENV)/bin/pip install -q 'kvik[clients]'
	$(CLIENTS_VENV)/bin/pip install -q --upgrade --target $(CLIENTS_VENV)/instructor instructor==1.17.0
	cp tests/clients/package.json $(CLIENTS_VENV)
	npm install --prefix $(CLIENTS_VENV) --no-audit --no-fund --loglevel=error
	@touch $@
