# The pictures of `streamd top`; included by the Makefile.

.PHONY: screenshots-top

screenshots: screenshots-top

screenshots-top: $(VENV)/.dev ## draw docs/screenshots/top.svg and top-end.svg anew, before a daemon under load
	@$(BIN)/python tests/screenshot_top.py
