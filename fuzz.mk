# Fuzzing: make fuzz [TIME=600] [TARGET="chunked sse"]. atheris has an environment of its own, since it isn't needed for
# anything else.

TIME ?= 60
TARGET ?=

.PHONY: fuzz

.venv-fuzz/.ready: setup.cfg pyproject.toml
	@echo "installing atheris into .venv-fuzz …"
	@test -x .venv-fuzz/bin/python || $(PYTHON) -m venv .venv-fuzz
	@.venv-fuzz/bin/python $(PIP_INSTALL) --editable . atheris
	@touch $@

fuzz: .venv-fuzz/.ready ## fuzz what takes bytes from outside, TIME seconds each (TIME=60)
	@.venv-fuzz/bin/python fuzz/run.py $(TARGET) --time $(TIME)
