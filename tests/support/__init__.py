"""What tests share and what is no test: imported as ``tests.support.<name>``."""
