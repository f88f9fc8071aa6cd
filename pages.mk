# make test-pages and screenshots; included by the Makefile.

.PHONY: test-pages screenshots screenshots-pages

test-pages: $(VENV)/.dev ## all tests of the pages in a real Chromium, the long ones too (make test-tools; two minutes)
	@$(BIN)/python -m pytest -m "pages or not pages" tests/browser/test_chat_page.py tests/browser/test_operations_page.py $(ARGS)

screenshots: screenshots-pages ## draw docs/screenshots anew

screenshots-pages: $(VENV)/.dev ## those of the pages (make test-tools)
	@$(BIN)/python tests/browser/screenshots.py
