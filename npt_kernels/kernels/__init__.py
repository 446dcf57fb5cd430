"""Who computes: one folder or file a backend. Nothing here knows of autograd, models or runs."""
