# Real clients and servers: make test-clients [ONLY=openai]. Each group of Python packages has an environment of its own,
# pinned in tests/clients/requirements; the JavaScript packages are pinned in tests/clients/js. Needs node, npm and a
# JDK (Debian: nodejs, npm, default-jdk-headless); a part that is missing is named and skipped. `transformers serve` takes
# torch, another 5 GB: WITH=transformers.

ONLY ?=
WITH ?=
CLIENTS := tests/clients
CLIENT_GROUPS := sdks agents langchain litellm llama $(WITH)

.PHONY: test-clients

.venv-clients/%/.ready: $(CLIENTS)/requirements/%.txt
	@echo "installing $* into .venv-clients/$* …"
	@test -x .venv-clients/$*/bin/python || $(PYTHON) -m venv .venv-clients/$*
	@.venv-clients/$*/bin/python $(PIP_INSTALL) --requirement $<
	@touch $@

$(CLIENTS)/js/node_modules/.ready: $(CLIENTS)/js/package-lock.json
	@echo "installing the JavaScript packages into $(CLIENTS)/js/node_modules …"
	@if command -v npm >/dev/null; then cd $(CLIENTS)/js && npm ci --silent && touch node_modules/.ready; fi

CLIENT_PARTS := $(CLIENT_GROUPS:%=.venv-clients/%/.ready) $(CLIENTS)/js/node_modules/.ready

test-clients: $(VENV)/.dev $(CLIENT_PARTS) ## real SDKs, frameworks, readers and servers through streamd (2 GB; ONLY=openai)
	@$(BIN)/python $(CLIENTS)/run.py --only '$(ONLY)' $(ARGS)
