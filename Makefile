# Letterhead: a letter or a head? Every stage of the pipeline is a target; `make help` prints them in order.
# EXP=name selects experiments/name.yaml; SET="key=value …" overrides single keys, for example SET="data.rows.test=100".
EXP ?= quick
SET ?=
IN ?=
OUT ?=
MODEL ?= best
FORMAT ?=
ERROR ?=
PORT ?= 8000
STUDY ?=
DATA ?=
TEXT ?=
LABEL ?=
SHEET ?=
HOURS ?= 1
ROWS ?= 1000000
PYTHON ?= python3
# How many GPUs (or, without one, processes) a stage uses; one, whatever is visible. Only `make … NPROC=2` changes it.
NPROC = 1
# What `make predict` labels with: ray, or this process. Another program's variable of that name is not meant.
ENGINE =
# `make … PREFLIGHT=no` leaves out the check before a run on a GPU.
PREFLIGHT ?= yes
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

LOCK := requirements/train.txt
LOCKS_SERVE := requirements/serve-cpu.txt requirements/serve-gpu.txt
LOCK_RAY := requirements/ray.txt
LOCK_SBOM := requirements/sbom.txt
# An environment's stamp holds its locks' sha256, so that other locks build it anew.
stamp = $(1)/.ready-$(shell cat requirements/build.txt $(2) 2>/dev/null | sha256sum | cut -c1-16)
READY := $(call stamp,.venv,$(LOCK))
READY_SBOM := $(call stamp,.venv-sbom,$(LOCK_SBOM))
READY_SERVE := $(call stamp,.venv-serve,$(LOCKS_SERVE))
READY_RAY := $(call stamp,.venv-ray,$(LOCK_RAY) $(LOCK))
# What is freed stays with the process, in huge pages: page faults cost a training on a CPU a third of its time. (glibc's own
# variable; elsewhere nobody reads it.)
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1
# Only what fetches is online: libraries ask the hub about a model even where its folder lies on disk, and read these variables
# when they are imported.
ONLINE = $(QUIET) .venv/bin/python -m
# Not exported while it is empty: vLLM reads a variable of that name as a number.
VERBOSE ?=
# Libraries draw no bars into a stage's log.
QUIET := $(if $(VERBOSE),,TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1)
RUN = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(ONLINE)
# What runs for long gives back what it frees, and keeps few of oneDNN's kernels: there is one for each shape of a batch, and of
# the 1,024 that are kept otherwise a server's memory grows for long.
FEW_KERNELS = ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 LRU_CACHE_CAPACITY=64
KEEPS_LITTLE = env -u GLIBC_TUNABLES $(FEW_KERNELS)
SERVICE = $(KEEPS_LITTLE) $(RUN)
BY_RAY = $(KEEPS_LITTLE) $(QUIET) .venv-ray/bin/python -m serve.predict_by_ray --workers "$(if $(filter command,$(origin NPROC)),$(NPROC))"
STAGE = --experiment "$$EXP" --set "$$SET"
export EXP SET IN OUT MODEL FORMAT ERROR ENGINE PORT STUDY DATA TEXT LABEL SHEET HOURS ROWS NPROC
# What the user asked for by name; a stage that only another needs says less.
export ASKED := $(MAKECMDGOALS)

# A misspelt variable would be ignored without a word, and so would a path that tools split at its spaces.
KNOWN := EXP SET IN OUT MODEL FORMAT ERROR ENGINE PORT STUDY DATA TEXT LABEL SHEET HOURS ROWS NPROC VERBOSE PREFLIGHT PYTHON GLIBC_TUNABLES
GIVEN := $(strip $(foreach of,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(of)))),$(of))))
OTHERS := HF_% CUDA_% OMP_% PIP_% %_API_KEY CC SHELL MAKEFLAGS MAKEOVERRIDES
UNKNOWN := $(firstword $(filter-out $(KNOWN) $(OTHERS),$(GIVEN)))
NEAREST := import difflib, sys; known = {name.lower(): name for name in sys.argv[2:]}
NEAREST += ; print(*(known[name] for name in difflib.get_close_matches(sys.argv[1].lower(), known, 1)))
nearest = $(shell $(PYTHON) -c '$(NEAREST)' '$(1)' $(2))
$(if $(UNKNOWN),$(error no variable $(UNKNOWN); $(or $(patsubst %,did you mean %=?,$(call nearest,$(UNKNOWN),$(KNOWN))),choose of $(KNOWN))))
$(if $(filter-out ray,$(ENGINE)),$(error ENGINE=$(ENGINE): no such engine; write ENGINE=ray, or leave it out))
# A misspelt target would end in make's own words.
TARGETS := help setup setup-serve setup-ray licenses new preflight preflight-on-gpu data audit rank distill sft eval-ckpts sft-think grpo zero-shot endpoint tfidf embedding setfit bert bert-all linear-head sft-options cascade compare decide seeds status tensorboard report try predict export serve bench bench-precision bench-scoring bench-sft bench-shape bench-training soak growth study curve demo smoke test test-slow drill lint keys clean
NO_TARGET := $(firstword $(filter-out $(TARGETS) $(READY) $(READY_SBOM) $(READY_SERVE) $(READY_RAY),$(MAKECMDGOALS)))
$(if $(NO_TARGET),$(error no target $(NO_TARGET); $(or $(patsubst %,did you mean make %?,$(call nearest,$(NO_TARGET),$(TARGETS))),make help lists them)))
ONLY_NEW := $(firstword $(filter DATA TEXT LABEL SHEET HOURS,$(GIVEN)))
$(if $(ONLY_NEW),$(if $(filter-out new,$(MAKECMDGOALS)),$(error $(ONLY_NEW)= is for make new; here its experiment is read, edit that: EXP=name)))
$(if $(word 2,$(CURDIR)),$(error the path of this folder has spaces ($(CURDIR)), which Python's environments do not bear; move it))
override EXP := $(patsubst experiments/%,%,$(EXP))
override EXP := $(if $(wildcard experiments/$(EXP)),$(basename $(EXP)),$(EXP))

EXPERIMENTS = $(basename $(notdir $(wildcard experiments/*.yaml)))
# Those whose data no package and no hub has
FROM_FILES = $(basename $(notdir $(shell grep -lE '^  source: [^:]*$$' experiments/*.yaml)))

help: ## print this list
	@echo 'make TARGET [EXP=quick] [SET="key=value …"] [NPROC=1]    EXP is quick, the BBC News demo, unless you say; experiments: $(filter-out $(FROM_FILES),$(EXPERIMENTS)); of files that you have: $(FROM_FILES)'
	@awk -F ':.*## ' '/^#: / { print substr($$0, 4) ":" } /^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

#: common

demo: report ## BBC News end to end, everything but the bench

new: $(READY) ## write an experiment for your own data: make new DATA=reviews.csv (TEXT=title,body LABEL=stars SHEET=name where its guess is wrong; HOURS=8: more contenders)
	@$(ONLINE) prep.new --data "$$DATA" --text "$$TEXT" --label "$$LABEL" --sheet "$$SHEET" --hours "$$HOURS"

report: preflight-on-gpu data status decide ## report.html (opens from disk) and REPORT.md, with pictures
	@$(RUN) report.build $(STAGE)

status: $(READY) ## which stages are done or stale, how long each took, what runs next and for how long
	@$(RUN) report.status $(STAGE)

try: $(READY) ## a page on 127.0.0.1 where all trained methods answer side by side: make try PORT=8000
	@$(SERVICE) serve.page $(STAGE) --port "$$PORT"

predict: $(READY) $(if $(ENGINE),$(READY_RAY)) ## label a file of texts: make predict IN=rows.csv OUT=labelled.csv (or .jsonl, .parquet) MODEL=best (ERROR=0.05: abstain where unsure; ENGINE=ray: by several workers or machines)
	@$(if $(ENGINE),$(BY_RAY),$(ONLINE) serve.predict) $(STAGE) --in "$$IN" --out "$$OUT" --model "$$MODEL" --error "$$ERROR"

#: stages, in order

data: $(READY) ## fetch models and data, make rows, Alpaca JSON and the data card
	@$(ONLINE) prep.data $(STAGE)

sft: data distill ## teach the decoder to answer with a letter (LLaMA-Factory), resuming what was cut off
	@$(RUN) train.sft $(STAGE)

eval-ckpts: sft ## score step 0 and every SFT checkpoint on test and validation rows
	@$(RUN) eval.checkpoints $(STAGE)

zero-shot: data ## the decoder untrained: option perplexity, calibrated, and with thinking
	@$(RUN) eval.zero_shot $(STAGE)

endpoint: data ## ask a hosted LLM the experiment's question (section endpoint; resumable)
	@$(RUN) eval.endpoint $(STAGE)

tfidf: data ## the floor: TF-IDF with logistic regression, on the rows that the methods share and on all
	@$(RUN) train.fitted tfidf $(STAGE)
	@$(RUN) train.fitted tfidf_all $(STAGE)

embedding: data ## the encoder frozen, with logistic regression on its embeddings, on shared rows and on all
	@$(RUN) train.fitted embedding $(STAGE)
	@$(RUN) train.fitted embedding_all $(STAGE)

setfit: data ## fine-tune the encoder by contrast of pairs, where rows are few (encoder.setfit)
	@$(RUN) train.fitted setfit $(STAGE)

bert: data ## fine-tune BERT with a linear head (HF Trainer), on the rows that the methods share
	@$(RUN) train.heads bert $(STAGE)

bert-all: data ## the same on all of train, where the methods share fewer rows
	@$(RUN) train.heads bert_all $(STAGE)

linear-head: data ## put a linear head on the decoder and fine-tune it (HF Trainer)
	@$(RUN) train.heads linear_head $(STAGE)

sft-options: data ## train the decoder as SFT does, with the loss over the option letters alone (decoder.sft_options)
	@$(RUN) train.heads sft_options $(STAGE)

seeds: data ## train every method once more for each further seed that the experiment names
	@$(RUN) study.seeds $(STAGE)

cascade: eval-ckpts zero-shot endpoint tfidf embedding setfit bert bert-all linear-head sft-options seeds ## pairs of methods, chosen on validation rows: a cheap one answers where it is sure, a dear one the rest
	@$(RUN) eval.cascade $(STAGE)

compare: cascade sft-think ## every method on the same rows, every pair tested
	@$(RUN) eval.compare $(STAGE)

decide: compare ## which method to ship, and why
	@$(RUN) eval.decide $(STAGE)

#: serve and measure

export: $(READY) ## a checkpoint as a model of its own, with a card; SFT's is folded into a classifier: make export MODEL=sft (bert, embedding: FORMAT=onnx for ONNX Runtime)
	@$(RUN) serve.export $(STAGE) --model "$$MODEL" --format "$$FORMAT"

serve: $(READY) ## serve a method on 127.0.0.1, a decoder with vLLM: make serve MODEL=best PORT=8000 (ERROR=0.05: abstain where unsure)
	@$(SERVICE) serve.start $(STAGE) --model "$$MODEL" --port "$$PORT" --error "$$ERROR"

bench: $(READY_SERVE) preflight-on-gpu compare ## requests per second of every method in HF, ONNX Runtime and vLLM; then the choice and the report anew
	@$(FEW_KERNELS) $(RUN) bench.rps $(STAGE)
	@$(RUN) eval.decide $(STAGE)
	@$(RUN) report.build $(STAGE)

soak: $(READY) ## 20 minutes of load and bad clients on a service: make soak MODEL=bert (after make report)
	@$(SERVICE) bench.peers.soak $(STAGE) --model "$$MODEL"

growth: data ## time and memory against rows, options and results, up to a million rows: make growth ROWS=1000000
	@$(RUN) bench.peers.growth $(STAGE) --rows "$$ROWS"

bench-shape: $(READY) $(READY_SERVE) ## time and memory of the article's models (random weights) on this machine
	@$(RUN) prep.shape --experiment shape
	@[ "$$($(ONLINE) letterhead.runs.devices)" = gpu ] || SET="decoder.sft.overrides.use_cpu=true decoder.sft.overrides.bf16=false $$SET"; \
	$(MAKE) sft EXP=shape SET="$$SET" && $(RUN) bench.peers.shape --experiment shape --set "$$SET"

bench-scoring: sft ## scoring speed and agreement against lm-evaluation-harness
	@$(MAKE) data EXP=r52 SET=
	@$(RUN) bench.peers.scoring $(STAGE)

bench-training: data ## training throughput of BERT and the linear head: rows grouped by length against plain
	@$(RUN) bench.peers.training $(STAGE)

bench-sft: data ## training throughput of SFT: against LLaMA-Factory as it comes, and a plain torch loop
	@$(RUN) bench.peers.sft $(STAGE)

bench-precision: sft ## which predictions bfloat16 changes, with its last projection in bfloat16 and in float32
	@$(RUN) bench.peers.precision $(STAGE)

audit: data ## labels that look wrong, by cross-validated frozen embeddings: a table and a page
	@$(RUN) report.audit $(STAGE)

#: studies

curve: ## the first of the studies: macro F1 against the number of labelled rows, all methods on the same rows
	@$(MAKE) study STUDY=curve

study: $(READY) ## vary keys of an experiment, each cell with every seed: make study STUDY=curve (experiments/studies/)
	@$(RUN) study.run $(STAGE) --study "$$STUDY"

rank: data ## the training rows by how far the untrained decoder prefers the right option (data.rows.train_from)
	@$(RUN) eval.rank $(STAGE)

distill: data ## have a teacher write its thinking for training rows, right answers kept (section distill; resumable)
	@$(RUN) train.distill $(STAGE)

sft-think: eval-ckpts ## the chosen SFT checkpoint with thinking, where a teacher's thoughts were learnt (section distill)
	@$(RUN) eval.sft_think $(STAGE)

grpo: eval-ckpts ## GRPO by TRL from the chosen SFT checkpoint on, then scored in both modes (section grpo)
	@$(RUN) train.grpo $(STAGE)
	@$(RUN) eval.grpo $(STAGE)

#: set-up, checks, and the rest

preflight: $(READY) ## before a rented GPU costs money: device, disk, memory, hub, labels, prompts; go or no-go
	@$(ONLINE) prep.preflight $(STAGE) --when always

# On a GPU the same, by itself, before what takes hours.
preflight-on-gpu: $(READY)
	@[ "$(PREFLIGHT)" = no ] || $(ONLINE) prep.preflight $(STAGE) --when gpu

setup: $(READY) ## build .venv from the lock (every target that needs it does this by itself)

$(READY): ; @PYTHON="$(PYTHON)" requirements/install.sh $(LOCK) .venv $@

setup-serve: $(READY_SERVE) ## build .venv-serve (vLLM: for the GPU if there is one, else for the CPU)

# What torch sees decides between the locks: `letterhead.runs.devices` prints gpu or cpu.
$(READY_SERVE): | $(READY)
	@device=$$($(ONLINE) letterhead.runs.devices) && PYTHON="$(PYTHON)" requirements/install.sh requirements/serve-$$device.txt .venv-serve $@

setup-ray: $(READY_RAY) ## build .venv-ray (Ray, beside the packages of .venv)

$(READY_RAY): $(READY)
	@PYTHON="$(PYTHON)" requirements/install.sh $(LOCK_RAY) .venv-ray $@ .venv

licenses: $(READY) $(READY_SBOM) ## licenses of packages, models and data, and an SBOM (CycloneDX): sbom/
	@$(ONLINE) prep.licenses

$(READY_SBOM): ; @PYTHON="$(PYTHON)" requirements/install.sh $(LOCK_SBOM) .venv-sbom $@

# Two workers with half of the processors each; the tests of a file stay with one, which shares what it loaded among them.
test: $(READY) $(READY_SERVE) $(READY_RAY) ## lint, then the tests
	@.venv/bin/ruff check -q . && .venv/bin/ruff format -q --check .
	@OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )) .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) $(READY_SERVE) $(READY_RAY) ## the tests that take minutes each, and three kills of each stage
	@.venv/bin/python -m pytest -m slow
	@.venv/bin/python -m pytest tests/test_drill.py -k killed --kills 3

lint: $(READY) ## lint and format in place
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

keys: $(READY) ## write docs/keys.md, the reference of an experiment's keys, from their descriptions
	@$(RUN) letterhead.config.reference > docs/keys.md

smoke: $(READY) ## the whole pipeline and the bench on 64 rows: minutes, for CI
	@$(MAKE) bench EXP=smoke

drill: $(READY) ## disturb every stage of a report, 20 kills each, and hold what it ends with against an undisturbed run
	@.venv/bin/python -m pytest -s tests/test_drill.py --kills 20 --all-faults

tensorboard: $(READY) ## losses and metrics of every training, on 127.0.0.1
	@.venv/bin/tensorboard --logdir "runs/$$EXP" --host 127.0.0.1

clean: ## remove what EXP and its studies made (data/EXP, runs/EXP, EXP.*); fetched models and packages stay
	@case "$$EXP" in ''|*/*|.*) echo "clean: EXP must be an experiment's name" >&2; exit 1;; esac; rm -rf "data/$$EXP" "runs/$$EXP" "data/$$EXP".* "runs/$$EXP".*

.PHONY: $(TARGETS)
