# make install, uninstall and test-systemd; included by the Makefile.
#
#   make install                          the daemon under /opt/streamd, units, configuration, man pages, completion
#   make install DESTDIR=stage            the same into a tree of its own, for packages and images
#   make install PREFIX=/srv/streamd      the daemon elsewhere; the units follow
#
# Nothing that a person changed is overwritten or removed (systemd/place.py). Twice does no more than once.

PREFIX ?= /opt/streamd
DESTDIR ?=
EXTRAS ?=
PYTHON ?= python3
# For a machine without an index: PIP_FLAGS="--no-index --find-links=/wheels"
PIP_FLAGS ?=
# Why not /etc/systemd/system: that is the administrator's; a unit there could not be masked.
UNITDIR ?= /usr/local/lib/systemd/system
CONFDIR ?= /etc/streamd
MANDIR ?= /usr/local/share/man
BINDIR ?= /usr/local/bin
# The page that the configurations of examples/proxies serve from here.
EXAMPLEDIR ?= /usr/local/share/streamd/examples

STREAMD_ROOT = $(DESTDIR)$(PREFIX)
# systemd runs here, and it is this machine that the files are for.
STREAMD_BOOTED = test -z "$(DESTDIR)" && test -d /run/systemd/system

STREAMD_PLACES = \
	systemd/streamd.service=$(UNITDIR)/streamd.service \
	systemd/streamd.socket=$(UNITDIR)/streamd.socket \
	systemd/streamd-admin.socket=$(UNITDIR)/streamd-admin.socket \
	systemd/streamd.sysusers=/usr/local/lib/sysusers.d/streamd.conf \
	systemd/streamd.tmpfiles=/usr/local/lib/tmpfiles.d/streamd.conf \
	systemd/streamd.toml=$(CONFDIR)/streamd.toml \
	$(foreach file,index.html page.css page.js streamd.js,examples/$(file)=$(EXAMPLEDIR)/$(file))

STREAMD_DOCS = streamd.8=$(MANDIR)/man8/streamd.8 \
	streamd.toml.5=$(MANDIR)/man5/streamd.toml.5 \
	streamd.bash=/usr/local/share/bash-completion/completions/streamd \
	_streamd=/usr/local/share/zsh/site-functions/_streamd

.PHONY: install install-venv install-files uninstall test-systemd

install: install-files ## the daemon under /opt/streamd, units, configuration, man pages (DESTDIR, PREFIX, EXTRAS)
	@if $(STREAMD_BOOTED); then \
		systemd-sysusers /usr/local/lib/sysusers.d/streamd.conf && \
		systemd-tmpfiles --create /usr/local/lib/tmpfiles.d/streamd.conf && \
		systemctl daemon-reload; fi
	@echo "installed. Name your inference servers in $(CONFDIR)/streamd.toml, then: systemctl enable --now streamd.service"
	@echo "(was it running before? systemctl restart streamd.service: readers resume by themselves)"

# EXTRAS=otel brings the packages of an extra along, the newest that setup.cfg allows: the lock has the daemon's own alone.
# Built from a copy: setuptools leaves build/ behind, and would pack a module that is gone from the tree.
# Under DESTDIR the scripts and the compiled files are told where they will live.
install-venv:
	@$(PYTHON) systemd/interpreter.py "$(DESTDIR)"
	@echo "installing the daemon into $(STREAMD_ROOT) …"
	@$(PYTHON) -m venv $(STREAMD_ROOT)
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
		cp -R setup.cfg pyproject.toml $(wildcard README.md LICENSE) streamd "$$copy" && \
		pip="$(STREAMD_ROOT)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_FLAGS)" && \
		$$pip --require-hashes -r requirements.lock && $$pip $(if $(EXTRAS),"$$copy[$(EXTRAS)]",--no-deps "$$copy")
	@if test -n "$(DESTDIR)"; then find $(STREAMD_ROOT)/bin -type f -exec sed -i 's#$(STREAMD_ROOT)#$(PREFIX)#g' {} +; fi
	@$(STREAMD_ROOT)/bin/python -m compileall -q $(if $(DESTDIR),-f) -s "$(DESTDIR)/" -p / $(STREAMD_ROOT)/lib

install-files: install-venv
	@echo "installing units, configuration, man pages and completion …"
	@docs=$$(mktemp -d) && trap 'rm -rf "$$docs"' EXIT && \
		$(STREAMD_ROOT)/bin/python systemd/docs.py "$$docs" && \
		$(PYTHON) systemd/place.py install --destdir "$(DESTDIR)" --prefix "$(PREFIX)" \
			$(STREAMD_PLACES) $(addprefix "$$docs"/,$(STREAMD_DOCS))
	@install -d $(DESTDIR)$(BINDIR)
	@if ! test -e $(DESTDIR)$(BINDIR)/streamd; then ln -sf $(PREFIX)/bin/streamd $(DESTDIR)$(BINDIR)/streamd; fi

uninstall: ## take away what install brought, but for what a person changed
	@if $(STREAMD_BOOTED); then systemctl disable --quiet --now streamd.service streamd.socket streamd-admin.socket || true; fi
	@$(PYTHON) systemd/place.py uninstall --destdir "$(DESTDIR)" --prefix "$(PREFIX)"
	@if test "$$(readlink $(DESTDIR)$(BINDIR)/streamd)" = "$(PREFIX)/bin/streamd"; then rm $(DESTDIR)$(BINDIR)/streamd; fi
	@if test -f $(STREAMD_ROOT)/pyvenv.cfg && test -d $(STREAMD_ROOT)/share/streamd; then rm -rf $(STREAMD_ROOT); fi
	@if $(STREAMD_BOOTED); then systemctl daemon-reload; fi
	@echo "the user streamd, /var/lib/streamd and $(CONFDIR)/credentials stay: remove them by hand"

# A Debian with its own systemd in a container (as root; the root is built once and kept in ~/.cache/streamd).
test-systemd: venv ## the tests in a container with a systemd of its own (as root)
	@# The first time the root is made, which may take longer than a test should.
	.venv/bin/python -m pytest -m systemd -rs -o faulthandler_timeout=600 tests/systemd $(ARGS)
