"""One run of ``npt train`` from its configuration to its records: what is loaded, saved, resumed, shown."""
