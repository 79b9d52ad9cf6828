# make setup | quickstart | demo | chat | test | check | fuzz | bench | clean
# Everything happens in .venv, as an ordinary user. `make quickstart`, `make demo` and `make test`
# make the environment themselves where it is missing.

VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMP  := $(VENV)/.complete
export PYTHONPATH := $(CURDIR)
# Spares every process of a run a look-up on the network: nothing is ever fetched from a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.PHONY: setup quickstart demo chat test check lint types fuzz bench lock clean

setup: $(STAMP)

# The stamp is set last: an environment that a kill left half-made is made anew.
$(STAMP): requirements.lock requirements-dev.txt
	@sh setup.sh $(VENV)

quickstart: $(STAMP)
	@UNIMOE_PARENT=$$PPID exec $(PYTHON) -m unimoe_mcore.quickstart $(ARGS)

demo: $(STAMP)
	@UNIMOE_PARENT=$$PPID exec $(PYTHON) -m unimoe_mcore.demo $(ARGS)

# make chat ARGS=runs/stage3: a page in the browser on which a run is asked.
chat: $(STAMP)
	@exec $(PYTHON) -m unimoe_mcore.chat $(ARGS)

test: $(STAMP)
	@bash tests/slurm/install.sh
	@bash tests/browser.sh
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh tests/data_pipeline/energon.sh
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(ARGS)

check: lint types

lint: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(STAMP)
	@$(VENV)/bin/mypy

# Readers of strangers' files, ten minutes of spoilt ones.
fuzz: $(STAMP)
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.fuzzing $(ARGS)

# Every performance claim, measured again; answer_logits needs the quickstart's data and base.
bench: $(STAMP)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh tests/data_pipeline/energon.sh
	@for name in precision thd_rope checkpoint_save balance planning shuffle_locality decoders \
	    throughput answer_logits training_step scale equalities; do \
	    OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.$$name || exit 1; done

# Pins what is installed now, for requirements.lock.
lock: $(STAMP)
	@$(PYTHON) -m pip list --format=freeze --exclude pip --exclude setuptools --exclude unimoe-mcore > requirements.lock
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs data cache
