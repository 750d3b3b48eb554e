data: | .venv/ready
	$(VENV) alfworld-download
