"""Puts this folder on the path, so that tests in the folders below find `deploy_nets`."""
