# The daemon's dependencies, pinned by hash: make lock writes requirements.lock anew with the newest releases that
# setup.cfg allows. Read the difference before it is committed. The lock holds for every platform and every Python that
# the releases have files for, and names no index.

.PHONY: lock

lock: ## pin the newest dependencies of the daemon by hash, into requirements.lock
	@venv=$$(mktemp -d) && trap 'rm -rf "$$venv"' EXIT && \
		$(PYTHON) -m venv "$$venv" && "$$venv/bin/python" $(PIP_INSTALL) pip-tools && \
		sed -n '/^install_requires/,/^$$/s/^    //p' setup.cfg > "$$venv/requirements.in" && \
		"$$venv/bin/pip-compile" --quiet --generate-hashes --strip-extras --no-header --no-annotate \
			--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
			--output-file "$$venv/lock" "$$venv/requirements.in" && \
		{ echo "# Made by make lock, for pip install --require-hashes -r."; cat "$$venv/lock"; } > requirements.lock
