data: | .venv/ready
	$(BIN) alfworld-download
