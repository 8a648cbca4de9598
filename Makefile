# `make help` lists the targets. Each does its own set-up and can be run from a fresh clone.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

SOURCES = $(shell git ls-files '*.cpp' '*.h' '*.cu')

.PHONY: help setup build demo test test-slow format tidy asan tsan clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: ## what is missing of system packages, libtorch, .venv with the tinker SDK
	@scripts/setup --for demo

build: setup ## build/hosted-tinker
	@scripts/build

demo: build ## fine-tune and sample the embedded model through the official SDK
	@scripts/demo

test: ## the suite: unit, parity and SDK tests
	@scripts/setup --for test
	@scripts/build all
	@scripts/test fast

test-slow: ## long sequences and other tests of minutes
	@scripts/setup --for test
	@scripts/build all
	@scripts/test slow

format: ## clang-format on every C++ source
	@scripts/setup --for tidy
	@clang-format -i $(SOURCES)

tidy: ## clang-tidy on the torch-free sources
	@scripts/setup --for tidy
	@scripts/tidy

asan: ## unit tests with AddressSanitizer and UBSan
	@scripts/setup --for test
	@cmake --preset asan >/dev/null
	@cmake --build --preset asan --target unit_tests
	@ctest --preset asan --no-tests=error -L unit

tsan: ## unit tests of the torch-free targets with ThreadSanitizer
	@scripts/setup --for build
	@cmake --preset tsan >/dev/null
	@cmake --build --preset tsan --target unit_tests
	@ctest --preset tsan --no-tests=error -L unit

clean: ## remove build/ (not .deps and .venv)
	@rm -rf build
