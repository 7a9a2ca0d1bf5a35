"""Settings of a run, checked before anything loads.

In: the command line and a YAML file. Out: one frozen `Config` (settings.py), which every other room reads.
A new setting is a field with a docstring in settings.py; a rule about several settings goes into checks.py.
"""
