# What is made here stays in this directory, save Debian packages and the demo's mountpoint. `make help` lists targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

PYTHON ?= python3
BUCKET ?= demo
MINUTES ?= 30
MNT ?= /mnt/s3fuse-demo
KILLS ?= 100
RESTARTS ?= 20
SEED ?= 1
LAG ?= 0
SERVER ?= minio

MINIO_VERSION := v0.0.0-20260212201848-7aac2a2c5b7c
MC_VERSION := v0.0.0-20250313080218-cf909e1063a9
FSX_VERSION := 0.3.2

DEMO_PACKAGES := fuse3 libfuse3-dev pkg-config gcc
PACKAGES := $(DEMO_PACKAGES) rsync s3fs sqlite3 git attr busybox-static docker-compose iproute2

S3FUSE := .venv/bin/s3fuse
GO_PATH := $(PATH):/usr/local/go/bin
CARGO_PATH := $(PATH):$(HOME)/.cargo/bin

# $(call install,NAMES): installs those of the Debian packages that are missing; asks nobody where there are none.
define install
	wanted="$(strip $(1))"; missing=""
	if command -v dpkg-query >/dev/null; then
	    installed=" $$(dpkg-query -W -f '$${db:Status-Status}=$${Package} ' $$wanted 2>/dev/null || true) "
	    for name in $$wanted; do [[ $$installed == *" installed=$$name "* ]] || missing+=" $$name"; done
	    if [ -n "$$missing" ]; then
	        sudo=""; [ "$$(id -u)" = 0 ] || sudo=sudo
	        echo "installing Debian packages:$$missing"
	        $$sudo apt-get update -qq
	        $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null
	    fi
	else
	    echo "this is no Debian; if a step fails, install what these packages hold: $$wanted" >&2
	fi
endef

.PHONY: help setup packages demo-packages demo demo-stop test crash kills limits nodes soak check bench bench-report clean

help:
	@echo "make setup      everything for work on s3fuse: packages, .venv, MinIO's server, fsx"
	echo "make demo       an S3 server on loopback and its bucket BUCKET=$(BUCKET) mounted on MNT=$(MNT)"
	echo "make demo-stop  ends it; its data stays in .demo"
	echo "make test       all tests"
	echo "make crash      kills of the daemon under load, KILLS=$(KILLS) of them, SEED=$(SEED)"
	echo "make limits     4 GiB through a dirty budget of 64 MiB and a cache of 200 MiB"
	echo "make nodes      three nodes on one bucket for MINUTES=$(MINUTES), judged by a checker, SERVER=minio or seaweedfs"
	echo "make soak       20,000 attacks of a hostile server, then mixed load for MINUTES=$(MINUTES) through a faulty proxy"
	echo "make check      ruff, mypy, import order"
	echo "make clean      removes what make made in this directory"

setup: .venv/.for-tests .tools/.minio-$(MINIO_VERSION) .tools/.mc-$(MC_VERSION) .tools/.fsx-$(FSX_VERSION)

# A dockerd that is there, whosever it is, is taken; the tests start their own of it, apart from the machine.
packages:
	@$(call install,$(PACKAGES))
	PATH="$$PATH:/usr/sbin" command -v dockerd >/dev/null || { $(call install,docker.io); }

demo-packages:
	@$(call install,$(DEMO_PACKAGES))

# $(call venv,EXTRAS): makes .venv if it is missing, and installs s3fuse in it, editable.
define venv
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	    echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 …" >&2; exit 1; }
	if ! "$(PYTHON)" -c 'import ensurepip, os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null; then
	    $(call install,python3-venv python3-dev)
	fi
	[ -x .venv/bin/pip ] || "$(PYTHON)" -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[$(1)]'
endef

.venv/.for-demo: pyproject.toml constraints.txt | demo-packages
	@$(call venv,server)
	touch $@

.venv/.for-tests: pyproject.toml constraints.txt | packages
	@$(call venv,server$(,)test)
	touch .venv/.for-demo $@

, := ,

# $(call go_install,MODULE): builds a program of MinIO's into .tools/bin.
define go_install
	export PATH="$(GO_PATH)"
	command -v go >/dev/null || { $(call install,golang-go); }
	version=$$(go env GOVERSION); version=$${version#go}
	[ "$$(printf '%s\n' 1.21 "$$version" | sort -V | head -n 1)" = 1.21 ] || {
	    echo "Go $$version is too old to build MinIO: put Go 1.21 or newer on the PATH" >&2; exit 1; }
	echo "building $(1); this takes minutes"
	GOBIN="$(CURDIR)/.tools/bin" go install "$(1)"
	touch $@
endef

.tools/.minio-$(MINIO_VERSION): | packages
	@$(call go_install,github.com/minio/minio@$(MINIO_VERSION))

.tools/.mc-$(MC_VERSION): | packages
	@$(call go_install,github.com/minio/mc@$(MC_VERSION))

.tools/.fsx-$(FSX_VERSION): | packages
	@export PATH="$(CARGO_PATH)"
	command -v cargo >/dev/null || { $(call install,cargo); }
	cargo install -q --root .tools --locked --force --version $(FSX_VERSION) fsx || {
	    echo "$$(cargo --version) could not build fsx $(FSX_VERSION); if it is too old, put a newer one on the PATH" >&2; exit 1; }
	touch $@

# The demo's server is ours if the pid is an s3fuse server still: pids are used again.
define demo_server_runs
	[ -s .demo/server.pid ] && tr '\0' ' ' <"/proc/$$(cat .demo/server.pid)/cmdline" 2>/dev/null | grep -q 's3fuse server'
endef

demo: .venv/.for-demo
	@mkdir -p .demo
	if ! { $(demo_server_runs); }; then
	    rm -f .demo/server/server.env
	    setsid $(S3FUSE) server --data-dir "$(CURDIR)/.demo/server" >.demo/server.log 2>&1 </dev/null &
	    echo $$! >.demo/server.pid
	fi
	for _ in {1..600}; do [ -s .demo/server/server.env ] || ! { $(demo_server_runs); } || sleep 0.1; done
	[ -s .demo/server/server.env ] || { echo "the S3 server did not start:" >&2; cat .demo/server.log >&2; exit 1; }
	. .demo/server/server.env
	if mountpoint -q "$(MNT)" && $(S3FUSE) status "$(MNT)" >/dev/null 2>&1; then
	    echo "$(MNT) is already mounted"
	else
	    mkdir -p "$(MNT)" 2>/dev/null || true  # a dead mount is in the way of mkdir, not of the mount
	    XDG_CACHE_HOME="$(CURDIR)/.demo/cache" $(S3FUSE) mount --create-bucket "$(BUCKET)" "$(MNT)"
	    echo "$(MNT)" >>.demo/mountpoints
	fi
	echo "Try it:   echo hello >$(MNT)/hello; ls -l $(MNT); $(S3FUSE) status"
	echo "S3 is at: $$MINIO_ENDPOINT, bucket $(BUCKET); for other S3 tools: . .demo/server/server.env"
	echo "Stop it:  make demo-stop"

demo-stop:
	@if [ -f .demo/mountpoints ]; then
	    sort -u .demo/mountpoints | while read -r mountpoint; do
	        if grep -qF " $$mountpoint fuse.s3fuse " /proc/self/mounts; then
	            code=0; $(S3FUSE) umount "$$mountpoint" || code=$$?
	            [ $$code = 0 ] || [ $$code = 3 ] || exit $$code
	        fi
	        rmdir --ignore-fail-on-non-empty "$$mountpoint" 2>/dev/null || true
	    done
	    rm .demo/mountpoints
	fi
	if $(demo_server_runs); then
	    pid=$$(cat .demo/server.pid)
	    kill "$$pid"
	    tail --pid="$$pid" -f /dev/null
	fi
	rm -f .demo/server.pid
	echo "the demo is stopped; make demo starts it again with its data"

test: setup
	@.venv/bin/pytest -q

.venv/.for-bench: .venv/.for-tests
	@$(call venv,server$(,)test$(,)bench)
	touch $@

bench: setup .venv/.for-bench
	@.venv/bin/python -m bench $(BENCH)

bench-report: .venv/.for-bench
	@.venv/bin/python -m bench.page bench/out/latest.json bench/report $(if $(NOTE),"$(NOTE)")

crash: setup
	@.venv/bin/python -m tests.crash --kills "$(KILLS)" --seed "$(SEED)"

kills: setup
	@PYTHONPATH="$(CURDIR)" .venv/bin/python -m tests.keeper --kills "$(KILLS)" --restarts "$(RESTARTS)" --seed "$(SEED)" \
	    --lag "$(LAG)"

limits: setup
	@S3FUSE_TEST_LIMIT_BYTES=$$((4 << 30)) .venv/bin/pytest -q tests/fuse/test_limits.py -k minio

nodes: setup
	@PYTHONPATH="$(CURDIR)" .venv/bin/python -m tests.nodes --minutes "$(MINUTES)" --server "$(SERVER)"

soak: setup
	@S3FUSE_TEST_EXAMPLES=20000 .venv/bin/pytest -q tests/engine/test_fuzz.py
	PYTHONPATH="$(CURDIR)" .venv/bin/python -m tests.soak --minutes "$(MINUTES)"

check: .venv/.for-tests
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

clean: demo-stop
	@rm -rf .demo .venv .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* bench/out
	find . -name __pycache__ -prune -exec rm -rf {} +
